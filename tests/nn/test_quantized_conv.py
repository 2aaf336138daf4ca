"""QuantizedConv1d and QuantizedConv2d: the bits of their output, from and to float."""

import copy
from typing import Any

import pytest
import torch
from support import FLOATS, INF, NAN, assert_same_bits, check_everywhere, floats, leaf
from support.conv_modules import (
    CONFIGS,
    SIZES,
    SIZES_2D,
    expected_output,
    float_conv,
    input_of,
    quantized,
)
from support.layers import assert_same_state
from torch import Tensor, nn

from torchquant import PerAxis, PerTensor, QuantizationConfig, functional
from torchquant.nn import QuantizedConv2d


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", SIZES)
def test_forward_has_the_bits_of_the_specification(name: str, config: QuantizationConfig) -> None:
    layer, x = quantized(name, config), input_of(name)
    want = expected_output(layer, name, x)
    check_everywhere(lambda: layer(x).detach(), want, what=name)
    assert_same_bits(layer(x[1]).detach(), expected_output(layer, name, x[1]))
    assert_same_bits(layer(x[1:]).detach(), want[1:])  # a sample alone and in a batch
    assert layer(x[:0]).shape == (0, *want.shape[1:])


@pytest.mark.parametrize("name", SIZES_2D)
def test_the_memory_format_changes_no_bit(name: str) -> None:
    x = input_of(name)
    last = x.contiguous(memory_format=torch.channels_last)
    for config in ("default", "static"):
        layer = quantized(name, CONFIGS[config])
        with torch.no_grad():
            want, got = layer(x), layer(last)
        assert want.is_contiguous() and got.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(got, want)


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
def test_activations(activation: str) -> None:
    for config in ("default", "static"):
        layer, x = quantized("3x3", CONFIGS[config], activation), input_of()
        assert_same_bits(layer(x).detach(), expected_output(layer, "3x3", x))
        assert layer.activation == activation


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_of_input_and_layer(dtype: torch.dtype) -> None:
    for config in ("default", "static"):
        layer = quantized("3x3", CONFIGS[config])
        x = input_of(dtype=dtype)
        assert_same_bits(layer(x).detach(), expected_output(layer, "3x3", x))
        layer.to(dtype)
        assert layer.qweight_scale.dtype == torch.float32 and layer.dtype == dtype
        assert_same_bits(layer(x).detach(), expected_output(layer, "3x3", x))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_a_sample_with_nan_or_infinity() -> None:
    x = input_of()
    plain = x.clone()
    x[0, 3, 2, 2], x[1, 0, 0, 0] = NAN, INF
    dynamic, static = quantized(), quantized("3x3", CONFIGS["static"])
    assert dynamic(x).isnan().all()
    assert static(x)[0].isnan().all() and static(x)[1].isfinite().all()
    assert_same_bits(static(x).detach(), expected_output(static, "3x3", x))
    x[1] = plain[1]
    assert_same_bits(dynamic(x)[1].detach(), dynamic(plain)[1].detach())


def float_gradients(layer: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the input of the layer's float form."""
    x = leaf(x)
    layer.to_float()(x).backward(grad)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", SIZES)
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    for config in ("default", "static"):
        layer, x = quantized(name, CONFIGS[config]), leaf(input_of(name).clamp(-1, 1))
        y = layer(x)
        grad = torch.randn_like(y)
        wanted = float_gradients(layer, x, grad)
        layer.zero_grad()  # the float layer has the same bias
        y.backward(grad)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, wanted, atol=1e-3, rtol=1e-3)
        if layer.bias is not None:
            assert layer.bias.grad is not None
            sums = grad.sum([0, *range(2, grad.dim())])
            torch.testing.assert_close(layer.bias.grad, sums, atol=1e-3, rtol=1e-3)
        assert [key for key, _ in layer.named_parameters() if "placeholder" not in key] == (
            [] if layer.bias is None else ["bias"]
        )


