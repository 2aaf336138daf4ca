"""What algorithms found for a layer reaches the quantized layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchquant
from torchquant import QuantizedLinear
from torchquant.convert.adjustment import (
    Adjustment,
    adjust,
    adjustment_of,
    apply_adjustment,
    float_weight,
    is_adjusted,
)


def layer_with_integers(bits_up=1):
    """A layer, and integers that are rounded the other way for some weights."""
    torch.manual_seed(0)
    module = nn.Linear(64, 32)
    layer = QuantizedLinear.from_float(module)
    scale = layer.weight_scale
    position = module.weight.detach() / scale.unsqueeze(1)
    other = torch.where(position > position.round(), position.ceil(), position.floor())
    chosen = torch.where(torch.rand(position.shape) < 0.5, other, position.round())
    qweight = (bits_up * chosen.clamp(-127, 127)).to(torch.int8)
    adjust(module, Adjustment(qweight, scale.clone(), torch.linspace(-1, 1, 32)))
    return module, qweight


def test_integers_and_bias_reach_the_layer():
    module, qweight = layer_with_integers()
    layer = QuantizedLinear.from_float(module)
    assert not torch.equal(layer.qweight, qweight)
    apply_adjustment(module, layer)
    assert torch.equal(layer.qweight, qweight)
    assert torch.equal(layer.bias.detach(), torch.linspace(-1, 1, 32))
    assert isinstance(layer.bias, nn.Parameter)
    assert not torch.equal(module.bias, layer.bias), "the float layer keeps its own"
    expected = layer.dequantized() @ torch.ones(64) + layer.bias
    torch.testing.assert_close(layer(torch.ones(1, 64))[0], expected)


def test_without_an_adjustment_nothing_changes():
    module = nn.Linear(64, 32)
    layer = QuantizedLinear.from_float(module)
    before = copy.deepcopy(layer.state_dict())
    bias = layer.bias
    apply_adjustment(module, layer)
    assert layer.bias is bias
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_weight_that_has_changed_is_refused():
    module, _ = layer_with_integers()
    with torch.no_grad():
        module.weight[3, 5] += 0.05
    layer = QuantizedLinear.from_float(module)
    with pytest.raises(ValueError, match=r"the weight must be the one for which adaround_"):
        apply_adjustment(module, layer)


def test_a_weight_of_another_shape_is_refused():
    module, _ = layer_with_integers()
    module.weight = nn.Parameter(torch.randn(32, 128))
    layer = QuantizedLinear.from_float(module)
    with pytest.raises(ValueError, match=r"it has changed since; call adaround_ again"):
        apply_adjustment(module, layer)


def test_weights_cut_off_by_a_smaller_scale_are_accepted():
    module, _ = layer_with_integers()
    scale = QuantizedLinear.from_float(module).weight_scale / 2
    qweight = (module.weight.detach() / scale.unsqueeze(1)).round().clamp(-127, 127)
    adjust(module, Adjustment(qweight.to(torch.int8), scale))
    layer = QuantizedLinear.from_float(module)
    apply_adjustment(module, layer)
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.qweight, qweight.to(torch.int8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_model_have_the_adjustment(copied):
    model = nn.Sequential(layer_with_integers()[0])
    other = copied(model)[0]
    assert torch.equal(adjustment_of(other).qweight, adjustment_of(model[0]).qweight)
    assert list(other.state_dict()) == ["weight", "bias"]


def test_half_precision():
    module, qweight = layer_with_integers()
    module = module.bfloat16()
    layer = QuantizedLinear.from_float(module)
    apply_adjustment(module, layer)
    assert torch.equal(layer.qweight, qweight)
    assert layer.bias.dtype == torch.bfloat16


def test_is_adjusted():
    assert is_adjusted(layer_with_integers()[0])
    module = nn.Linear(2, 2)
    assert not is_adjusted(module)
    adjust(module, Adjustment())
    assert not is_adjusted(module)


def test_float_weight_of_a_convolution():
    conv = nn.Conv1d(4, 6, 3, groups=2, dtype=torch.bfloat16)
    assert float_weight(conv).shape == (6, 2, 3)
    assert float_weight(conv).dtype == torch.float32


def test_a_bias_that_changed_after_its_correction_is_refused() -> None:
    layer = nn.Linear(64, 32)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(32, 64))
    torchquant.prepare_(model, filter_fn=["0", "2"])
    torchquant.calibrate(model, [torch.randn(8, 64)], progress=False)
    adjust(layer, Adjustment(bias=torch.ones(32)))
    with torch.no_grad():
        layer.bias.fill_(7.0)
    with pytest.raises(ValueError, match="0 cannot be converted: the bias must be the one that"):
        torchquant.convert_(model)
    adjust(layer, Adjustment(bias=torch.ones(32)))
    torchquant.convert_(model)
    assert torch.equal(model[0].bias, torch.ones(32))
