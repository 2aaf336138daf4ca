"""GPTQ and AWQ of a single layer, and the mistakes of a course's own versions."""

import pytest
import torch
from torch import nn

from torchquant import compat
from torchquant.algorithms.gptq_rounding import gptq
from torchquant.algorithms.integer_weight import nearest
from torchquant.configs import Weights
from torchquant.scheme import PerGroup


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    data = [torch.randn(20, 64) * torch.logspace(-1, 1, 64) for _ in range(3)]
    return model, data


@torch.no_grad()
def test_hessian_is_a_mean_over_all_inputs():
    model, data = model_and_data()
    x = torch.cat([model[:2](batch) for batch in data])
    found = compat.collect_hessian(model, data, "2")
    torch.testing.assert_close(found, 2 / 60 * x.t() @ x)
    torch.testing.assert_close(compat.collect_hessian(model, data * 2, "2"), found)
    assert not model[2]._forward_hooks


@torch.no_grad()
def test_a_layer_by_gptq():
    model, data = model_and_data()
    hessian, weight = compat.collect_hessian(model, data, "2"), model[2].weight
    for bits, size, symmetric in ((4, 32, True), (3, None, False)):
        found = compat.quantize_layer(weight, hessian, bits, size, symmetric)
        part = Weights(bits, symmetric) if size is None else None
        part = part or Weights(bits, symmetric, granularity=PerGroup(size))
        assert torch.equal(found.qweight, gptq(weight, hessian, part).integers.qweight)
        x = torch.cat([model[:2](batch) for batch in data])
        errors = [
            float((x @ (one.dequantize() - weight).t()).square().sum())
            for one in (found, nearest(weight, part))
        ]
        assert errors[0] < 0.6 * errors[1]


@torch.no_grad()
def test_a_layer_by_awq():
    model, data = model_and_data()
    weight, x = model[0].weight, torch.cat(data)
    importance = compat.activation_importance(model, data, "0")
    torch.testing.assert_close(importance, x.abs().mean(0))
    found = compat.search_alpha(weight, x, bits=3, group_size=32)
    assert len(found.errors) == 21, "0 and 1 are tried"
    rounded = compat.quantize_scaled(weight, found.scales, bits=3, group_size=32)
    error = (x @ (rounded - weight).t()).square().mean()
    assert float(error) == pytest.approx(min(found.errors), rel=1e-3), "of the outputs"
    assert min(found.errors) < 0.95 * found.errors[0]


def test_a_layer_that_no_data_reaches():
    model, _ = model_and_data()
    nan = [torch.full((2, 64), float("nan"))]
    with pytest.raises(ValueError, match="collect_hessian: data must reach 0 with finite inputs"):
        compat.collect_hessian(model, nan, "0")
    with pytest.raises(ValueError, match="activation_importance: data must reach 0"):
        compat.activation_importance(model, nan, "0")
    with pytest.raises(ValueError, match="collect_hessian: loader must have batches"):
        compat.collect_hessian(model, [], "0")
