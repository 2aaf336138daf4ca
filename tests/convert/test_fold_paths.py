"""A batch norm is folded only if no method, branch or argument makes another path."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.chain_models import images, with_statistics
from support.one_path_models import CLOSED
from support.path_models import OPEN, Way
from torch import Tensor, nn

import torchquant
from torchquant.convert.fold import fold_batch_norms
from torchquant.convert.regions import find
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.report import FusionReport


def fold(model: nn.Module, regions: bool) -> list[FusionReport]:
    found = find(model, lambda module: isinstance(module, nn.Conv2d))
    return fold_batch_norms(model, found.regions if regions else [], lambda layer: True)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = [*value.values()]
    found = value if isinstance(value, (list, tuple)) else [value]
    return [torch.as_tensor(one) for one in found]


def require_equal(model: nn.Module, reference: nn.Module, ways: Sequence[Way]) -> None:
    x = images(2, 8)
    for way in ways:
        with torch.no_grad():
            pairs = zip(tensors(way(model, x)), tensors(way(reference, x)), strict=True)
            assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in pairs)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("name", OPEN)
def test_another_path_keeps_the_norm(name: str, regions: bool) -> None:
    make, ways = OPEN[name]
    model = with_statistics(make())
    reference = copy.deepcopy(model)
    rows = fold(model, regions)
    assert all(row.action == "not fused" and row.reason for row in rows)
    assert not any(isinstance(module, FoldedNorm) for module in model.modules())
    require_equal(model, reference, [*ways, lambda m, x: m(x)])


@pytest.mark.parametrize("name", CLOSED)
def test_one_path_is_folded(name: str) -> None:
    make, count, ways = CLOSED[name]
    model = with_statistics(make())
    reference = copy.deepcopy(model)
    rows = fold(model, regions=True)
    assert [row.action for row in rows] == ["fused"] * count, rows
    require_equal(model, reference, ways)


@pytest.mark.parametrize("name", OPEN)
def test_layers_in_training_keep_the_norm(name: str) -> None:
    model, config = OPEN[name][0](), torchquant.QATConfig(activations="static")
    report = torchquant.prepare_qat_(model, config, filter_fn="*")
    assert all(row.action == "not fused" for row in report.foldings)


REASONS = {
    "norms by argument": "Domains.forward passes to norms the output of the Conv2d",
    "norm by argument": "Optional.forward passes to relu the output of the Conv2d",
    "method that forward calls": "Stem.stem returns the output of the Conv2d",
    "slice": "Sliced.low calls a part of features",
    "bias": "Biased.again reads its bias",
    "passed to a function": "Passed.again passes to applied the model",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    rows = torchquant.prepare_(with_statistics(OPEN[name][0]())).foldings
    assert [row.reason for row in rows] == [REASONS[name]] * len(rows)
    assert rows