# ---------------------------------------------------------------- from and to float


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("config", ["default", "w4a6", "per_tensor"])
def test_from_float_has_the_integers_of_the_specification(config: str, dtype: torch.dtype) -> None:
    conv = float_conv("groups", dtype=dtype)
    layer = QuantizedConv2d.from_float(conv, CONFIGS[config])
    part = CONFIGS[config].weights
    whole = part.granularity == PerTensor()
    weight = conv.weight.detach()
    qmin, qmax = part.range
    limits = weight.float().abs().amax() if whole else weight.float().abs().amax((1, 2, 3))
    scale, _ = functional.qparams_from_range(
        -limits.reshape(-1), limits.reshape(-1), qmin=qmin, qmax=qmax, symmetric=True
    )
    scale = scale.expand(16).contiguous()
    q = functional.quantize(weight, scale, None, qmin=qmin, qmax=qmax, granularity=PerAxis(0))
    assert_same_bits(layer.qweight, q)
    assert_same_bits(layer.qweight_scale, scale)
    assert layer.bias is conv.bias and layer.dtype == dtype


@pytest.mark.parametrize("name", SIZES)
def test_to_float_has_the_sizes_and_the_values(name: str) -> None:
    conv = float_conv(name).eval()
    layer = quantized(name)
    back = layer.to_float()
    assert repr(back) == repr(conv) and type(back) is type(conv) and back.training
    assert back.bias is layer.bias
    assert_same_bits(back.weight.detach(), layer.dequantized())
    error = (back.weight - conv.weight).detach().abs() / layer.qweight_scale.reshape(
        -1, *[1] * (conv.weight.dim() - 1)
    )
    assert float(error.max()) <= 0.5001
    again = type(layer).from_float(back)
    assert_same_state(again, layer)


def test_the_weight_can_be_read() -> None:
    layer, x = quantized("groups"), input_of("groups")
    assert layer.weight.shape == (16, 4, 3, 3) and layer.weight.dtype == torch.float32
    got = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)
    assert_same_bits(got.detach(), layer.to_float()(x).detach())
    with pytest.raises(RuntimeError, match="weight must not be changed"):
        layer.weight.mul_(2)
    with pytest.raises(TypeError, match="QuantizedConv2d: weight must not be assigned"):
        layer.weight = torch.zeros(16, 4, 3, 3)


def test_sizes_that_change_later_are_used() -> None:
    """Segmentation models replace strides by dilations after the backbone was built."""
    layer, conv = quantized("stride"), float_conv("stride")
    other = nn.Conv2d(8, 16, (3, 2), dilation=(2, 1))
    other.load_state_dict(conv.state_dict())
    layer.stride, layer.padding, layer.dilation = (1, 1), (0, 0), (2, 1)
    x = input_of("stride")
    assert_same_bits(layer(x).detach(), QuantizedConv2d.from_float(other)(x).detach())


def test_from_float_keeps_modes_and_does_not_change_the_float_layer() -> None:
    for training in (True, False):
        conv = float_conv().train(training).requires_grad_(training)
        before = copy.deepcopy(conv.state_dict())
        layer = QuantizedConv2d.from_float(conv)
        assert layer.training is training and layer.bias is not None
        assert layer.bias.requires_grad is training
        assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())


def test_the_probe_is_an_input() -> None:
    for name in SIZES:
        layer = quantized(name)
        x = layer.probe(3, torch.Generator().manual_seed(0))
        assert x.shape[0] == 3 and layer(x).shape[:2] == (3, 16)


def test_repr() -> None:
    assert repr(quantized("reflect", CONFIGS["static"], "relu")) == (
        "QuantizedConv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), "
        "padding_mode='reflect', bias=True, int8 per channel, activations int8 per tensor with "
        "zero point, activation=relu)"
    )
    assert "activations int8 per sample" in repr(quantized())


def test_many_random_weights_in_any_layout() -> None:
    conv = float_conv()
    plain = QuantizedConv2d.from_float(conv)
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    assert_same_state(QuantizedConv2d.from_float(conv), plain)
    conv.weight = nn.Parameter(floats(16, 8, 3, 6)[..., ::2])
    assert_same_bits(
        QuantizedConv2d.from_float(conv).qweight,
        QuantizedConv2d.from_tensors(
            conv.weight.detach().contiguous(), None, conv, CONFIGS["default"]
        ).qweight,
    )
