"""Converted models with a forward of any kind, beside the float models, for tests."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchquant
from torchquant.chains.region import RegionForward
from torchquant.convert.regions import regions_in

Forward = Callable[..., Any]


class Net(nn.Module):
    """Layers for a forward that a test gives; all of them take and give 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.p, self.q = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 8)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.place = nn.Parameter(torch.randn(1, 8, 6, 6))


def module_with(forward: Forward, base: type[nn.Module] = Net) -> nn.Module:
    """A module with a forward; the same values each time."""
    torch.manual_seed(0)
    made: nn.Module = type("Made", (base,), {"forward": forward, "__module__": __name__})()
    return made.eval()


def both(forward: Forward, batches: Sequence[Any], base: type[nn.Module] = Net) -> tuple[Any, Any]:
    """The converted model and the float model."""
    model = module_with(forward, base)
    real = copy.deepcopy(model)
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
    called = getattr(forward, "__code__", None)
    names = None if called is None else called.co_names
    torchquant.prepare_(
        model, config, filter_fn=lambda module, name: names is None or name in names
    )
    torchquant.calibrate(model, batches, progress=False)
    torchquant.convert_(model)
    return model, real


def region_in(model: nn.Module) -> RegionForward:
    """The only region of a model, which is the model itself."""
    (region,) = regions_in(model)
    assert region.root is model
    return region


def interpreted(model: nn.Module, *inputs: Any) -> Any:
    """The meaning of the region that a model is."""
    with torch.no_grad():
        return region_in(model)._interpreted(list(inputs))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a result, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def assert_close(got: Any, wanted: Any, cosine: float = 0.99) -> None:
    """The tensors of two results have the same shapes and point in nearly the same direction."""
    pairs = list(zip(tensors(got), tensors(wanted), strict=True))
    assert pairs
    for mine, real in pairs:
        assert mine.shape == real.shape and mine.dtype == real.dtype
        if not mine.is_floating_point() or not mine.numel():
            continue
        found = torch.cosine_similarity(mine.double().flatten(), real.double().flatten(), 0)
        assert found > cosine, f"cosine {float(found)}"


def assert_same(got: Any, wanted: Any) -> None:
    """The tensors of two results have the same bits."""
    for mine, real in zip(tensors(got), tensors(wanted), strict=True):
        mine, real = mine.detach(), real.detach()
        assert mine.dtype == real.dtype and torch.equal(mine.isnan(), real.isnan())
        assert torch.equal(mine.nan_to_num(), real.nan_to_num())
