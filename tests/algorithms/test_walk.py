"""The walk: what it does where layers, blocks or statistics are unusual."""

from typing import Any

import pytest
import torch
from support.compressed_models import SIZE, Block, compressed_by_hand, decoder, stages_of, tokens
from torch import Tensor, nn

import torchquant
from torchquant import gptq_
from torchquant.algorithms import walk
from torchquant.algorithms.block_inputs import BlockInputs
from torchquant.algorithms.gptq_rounding import gptq
from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.least_error import clip_search

INT4 = torchquant.IntxWeightOnlyConfig(4, group_size=32)


def integers(weight: Tensor, hessian: Tensor, weights: Any) -> Any:
    return gptq(weight, hessian, weights).integers


def assert_has(model: nn.Module, found: dict[str, Any]) -> None:
    for name, one in found.items():
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.integers, one.qweight), name


def test_statistics_that_do_not_fit_are_collected_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))
            self.linears = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in "abc"})

        def forward(self, x: Tensor) -> Tensor:
            pairs = zip(self.norms, self.linears.values(), strict=True)
            return sum(linear(norm(x)) for norm, linear in pairs)  # type: ignore[return-value]

    torch.manual_seed(0)
    model, batches = Branches(), [torch.randn(70, SIZE) for _ in range(2)]
    stages = [tuple(f"linears.{name}" for name in "abc")]
    expected = compressed_by_hand(model, batches, INT4, stages, integers)
    collect = walk._Walk._collect
    for most, sizes in ((1, [1, 1, 1]), (2 * SIZE**2 * 4 * 2, [2, 1]), (1 << 30, [3])):
        monkeypatch.setattr(walk, "_MOST_MEMORY", most)
        counts: list[int] = []

        def count(self: Any, inputs: Any, *rest: Any, counts: Any = counts) -> Any:
            counts.append(len(inputs))
            return collect(self, inputs, *rest)

        net = Branches()
        net.load_state_dict(model.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(walk._Walk, "_collect", count)
            gptq_(net, INT4, batches, progress=False)
        assert counts == sizes
        assert_has(net, expected)


def test_a_layer_keeps_one_lane_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Hessian.add
    counts: list[int] = []

    def count(self: Hessian, batch: int, columns: Tensor) -> None:
        add(self, batch, columns)
        counts.append(len(self._lanes))

    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(SIZE, SIZE)), [torch.randn(9, SIZE) for _ in range(17)]
    expected = compressed_by_hand(model, batches, INT4, [("0",)], integers)
    monkeypatch.setattr(Hessian, "add", count)
    gptq_(model, INT4, batches, progress=False)
    assert counts == [1] * 17
    assert_has(model, expected)


class Together(nn.Module):
    """Two layers that read one tensor, except in batches with negative sums."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x if x.sum() > 0 else x * 3 + 1)


class Again(Together):
    """In batches with negative sums, the second of three layers reads the tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x) + self.a(x)
        return (y if x.sum() > 0 else y + self.a(x)) + self.c(x)


@pytest.mark.parametrize(("kind", "inputs"), [(Together, [210, 210]), (Again, [280, 210, 210])])
def test_layers_that_share_a_tensor_in_some_batches_only_have_their_own_statistics(
    kind: type[Together], inputs: list[int]
) -> None:
    torch.manual_seed(0)
    model = kind()
    batches = [torch.rand(70, SIZE), -torch.rand(70, SIZE), torch.rand(70, SIZE)]
    stage = tuple(name for name, _ in model.named_children())
    expected = compressed_by_hand(model, batches, INT4, [stage], integers)
    report = gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)
    assert [row.inputs for row in report] == inputs


def test_blocks_of_two_kinds_with_the_same_names_have_their_own_levels() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    class Sum(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    model, batches = nn.Sequential(Sum(), Chain(), Sum()), [torch.randn(70, SIZE)]
    stages = [("0.a", "0.b"), ("1.a",), ("1.b",), ("2.a", "2.b")]
    expected = compressed_by_hand(model, batches, INT4, stages, integers)
    gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).relu()))

    torch.manual_seed(0)
    model, batches = Twice(), [torch.randn(70, SIZE)]
    expected = compressed_by_hand(model, batches, INT4, [("a",), ("b",)], integers)
    report = gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)
    assert [row.inputs for row in report] == [140, 70]


