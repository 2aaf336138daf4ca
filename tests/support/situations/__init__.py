"""Ways to write and to use a module in which code sees what a layer returned.

A situation is a module with a method ``use`` that runs the module and returns every value that its
code sees. The float module, the quantized one, and the quantized one in which each layer computes
only its own output have to agree.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from support import assert_same_bits
from torchquant import Fusion, prepare_qat_, quantize_
from torchquant.nn import call_guard, caller, linear_layer, projections

WIDTH = 64
# Large enough for GELU to differ clearly from the identity.
X = 3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(7))
APART = Fusion(activations=False, projections=False)
ALL: list[type["Situation"]] = []
MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Situation(nn.Module):
    """A module, and how it is used; each subclass with a method ``use`` is a test."""

    fuses: ClassVar[bool] = True  # False: no offer to fuse is expected
    trains: ClassVar[bool] = True  # False: not a situation of training
    modes: ClassVar[tuple[str, ...]] = tuple(MODES)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "use" in vars(cls):
            ALL.append(cls)

    def before(self) -> None:
        """What happens before the conversion."""


class Activated(Situation):
    """A layer and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(WIDTH, WIDTH), nn.GELU()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.act(self.fc(x))


class Projected(Situation):
    """Two layers on one tensor; computed together they have the same bits."""

    trains = False

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        k = self.k(x)
        return q, k


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, Tensor):
        yield value.detach().clone()
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)


def make(kind: type[Situation], relu: bool = False) -> Situation:
    """A module with the same values each time."""
    torch.manual_seed(0)
    model = kind().eval()
    if relu:
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if type(child) is nn.GELU:
                    module._modules[name] = nn.ReLU()
    model.before()
    return model


@contextmanager
def no_activations_fused() -> Iterator[None]:
    with mock.patch("torchquant.convert.qat.fuse_activations", lambda *a, **k: []):
        yield


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read frames and modules with torchquant.nn.caller in place of csrc/caller.cpp."""
    for module in (call_guard, linear_layer, projections):
        for name in ("caller", "follower", "holder", "is_plain_activation", "local", "module_at"):
            if name in vars(module):
                monkeypatch.setattr(module, name, getattr(caller, name))


def used(model: Situation, mode: str = "no_grad") -> list[Tensor]:
    """The tensors that the module's code sees."""
    with MODES[mode]():
        return list(tensors(model.use()))


def offers(report: Any) -> bool:
    """True if something may be fused."""
    return any(fusion.action == "fused" for fusion in report.fusions)


def assert_agree(got: list[Tensor], apart: list[Tensor], plain: list[Tensor], exact: bool) -> None:
    """Values of the quantized module, of the one without fusion, and of the float module."""
    assert len(got) == len(apart) == len(plain) > 0
    for index, (mine, alone, real) in enumerate(zip(got, apart, plain, strict=True)):
        assert mine.shape == alone.shape == real.shape
        assert mine.dtype == alone.dtype == real.dtype
        if exact:
            assert_same_bits(mine, alone, f"value {index}")
        elif mine.dtype.is_floating_point:
            assert torch.equal(mine.isnan(), alone.isnan())
            scale = float(alone.nan_to_num().abs().max()) or 1.0
            difference = float((mine - alone).nan_to_num().abs().max()) / scale
            eps = torch.finfo(mine.dtype).eps
            assert difference <= max(1e-5, 2 * eps), f"value {index} differs by {difference}"
        if not real.isnan().any():
            cosine = torch.cosine_similarity(mine.double().flatten(), real.double().flatten(), 0)
            assert cosine > 0.999, f"value {index}: cosine {float(cosine)} to float"


def check(kind: type[Situation], mode: str) -> None:
    """quantize_ with and without fusion, and the float module."""
    plain, fused, apart = make(kind), make(kind), make(kind)
    report = quantize_(fused)
    quantize_(apart, fusion=APART)
    assert offers(report) == kind.fuses, report.fusions
    exact = issubclass(kind, Projected)
    assert_agree(used(fused, mode), used(apart, mode), used(plain, mode), exact)


def check_trained(kind: type[Situation], mode: str) -> None:
    """prepare_qat_ with and without fusion, and the float module; ReLU is exact."""
    plain, fused, apart = (make(kind, relu=True) for _ in range(3))
    prepare_qat_(fused)
    with no_activations_fused():
        prepare_qat_(apart)
    assert_agree(used(fused, mode), used(apart, mode), used(plain, mode), exact=True)


__all__ = [
    "ALL",
    "APART",
    "MODES",
    "WIDTH",
    "Activated",
    "Projected",
    "Situation",
    "X",
    "assert_agree",
    "check",
    "check_trained",
    "make",
    "no_activations_fused",
    "offers",
    "tensors",
    "used",
]
