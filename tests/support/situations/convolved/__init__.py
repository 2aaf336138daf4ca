"""Ways to write and to use a convolutional network, each as a module with a method ``use``.

``use`` runs the module and returns every value that its code sees. The float module and the
converted one have to agree, and the converted one with and without programs has the same bits.
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import torchquant
from support import assert_same_bits
from support.situations import APART, MODES, assert_agree, tensors

C = 16
_GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(3, C, 8, 8, generator=_GENERATOR)
CONVOLVED: list[type["Convolved"]] = []


class Convolved(nn.Module):
    """A block: convolution, batch norm, relu, and a second convolution on the sum."""

    modes: ClassVar[tuple[str, ...]] = tuple(MODES)
    cosine: ClassVar[float] = 0.999
    dynamic: ClassVar[bool] = True  # False: not a situation of dynamic activations

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "use" in vars(cls):
            CONVOLVED.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU()
        self.second = nn.Conv2d(C, C, 3, padding=1)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.norm(self.conv(x)))
        return self.second(y + x)

    def use(self) -> Any:
        raise NotImplementedError


def make(kind: type[Convolved]) -> Convolved:
    """A module with the same values each time."""
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def used(model: Convolved, mode: str) -> list[Tensor]:
    """The tensors that the module's code sees."""
    model.seen.clear()
    with MODES[mode]():
        return list(tensors(model.use()))


def converted(kind: type[Convolved]) -> Convolved:
    """The module with static int8 layers, and regions where its forward is understood."""
    model = make(kind)
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
    torchquant.prepare_(model, config, filter_fn=lambda module, name: True)
    # Other methods are no reason for other ranges, smaller values fit.
    torchquant.calibrate(model, [X, X[:1]], progress=False)
    torchquant.convert_(model)
    return model


def agree(got: list[Tensor], wanted: list[Tensor], cosine: float) -> None:
    """Values of a quantized and of the float module."""
    assert len(got) == len(wanted) > 0
    for index, (mine, real) in enumerate(zip(got, wanted, strict=True)):
        assert mine.shape == real.shape and mine.dtype == real.dtype, f"value {index}"
        if not real.numel() or not real.is_floating_point():
            continue
        assert torch.equal(mine.isnan(), real.isnan())
        pair = mine.double().flatten(), real.double().flatten()
        found = 1.0 if torch.equal(*pair) else float(torch.cosine_similarity(*pair, 0))
        assert found > cosine, f"value {index}: cosine {found} to float"


def check_static(kind: type[Convolved], mode: str) -> None:
    """The converted module, and the same without programs, and the float module."""
    model = converted(kind)
    apart = copy.deepcopy(model)
    got = used(model, mode)
    agree(got, used(make(kind), mode), kind.cosine)
    without = mock.patch("torchquant.chains.region.may_use_kernels", lambda inputs: False)
    with without:
        for index, pair in enumerate(zip(got, used(apart, mode), strict=True)):
            assert_same_bits(*pair, f"value {index}")


def check_dynamic(kind: type[Convolved], mode: str) -> None:
    """quantize_ with and without fused activations, and the float module."""
    plain, fused, apart = make(kind), make(kind), make(kind)
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    every: Callable[..., bool] = lambda module, name: True  # noqa: E731
    torchquant.quantize_(fused, config, filter_fn=every)
    torchquant.quantize_(apart, config, filter_fn=every, fusion=APART)
    got, other = used(fused, mode), used(apart, mode)
    filled = [index for index, one in enumerate(other) if one.numel()]
    mine, alone = ([values[index] for index in filled] for values in (got, other))
    assert_agree(mine, alone, alone, exact=False)
    agree(got, used(plain, mode), kind.cosine)


__all__ = [
    "CONVOLVED",
    "C",
    "Convolved",
    "X",
    "check_dynamic",
    "check_static",
    "converted",
    "make",
    "used",
]