def test_blocks_that_cannot_run_alone_are_run_as_a_whole() -> None:
    class Counting(nn.Module):
        """Each block reads a list to which the blocks before it have added."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            for layer in self.layers:
                layer.seen = seen
                x = layer(x)
            return x

    class Reading(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.seen.append(x)
            return super().forward(torch.stack(self.seen).sum(0))

    torch.manual_seed(0)
    model = Counting().eval()
    for place in range(2):
        model.layers[place] = Reading()
    batches = [torch.randn(4, 24, SIZE) for _ in range(2)]
    stages = stages_of(model)[:-1]
    expected = compressed_by_hand(model, batches, INT4, stages, integers)
    report = gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)
    assert report.notes[0] == (
        "The model is run as a whole for each layer of the blocks from layers.0 on, because a "
        "block that runs alone gives other values or raises an error."
    )


def test_blocks_that_raise_when_they_run_alone_are_run_as_a_whole() -> None:
    class Reading(Block):
        """A block that the model has to allow to run."""

        allowed = False

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            if not Reading.allowed:
                raise RuntimeError("not inside of the model")
            return super().forward(x)

    class Allowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Reading() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            Reading.allowed = True
            try:
                for layer in self.layers:
                    x = layer(x)
            finally:
                Reading.allowed = False
            return x

    torch.manual_seed(0)
    model = Allowing().eval()
    batches = [torch.randn(4, 24, SIZE)]
    expected = compressed_by_hand(model, batches, INT4, stages_of(model)[:-1], integers)
    report = gptq_(model, INT4, batches, progress=False)
    assert_has(model, expected)
    assert "gives other values or raises an error" in report.notes[0]


def test_of_a_large_convolution_some_places_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_COLUMNS", 120)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 64))
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    report = gptq_(model, config, [torch.randn(4, 64, 6, 6)] * 3, progress=False)
    assert report["0"].inputs == 120, "of 12 samples with 16 places each"
    assert report["2"].inputs == 12


def test_a_weight_that_is_read_without_a_call_is_rounded_before_the_layers_behind_it() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.behind, self.read = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(nn.functional.linear(x, self.read.weight, self.read.bias))

    torch.manual_seed(0)
    model, batches = Reading(), [torch.randn(70, SIZE)]
    layer = torchquant.QuantizedIntxLinear
    found = clip_search(model.read.weight.detach(), INT4.weights)
    read = layer.from_integers(found.qweight, found.scale, None, model.read.bias, INT4)
    hessian = Hessian(SIZE)
    with torch.no_grad():
        hessian.add(0, read(batches[0]).t().unsqueeze(0))
    expected = integers(model.behind.weight.detach(), hessian.value(), INT4.weights)
    report = gptq_(model, INT4, batches, progress=False)
    assert report["read"].reason.startswith("no input reached it")
    assert_has(model, {"read": found, "behind": expected})


def test_finished_blocks_are_skipped_for_the_layers_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, skipped = decoder(), []
    skip = BlockInputs.skipped

    def count(self: BlockInputs, batch: int) -> Any:
        skipped.append(batch)
        return skip(self, batch)

    monkeypatch.setattr(BlockInputs, "skipped", count)
    gptq_(model, INT4, tokens(3), progress=False)
    assert skipped == [0, 0, 1, 2], "to find the levels of the head, and for its statistics"


def test_references_from_lists_see_the_layers_and_are_restored() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
            self.order = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x).relu()
            return x

    torch.manual_seed(0)
    model, x = Listed(), torch.randn(70, SIZE)
    layers = [*model.order]

    def fails(net: nn.Module, batch: Tensor) -> Tensor:
        if type(model.a) is not nn.Linear:
            assert model.order[0] is model.a
            raise KeyError("after the first layer")
        return net(batch)

    with pytest.raises(KeyError, match="after the first layer"):
        gptq_(model, INT4, [x], forward=fails, progress=False)
    assert model.order == layers == [model.a, model.b]
    gptq_(model, INT4, [x], progress=False)
    assert model.order == [model.a, model.b]
