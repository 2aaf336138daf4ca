"""Layers that do not depend on each other are compressed together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compressed_models import STAGES, Block, Experts
from torch import Tensor, nn

from torchquant.algorithms.levels import Level, levels_of


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def levels(model: nn.Module, x: Tensor, **options: bool) -> list[Level]:
    with torch.no_grad():
        return levels_of(linears(model), lambda: model(x), **options)


def test_a_transformer_block() -> None:
    model = Block()
    found = levels(model, torch.randn(2, 5, 64))
    assert [level.names for level in found] == [*STAGES]
    assert found[0].inputs == (("q", "k", "v"),)
    assert all(level.once for level in found)
    assert levels(model, torch.randn(2, 5, 64), by_order=True) == found
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parallel_branches_are_one_level_with_inputs_of_their_own() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.up, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
            self.down, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            branch = self.out(self.value(self.norms[0](x)))
            return x + branch + self.down(self.up(self.norms[1](x)).relu())

    found = levels(Parallel(), torch.randn(3, 8))
    assert [level.inputs for level in found] == [(("value",), ("up",)), (("out",), ("down",))]
    by_order = levels(Parallel(), torch.randn(3, 8), by_order=True)
    assert [level.names for level in by_order] == [("value",), ("out",), ("up",), ("down",)]


def test_all_experts_are_compressed_together() -> None:
    torch.manual_seed(0)
    found = levels(Experts(), torch.randn(64, 64))
    assert [level.names for level in found] == [
        ("router",),
        ("experts.0.up", "experts.1.up", "experts.2.up"),
        ("experts.0.down", "experts.1.down", "experts.2.down"),
    ]
    assert [level.once for level in found] == [True, False, False], "one expert saw no row"


def test_an_expert_that_is_called_with_an_empty_tensor_has_the_levels_of_the_others() -> None:
    class Always(Experts):
        def forward(self, x: Tensor) -> Tensor:
            chosen = self.router(x).argmax(-1)
            result = x.clone()
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                result = result.index_add(0, rows, expert["down"](expert["up"](x[rows]).relu()))
            return result

    torch.manual_seed(0)
    found = levels(Always(), torch.randn(64, 64))
    assert [level.names for level in found] == [
        ("router",),
        ("experts.0.up", "experts.1.up", "experts.2.up"),
        ("experts.0.down", "experts.1.down", "experts.2.down"),
    ]
    assert [level.once for level in found] == [True, False, False], "one expert saw no row"


def test_a_layer_that_no_batch_reaches_comes_first() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x = torch.ones(1, 4)
    found = levels_of(linears(model), lambda: model["a"](x))
    assert found == [Level((("b",),), False), Level((("a",),), True)]
    assert levels_of(linears(model), lambda: None) == [Level((("a",), ("b",)), False)]


def repeated(model: nn.ModuleDict, x: Tensor) -> Tensor:
    return model["b"](model["a"](model["a"](x)))


def with_nan(model: nn.ModuleDict, x: Tensor) -> Tensor:
    return model["b"](model["a"](x * float("nan")))


def changed_between(model: nn.ModuleDict, x: Tensor) -> Tensor:
    x = x.clone()
    y = model["a"](x)
    x.add_(1)
    return y + model["b"](x)


def refusing(model: nn.ModuleDict, x: Tensor) -> Tensor:
    y = model["a"](x)
    if not torch.equal(y, model["a"](x)) or not torch.equal(
        y, nn.functional.linear(x, *model["a"].parameters())
    ):
        raise ValueError("changed")
    return model["b"](y)


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (repeated, [(("a",),), (("b",),)]),
        (with_nan, [(("a",),), (("b",),)]),
        (changed_between, [(("a",), ("b",))]),
        (refusing, [(("a",),), (("b",),)]),
    ],
)
def test_unusual_forwards(call: Callable[[Any, Tensor], Tensor], inputs: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with torch.no_grad():
        found = levels_of(linears(model), lambda: call(model, torch.ones(2, 4)))
    assert [level.inputs for level in found] == inputs
    assert found[0].once is (call not in (repeated, refusing))
