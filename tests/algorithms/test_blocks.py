"""Blocks of a model are found by what a forward does, and can be run alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compressed_models import SIZE, Block, decoder, tokens
from torch import Tensor, nn

from torchquant.algorithms.between import Between
from torchquant.algorithms.block_inputs import BlockInputs, runs_alone
from torchquant.algorithms.blocks import Blocks, find_blocks


class Net(nn.Module):
    """Blocks in a ModuleList, which ``call`` runs."""

    def __init__(self, call: Callable[[Net, Tensor], Any], blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def found(model: nn.Module, batch: Any = None) -> list[Blocks]:
    x = torch.randn(2, 5, SIZE) if batch is None else batch
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        return find_blocks(model.eval(), lambda: model(x), linears)


def one_by_one(model: Net, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def with_other_masks(model: Net, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x, mask=torch.ones(5, 5, dtype=torch.bool))
    return x


def twice(model: Net, x: Tensor) -> Tensor:
    return one_by_one(model, one_by_one(model, x))


def backwards(model: Net, x: Tensor) -> Tensor:
    for layer in reversed(model.layers):
        x = layer(x)
    return x


def with_code_between(model: Net, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x) + 1
    return x


def changed_in_place(model: Net, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
        x += 1
    return x


def not_all(model: Net, x: Tensor) -> Tensor:
    return model.layers[1](model.layers[0](x))


NAMES = ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    ("call", "blocks"),
    [
        (one_by_one, [Blocks(NAMES, alike=True, single=True)]),
        (with_other_masks, [Blocks(NAMES, alike=False, single=True)]),
        (twice, []),
        (backwards, []),
        (with_code_between, []),
        (changed_in_place, []),
        (not_all, []),
    ],
)
def test_blocks_are_what_the_forward_calls_one_after_the_other(call: Any, blocks: Any) -> None:
    model = Net(call)
    assert found(model) == blocks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_that_call_the_next_one_are_no_blocks() -> None:
    class Calling(Block):
        def __init__(self, after: list[nn.Module]) -> None:
            super().__init__()
            self.after = after  # a list, so that it is no submodule

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return self.after[0](x) if self.after else x

    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            second = Calling([])
            self.layers = nn.ModuleList([Calling([second]), second])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    assert found(Recursive()) == []


class Pair(nn.Module):
    """A block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self.block(hidden), None


def test_blocks_may_return_tuples_and_take_named_arguments() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList(Pair() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.h:
                x = block(hidden=x)[0]
            return x

    model = Pairs()
    (blocks,) = found(model)
    assert blocks == Blocks(("h.0", "h.1"), alike=True, single=False)
    x = torch.randn(1, 5, SIZE)
    with torch.no_grad():
        assert runs_alone(blocks, model, lambda batch: model(x), 0)


def test_sequences_in_a_sequence_are_one_and_others_come_in_call_order() -> None:
    def linears() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = nn.Sequential(linears(), nn.ReLU(), linears())
    (blocks,) = found(model, torch.ones(1, 4))
    assert blocks.names == ("0.0", "0.1", "1", "2.0", "2.1")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = (nn.Sequential(linears(), linears()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + 1)

    names = [blocks.names[0] for blocks in found(Two(), torch.ones(1, 4))]
    assert names == ["first.0.0", "second.0.0"]


def test_a_layer_in_two_blocks_or_few_layers_are_no_blocks() -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4)) == []
    layers = [nn.Linear(4, 4) for _ in range(4)]
    assert found(nn.Sequential(*layers, layers[0]), torch.ones(1, 4)) == []


class Cache:
    """Remembers what it was given, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def add(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)])

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x.mul_(2)  # changes its input in place
        return x + self.linear[1](cache.add(self.linear[0](x)))


class CachingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Caching() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, cache = x + 1, Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x


def test_each_run_of_a_block_has_its_own_copy_of_what_a_block_changes() -> None:
    torch.manual_seed(0)
    model, xs = CachingNet(), torch.randn(2, 3, SIZE)
    (blocks,) = found(model, xs[0])
    with torch.no_grad():
        inputs = BlockInputs(blocks, model, lambda batch: model(xs[batch]), [0, 1])
        runs = [inputs.run(0, 1) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    with torch.no_grad():
        alone = runs_alone(blocks, model, lambda batch: model(xs[batch]), 0)
    assert not alone, "each block adds to what the blocks before it have in the cache"


def test_a_block_that_changes_its_input_in_place_is_recorded_before() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)])

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            x.mul_(factor)
            return self.linears[1](self.linears[0](x)) + x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(InPlace() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            for place, layer in enumerate(self.layers):
                x = layer(x, torch.tensor(2.0 + place))
            return x

    model, x = Net(), torch.randn(3, SIZE)
    (blocks,) = found(model, x)
    assert not blocks.alike
    with torch.no_grad():
        assert runs_alone(blocks, model, lambda batch: model(x), 0)


def test_finished_blocks_are_not_computed_again() -> None:
    model, batches = decoder(), tokens(2)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        (blocks,) = find_blocks(model, lambda: model(batches[0]), linears)
        inputs = BlockInputs(blocks, model, lambda batch: model(batches[batch]), [0, 1])
        for number in range(2):
            inputs.advance(number)
        calls: list[Any] = []
        model.layers[0].q.register_forward_hook(lambda *_: calls.append(None))
        for number, batch in enumerate(batches):
            with inputs.skipped(number):
                skipped = model(batch)
            assert not calls
            assert torch.equal(skipped, model(batch))
            calls.clear()
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_in_blocks_are_found_in_a_run_of_the_outer_block() -> None:
    model = Net(one_by_one, 2)
    for place in range(2):
        model.layers[place] = Net(with_other_masks, 2)
    (outer,) = found(model)
    x = torch.randn(2, 5, SIZE)
    with torch.no_grad():
        inputs = BlockInputs(outer, model, lambda batch: model(x), [0])
        run = partial(inputs.run, 0)
        linears = [m for m in model.layers[0].modules() if isinstance(m, nn.Linear)]
        (inner,) = find_blocks(model.layers[0], partial(run, 0), linears)
        assert runs_alone(inner, model.layers[0], run, 0)
    assert inner == Blocks(("layers.0", "layers.1"), alike=False, single=True)


def test_a_batch_that_does_not_reach_the_blocks_is_left_out() -> None:
    def call(model: Net, x: Tensor) -> Tensor:
        return one_by_one(model, x) if x.sum() > 0 else x

    model, x = Net(call), torch.ones(1, 2, SIZE)
    with torch.no_grad():
        (blocks,) = found(model, x)
        inputs = BlockInputs(blocks, model, lambda batch: model(x * (-1) ** batch), range(4))
    assert inputs.batches == [0, 2]


def test_values_in_files_follow_shape_and_dtype(tmp_path: Path) -> None:
    values = Between(tmp_path)
    for value in (torch.randn(3, 4), torch.randn(3, 4), torch.randn(5).bfloat16(), torch.ones(0)):
        values[2] = value
        assert torch.equal(values[2], value)
        assert values[2].dtype == value.dtype
    values.close()
    assert not [*tmp_path.iterdir()]


def test_blocks_whose_values_have_nan_and_infinities_run_alone() -> None:
    model = Net(one_by_one).eval()
    x = torch.randn(2, 5, SIZE)
    x[0, 0, 0] = float("nan")
    blocks = Blocks(NAMES, True, True)
    with torch.no_grad():
        assert runs_alone(blocks, model, lambda batch: model(x), 0)
        assert runs_alone(blocks, model, lambda batch: model(x * float("inf")), 0)
