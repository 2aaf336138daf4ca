"""Which values of a forward are int8, which calls make one step, and where chains break."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.chain_models import Functional, Gated, Nested, UNet, images, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.operations import AdaptiveAvgPool, Concat, Flatten, Layer, MaxPool, Upsample
from torchquant.chains.plan import Plan
from torchquant.chains.schedule import Segment, make_schedule
from torchquant.configs import Dynamic, Static
from torchquant.convert.regions import is_leaf
from torchquant.graph.in_place import without_in_place
from torchquant.graph.trace import Trace, trace


def planned(
    model: nn.Module, x: Tensor, given: Mapping[str, Static] | None = None
) -> tuple[Trace, Plan]:
    model.eval()
    record = without_in_place(trace(model, is_leaf), model)
    facts = FirstBatch(model, record)
    assert facts.compare(model.forward, [x]) == ""
    layers = {
        name: Static()
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d)
    }
    return record, facts.plan(layers if given is None else given)


def steps(record: Trace, plan: Plan) -> list[str]:
    """Each step as the names of its calls, with a residual in brackets."""
    found = []
    for group in plan.groups.values():
        names = [record.calls[call].target.rpartition(":")[2] for call in group.calls]
        extra = "" if group.residual is None else f" [{record.calls[group.residual].target}]"
        found.append(" ".join(names) + extra)
    return found


class Block(nn.Module):
    """``relu(second(relu(first(x))) + shortcut)`` in several ways of writing it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.side, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.first(x)))
        side = self.side(x)
        if self.way == "relu":
            y = self.relu(self.drop(y) + side)
        elif self.way == "no relu":
            y = side + y
        elif self.way == "read twice":
            y = self.relu(y + side) * y
        elif self.way == "relu before":
            y = self.relu(y) + side
        elif self.way == "returned":
            return y + side
        elif self.way == "broadcast":
            y = y + y.mean([2, 3], keepdim=True)
        elif self.way == "scaled":
            y = y * 2 + side
        return self.head(y)


STEPS = {
    "relu": ["first relu", "second", "side add relu [second]", "head"],
    "no relu": ["first relu", "second", "side add [second]", "head"],
    "read twice": ["first relu", "second", "side add relu [second]", "mul", "head"],
    "relu before": ["first relu", "second relu", "side add [relu]", "head"],
    "returned": ["first relu", "second", "side add [second]"],
    "broadcast": ["first relu", "second", "mean", "head"],
    "scaled": ["first relu", "second", "mul", "side add [mul]", "head"],
}


@pytest.mark.parametrize("way", STEPS)
def test_steps_of_a_block(way: str) -> None:
    record, plan = planned(Block(way), images(2, 8))
    named = [step.replace("operator:", "") for step in steps(record, plan)]
    assert sorted(named) == sorted(STEPS[way])


def test_results_that_are_returned_are_float() -> None:
    record, plan = planned(Block("returned"), images(2, 8))
    int8 = {record.calls[index].target for index in plan.edge_of}
    assert int8 == {"x", "relu"}


def test_pass_through_steps_share_a_scale() -> None:
    record, plan = planned(UNet(), images(2))
    pools = [i for i, op in enumerate(plan.operations) if isinstance(op, (MaxPool, Upsample))]
    assert len(pools) == 3
    for index in pools:
        (read,) = record.calls[index].reads()
        assert plan.edge_of[index] == plan.edge_of[read] and index not in plan.points
    assert sum(isinstance(op, Concat) for op in plan.operations) == 2


def test_programs_are_as_long_as_possible() -> None:
    """The transposed convolution runs between two programs; the rest of a U-Net is in them."""
    model = UNet()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    record, plan = planned(model, images(2))
    schedule = [
        item
        for item in make_schedule(record, plan)
        if isinstance(item, Segment) or record.calls[item].kind != "input"
    ]
    first, wide, second = schedule
    assert isinstance(first, Segment) and isinstance(second, Segment)
    assert isinstance(wide, int) and record.calls[wide].target == "wide"
    assert wide in second.reads and len(first.writes) == 2


@pytest.mark.parametrize("cls", [Functional, Nested, Gated])
def test_pools_and_flattening(cls: Callable[[], nn.Module]) -> None:
    _, plan = planned(cls(), images(2))
    kinds = {type(op) for op in plan.operations}
    assert AdaptiveAvgPool in kinds
    if cls is not Gated:
        assert Flatten in kinds
    assert {op.path for op in plan.operations if isinstance(op, Layer)} == set(plan.layers)


def test_layers_that_read_one_value_differently_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.first(x), self.second(x)], 1))

    given = {"first": Static(), "second": Static(bits=4), "head": Static()}
    _, plan = planned(Two(), images(2), given)
    assert set(plan.layers) == {"first", "head"}
    assert plan.dropped == {"second": "it reads the value of first, which has other activations"}


def test_values_between_layers_have_8_bits() -> None:
    few = Static(bits=4, symmetric=True)
    layers = ("first", "second", "side", "head")
    record, plan = planned(Block("no relu"), images(2, 8), dict.fromkeys(layers, few))
    bits = {record.calls[i].target: plan.edges[edge].bits for i, edge in plan.edge_of.items()}
    assert bits == {"x": 4, "relu": 4, "second": 8, "operator:add": 4}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(F.relu(x))


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8)], ids=str)
def test_rows_of_linear_layers(shape: tuple[int, ...]) -> None:
    record, plan = planned(Mlp(), torch.randn(shape))
    assert steps(record, plan) == ["norm", "up gelu", "down add relu [norm]", "out"]
    assert {group.rows for group in plan.groups.values()} == {len(shape) > 2}


def test_a_linear_layer_on_an_image_is_no_step() -> None:
    class OnWidth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x)))

    record, plan = planned(OnWidth(), images(2, 8))
    assert steps(record, plan) == ["conv relu"]
    assert "4 dimensions" in next(iter(plan.in_float.values()))


def test_the_report_names_what_is_float() -> None:
    model = with_statistics(UNet())
    config = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")
    report = torchquant.prepare_(model, config, example_inputs=images(1))
    (region,) = report.regions
    assert region.action == "observed" and region.share is not None and 0.9 < region.share < 1
    (only,) = region.breaks
    assert (only.name, only.reason) == ("wide", "ConvTranspose2d")
    assert region.flops - region.int8_flops == only.flops > 0
    assert "float at ConvTranspose2d" in str(region)
    assert str(region) in " ".join(str(report).split())  # which is printed on several lines
    assert [fold.action for fold in report.foldings] == ["fused"] * 10


def test_a_report_without_a_batch() -> None:
    model = with_statistics(Functional())
    report = torchquant.prepare_(model)
    assert str(report.regions[0]).startswith("found: the model (Functional): 4 layers;")


def test_only_static_layers_make_regions() -> None:
    model: Any = with_statistics(Functional())
    torchquant.quantize_(model, torchquant.configs.QuantizationConfig(activations=Dynamic()))
    assert "forward" not in vars(model)
