"""Integers, scales and zero points of a weight: the bits of quantize_, and what they represent."""

import pytest
import torch
from torch import nn

import torchquant
from torchquant import PerAxis, PerGroup, PerTensor, Weights, functional
from torchquant.algorithms.integer_weight import IntegerWeight, check_weights, nearest, rounded
from torchquant.configs import Dynamic, QuantizationConfig, Static


def weight_of(outputs=32, inputs=80, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearest_has_the_bits_of_quantize(bits, symmetric, granularity, dtype):
    part = Weights(bits, symmetric, granularity=granularity)
    model = nn.Sequential(nn.Linear(80, 32, dtype=dtype))
    found = nearest(model[0].weight, part)
    torchquant.quantize_(model, QuantizationConfig(part, Dynamic()), filter_fn="0", strict=True)
    state = model.state_dict()
    layer = model[0]
    integers = getattr(layer, "integers", None)
    assert torch.equal(found.qweight, layer.qweight if integers is None else integers)
    assert torch.equal(found.scale, state["0.qweight_scale"])
    assert (found.zero_point is None) == symmetric
    if not symmetric:
        assert torch.equal(found.zero_point.int(), state["0.qweight_zero_point"].int())
    assert torch.equal(found.dequantize().to(dtype), layer.weight)


def test_nearest_has_the_bits_of_a_convolution_per_tensor():
    config = QuantizationConfig(Weights(granularity=PerTensor()), Static())
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    found = nearest(model[0].weight.flatten(1), config.weights)
    torchquant.prepare_(model, config, filter_fn="0")
    torchquant.calibrate(model, [torch.randn(2, 8, 6, 6)])
    torchquant.convert_(model)
    state = model.state_dict()
    assert torch.equal(found.qweight, state["0.qweight"].flatten(1))
    assert torch.equal(found.scale, state["0.qweight_scale"])


def test_one_zero_point_for_the_whole_tensor():
    part = Weights(4, symmetric=False, granularity=PerTensor())
    weight = weight_of() + 2
    scale, zero_point = functional.choose_qparams(weight, bits=4, symmetric=False)
    integers = functional.quantize(weight, scale, zero_point, qmin=-8, qmax=7)
    found = nearest(weight, part)
    assert torch.equal(found.qweight, integers)
    assert torch.equal(found.dequantize(), functional.dequantize(integers, scale, zero_point))
    assert found.scale.shape == found.zero_point.shape == (32,)


def test_the_last_group_may_be_shorter():
    found = nearest(weight_of(inputs=80), Weights(4, granularity=PerGroup(32)))
    assert found.scale.shape == (32, 3)
    values = found.qweight.float() * found.scale.repeat_interleave(32, 1)[:, :80]
    assert torch.equal(found.dequantize(), values)


def test_scales_of_groups_do_not_tell_their_size():
    """80 inputs in 3 groups may be groups of 27 to 39, so the size is kept beside the scales."""
    qweight, scale = torch.ones(1, 80, dtype=torch.int8), torch.tensor([[1.0, 2.0, 3.0]])
    ends = [IntegerWeight(qweight, scale, None, size).dequantize()[0, 30] for size in (30, 32)]
    assert [float(end) for end in ends] == [2.0, 1.0]


def test_rounded_takes_scales_as_they_are():
    part = Weights(4, symmetric=False, granularity=PerGroup(40))
    weight = weight_of()
    plain = nearest(weight, part)
    halved = rounded(weight, part, plain.scale / 2, plain.zero_point)
    assert torch.equal(halved.scale, plain.scale / 2)
    assert halved.zero_point is plain.zero_point
    assert int(halved.qweight.min()) == -8 and int(halved.qweight.max()) == 7
    again = rounded(weight, part, plain.scale, plain.zero_point)
    assert torch.equal(again.qweight, plain.qweight)


@pytest.mark.parametrize(
    ("weight", "weights", "error", "message"),
    [
        (torch.ones(2, 2).int(), Weights(), TypeError, "weight must be a float tensor, got torch"),
        (None, Weights(), TypeError, "weight must be a float tensor, got NoneType"),
        (torch.ones(2, 2), QuantizationConfig(), TypeError, "a configuration has it as config.we"),
        (torch.ones(2), Weights(), ValueError, r"shape \[outputs, inputs\] and elements, got \[2"),
        (torch.ones(2, 0), Weights(), ValueError, r"and elements, got \[2, 0\]"),
        (torch.ones(2, 2), Weights(granularity=PerAxis(1)), ValueError, r"got PerAxis\(axis=1\)"),
    ],
)
def test_refusals(weight, weights, error, message):
    with pytest.raises(error, match=f"someone: .*{message}"):
        check_weights("someone", weight, weights)
    with pytest.raises(error, match=message):
        nearest(weight, weights)
