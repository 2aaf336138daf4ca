"""The specification of convolutions, against torch's convolution of integers in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NAN, assert_same_bits, floats, integers, positive
from support.conv_layers import Convolution, convolutions
from torch import Tensor
from torch.nn import functional as F

from torchquant import functional

SIZES = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
X, W, SCALE, BIAS = integers(2, 4, 5, 6), integers(3, 4, 2, 3, seed=1), positive(3), floats(3)


def exact(conv: Convolution, q: Tensor, zero: int) -> Tensor:
    """In float64; padding adds nothing."""
    both = [n for d in reversed(range(len(conv.size))) for n in conv.padding[2 * d : 2 * d + 2]]
    function = F.conv2d if q.dim() == 4 else F.conv1d
    x = F.pad(q.double() - zero, both)
    more = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    return function(x, conv.weight.double(), **more)


@settings(max_examples=60)
@given(conv=convolutions(), zero=st.sampled_from((-128, 0, 127)))
def test_sums_are_exact(conv: Convolution, zero: int) -> None:
    q = integers(*conv.input_shape)
    got = functional.conv_static(q, 1.0, zero, conv.weight, 1.0, **conv.sizes)
    assert torch.equal(got, exact(conv, q, zero).float())


def test_every_rounding() -> None:
    """fmaf of the sum, the residual, the activation, the output's integers; by hand."""
    conv = Convolution(2, 4, 3, (5, 6), (2, 3), (1, 1), (0,) * 4, (1, 1))
    acc = exact(conv, X, 3)
    factor = (torch.tensor(0.05) * SCALE).reshape(1, -1, 1, 1)
    y = functional.fmaf(acc.float(), factor, BIAS.reshape(1, -1, 1, 1))
    residual = integers(*acc.shape, seed=5)
    y = y + (residual.int() + 7).float() * torch.tensor(0.3)
    y = functional.silu(y)
    q = (torch.round(y * (torch.tensor(1.0) / 0.2)) - 5).clamp(-100, 90).to(torch.int8)
    got = functional.conv_static(
        X,
        0.05,
        3,
        conv.weight,
        SCALE,
        BIAS,
        **conv.sizes,
        activation="silu",
        residual=residual,
        residual_scale=0.3,
        residual_zero_point=-7,
        output_dtype=torch.int8,
        output_scale=0.2,
        output_zero_point=-5,
        output_qmin=-100,
        output_qmax=90,
    )
    assert torch.equal(got, q)


def test_a_pointwise_convolution_is_a_linear_layer() -> None:
    x, w = floats(2, 4, 3, 5), W[:, :, :1, :1]
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    one = functional.linear_static(rows, 0.05, 3, w.flatten(1), SCALE, None, BIAS)
    got = functional.conv_static(x, 0.05, 3, w, SCALE, BIAS, **SIZES)
    assert_same_bits(got, one.reshape(2, 3, 5, 3).permute(0, 3, 1, 2))


def test_dynamic_is_static_with_the_range_of_each_sample() -> None:
    x = floats(3, 4, 5, 6)
    q, scale, zero = functional.quantize_per_token(x.flatten(1), symmetric=False)
    got = functional.conv_dynamic(x, W, SCALE, BIAS, **SIZES, symmetric=False)
    side = (scale.flatten(), zero.flatten(), W, SCALE, BIAS)
    assert_same_bits(got, functional.conv_static(q.reshape(x.shape), *side, **SIZES))


def test_nan() -> None:
    x = floats(3, 4, 5, 6)
    x[1, 0, 0, 0] = NAN
    got = functional.conv_static(x, 0.05, 3, W, SCALE, **SIZES)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()
    x[1, 0, 0, 0] = math.inf
    assert not functional.conv_static(x, 0.05, 3, W, SCALE, **SIZES).isnan().any()
    assert functional.conv_dynamic(x, W, SCALE, **SIZES)[1].isnan().all()


REFUSED = {
    "float weight": ({"weight": W.float()}, TypeError, "weight must be int8 [O, C / groups, kh"),
    "dimensions": (
        {"input": X[0]},
        ValueError,
        "input must have shape [N, C, H, W], got [4, 5, 6]",
    ),
    "uint8 input": ({"input": X.view(torch.uint8)}, TypeError, "input must be int8, float32, bfl"),
    "channels": ({"input": X[:, :3]}, ValueError, "input must have 4 channels for weight [3, 4, 2"),
    "groups": ({"groups": 2}, ValueError, "a multiple of groups = 2, got int8 [3, 4, 2, 3]"),
    "stride": ({"stride": [1, 0]}, ValueError, "stride must be 2 ints of at least 1, got [1, 0]"),
    "padding": (
        {"padding": [1, 1]},
        ValueError,
        "padding must be 4 ints of at least 0, got [1, 1]",
    ),
    "kernel": ({"dilation": [9, 1]}, ValueError, "input must be at least as large as the kernel"),
    "scale": ({"input_scale": torch.ones(3)}, ValueError, "input_scale must have shape [1] or [2]"),
    "bias": ({"bias": BIAS[:2]}, ValueError, "bias must have shape [3], got [2]"),
    "residual": ({"residual": X}, ValueError, "residual must have the result's shape [2, 3, 4, 4]"),
    "residual scale": (
        {"residual": torch.zeros(2, 3, 4, 4), "residual_scale": 1.0},
        ValueError,
        "residual_scale must be given exactly where residual is int8, got float32 [2, 3, 4, 4]",
    ),
    "scale alone": (
        {"residual_scale": 1.0},
        ValueError,
        "residual_scale must come with a residual",
    ),
    "output": ({"output_dtype": torch.int8}, TypeError, "got int8 without output_scale"),
    "output range": (
        {"output_dtype": torch.int8, "output_scale": 1.0, "output_qmin": 9, "output_qmax": 9},
        ValueError,
        "output_qmin < output_qmax must lie within -128 .. 127, got 9 and 9",
    ),
    "activation": ({"activation": "no"}, ValueError, "activation must be one of none, relu"),
}


@pytest.mark.parametrize(("change", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "input": X,
        "input_scale": 1.0,
        "input_zero_point": 0,
        "weight": W,
        "weight_scale": SCALE,
        **SIZES,
    }
    functional.conv_static(**arguments)
    with pytest.raises(error, match=r"^conv_static: ") as raised:
        functional.conv_static(**arguments | change)
    assert text in str(raised.value)


def test_refusals_of_the_input_range() -> None:
    with pytest.raises(ValueError, match="input_qmin < input_qmax must lie within -128"):
        functional.conv_static(X.float(), 1.0, 0, W, SCALE, **SIZES, input_qmin=4, input_qmax=3)
    with pytest.raises(TypeError, match="conv_dynamic: input must be float32, bfloat16 or float16"):
        functional.conv_dynamic(X, W, SCALE, **SIZES)
