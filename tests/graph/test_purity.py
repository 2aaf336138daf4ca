"""Which forwards may run, or may run between two layers: read from bytecode, never tried."""

import functools
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.graph.purity import effect_of, is_pure, may_run
from torchquant.graph.trace import Untraceable, trace

CACHE: dict[str, Any] = {}
LOG: list[Any] = []


class Computes(nn.Module):
    scale: ClassVar[float] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) * self.scale + self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).to(x.dtype)


class Inherits(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        Path("written").touch()
        return x


class Prints(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        print("forward")
        return super().forward(input)


class Caches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        CACHE["x"] = x
        return x


class Logs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(x)
        return x


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return x


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class HelperPrints(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        print(x)
        return x


class ParentPrints(Prints):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OtherMethodOfTheParent(HelperPrints):
    def forward(self, x: Tensor) -> Tensor:
        return super().helper(x)


class Property(nn.Module):
    @property
    def scale(self) -> float:
        LOG.append("scale")
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class WritesElsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, 1, out=x)


EFFECTS = (
    *(Writes, Caches, Logs, Counts, Draws, HelperPrints, OtherMethodOfTheParent, Property),
    WritesElsewhere,
)


@pytest.mark.parametrize("cls", EFFECTS)
def test_effects_are_seen(cls: Any) -> None:
    assert not is_pure(cls())
    assert not may_run(cls())


@pytest.mark.parametrize("cls", [Prints, ParentPrints])
def test_effects_beside_the_parent_s_forward_are_seen(cls: Any) -> None:
    assert not may_run(cls(4))


def test_what_only_computes() -> None:
    assert is_pure(Computes())
    assert may_run(Computes())
    assert may_run(Inherits(4))
    assert not is_pure(nn.BatchNorm1d(4))
    assert not is_pure(nn.Sequential(Counts()))


def test_work_in_place_is_seen() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=True)

    assert not is_pure(InPlace())
    assert is_pure(InPlace(), in_place=True)


def generated(source: str, **names: Any) -> type[nn.Module]:
    """A module whose forward was made by exec, in variables that name no module."""
    variables: dict[str, Any] = {"F": F, "torch": torch, **names}
    exec(source, variables)
    assert variables["forward"].__module__ in (None, "builtins")
    return type("Generated", (nn.Module,), {"forward": variables["forward"]})


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def test_forwards_that_belong_to_no_module() -> None:
    computes = generated("def forward(self, x):\n    return F.relu(x) + 1")
    draws = generated("def forward(self, x):\n    return x * draw()", draw=random.random)
    assert is_pure(computes()) and may_run(computes()) and effect_of(computes()) is None
    assert not is_pure(draws()) and not may_run(draws()) and effect_of(draws()) is not None


@pytest.mark.parametrize(
    "forward",
    [
        decorated(Computes.forward),
        functools.partialmethod(Computes.forward),
        staticmethod(F.relu),
        functools.partial(F.relu),
        torch.relu,
    ],
    ids=["wrapped", "partialmethod", "static", "partial", "builtin"],
)
def test_forwards_of_other_types_are_refused(forward: Any) -> None:
    module = type("Other", (nn.Module,), {"forward": forward})()
    assert not may_run(module)
    with pytest.raises(Untraceable, match="may do more than compute"):
        trace(module, lambda child: True)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        LOG.append("linear")
        return super().forward(input)


class Norm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        LOG.append("norm")
        return super().forward(input)


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append("activation")
        return F.gelu(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.norm = nn.Linear(64, 64), Linear(64, 64), Norm(64)
        self.act = Activation()

    def forward(self, x: Tensor) -> Tensor:
        LOG.append("model")
        return self.norm(self.other(self.act(self.fc(x))))


@pytest.mark.parametrize(
    "verb",
    [torchquant.quantize_, torchquant.prepare_qat_, torchquant.replace_norms_],
    ids=lambda verb: verb.__name__,
)
def test_verbs_run_no_code_with_effects(verb: Any) -> None:
    model = Model()
    LOG.clear()
    verb(model)
    assert LOG == []
    model(torch.randn(2, 64))
    assert LOG == ["model", "activation", "linear", "norm"]
