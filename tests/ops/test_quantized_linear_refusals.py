"""Wrong arguments of quantized_linear raise."""

import pytest
import torch
from support.operands import (
    BIAS,
    CALL,
    WEIGHT,
    K,
    N,
    Q,
    X,
)
from support.refusals import Refusals, check_refusal

from torchquant import PackedWeight, quantized_linear

REFUSALS: Refusals = {
    # quantized_linear
    "quantized_linear: not a tensor": (
        lambda: quantized_linear([1], WEIGHT, **CALL),
        TypeError,
        "quantized_linear: input must be a torch.Tensor, got list",
    ),
    "quantized_linear: float input": (
        lambda: quantized_linear(X, WEIGHT, **CALL),
        TypeError,
        f"quantized_linear: input must be int8 or uint8, got float32 [6, {K}]; quantize it first "
        "(quantize), or use linear_static or linear_dynamic, which take float input",
    ),
    "quantized_linear: scalar": (
        lambda: quantized_linear(Q[0, 0], WEIGHT, **CALL),
        ValueError,
        "quantized_linear: input must have shape [..., K], got a 0-dimensional tensor",
    ),
    "quantized_linear: weight's shape": (
        lambda: quantized_linear(Q, WEIGHT.t(), **CALL),
        ValueError,
        f"quantized_linear: weight must be int8 [N, K] with K = {K}, got int8 [{K}, {N}]",
    ),
    "quantized_linear: float weight": (
        lambda: quantized_linear(Q, WEIGHT.float(), **CALL),
        TypeError,
        f"quantized_linear: weight must be int8 [N, K] with K = {K}, got float32 [{N}, {K}]",
    ),
    "quantized_linear: no weight": (
        lambda: quantized_linear(Q, None, **CALL),
        TypeError,
        f"quantized_linear: weight must be int8 [N, K] with K = {K}, got NoneType None",
    ),
    "quantized_linear: weight packed for another input": (
        lambda: quantized_linear(Q[:, :-1], PackedWeight.pack(WEIGHT), **CALL),
        ValueError,
        f"quantized_linear: weight must be packed from int8 [N, K] with K = {K - 1}, "
        f"got [{N}, {K}]",
    ),
    "quantized_linear: bias's type": (
        lambda: quantized_linear(Q, WEIGHT, BIAS.double(), **CALL),
        TypeError,
        "quantized_linear: bias must be float32, bfloat16, float16 or int32, "
        f"got float64 [{N}]; "
        "convert it with .to()",
    ),
    "quantized_linear: bias's shape": (
        lambda: quantized_linear(Q, WEIGHT, BIAS[:2], **CALL),
        ValueError,
        f"quantized_linear: bias must have shape [N] with N = {N}, got [2]",
    ),
    "quantized_linear: input_scale": (
        lambda: quantized_linear(Q, WEIGHT, input_scale=torch.ones(2), weight_scale=1.0),
        ValueError,
        "quantized_linear: input_scale must have shape [1] or [6, 1] or [6], got [2]",
    ),
    "quantized_linear: input_zero_point": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, input_zero_point=200),
        ValueError,
        "quantized_linear: input_zero_point must be from -128 to 127, got 200",
    ),
    "quantized_linear: weight_scale": (
        lambda: quantized_linear(Q, WEIGHT, input_scale=1.0, weight_scale=0.0),
        ValueError,
        "quantized_linear: weight_scale must be finite and at least 2^-126, got 0.0",
    ),
    "quantized_linear: weight_zero_point": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, weight_zero_point=torch.zeros(N)),
        TypeError,
        f"quantized_linear: weight_zero_point must be int32, got float32 [{N}]; "
        "convert it with .to()",
    ),
    "quantized_linear: output_dtype": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, output_dtype=torch.int8),
        TypeError,
        "quantized_linear: output_dtype must be float32, bfloat16 or float16 without "
        "output_scale, got int8; pass output_scale for an integer result",
    ),
    "quantized_linear: output_dtype with output_scale": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, output_scale=1.0, output_dtype=torch.half),
        TypeError,
        "quantized_linear: output_dtype must be int8 or uint8 with output_scale, "
        "got float16; leave output_scale out for a float result",
    ),
    "quantized_linear: output_bits": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, output_scale=1.0, output_bits=9),
        ValueError,
        "quant_range: bits must be an integer from 2 to 8, got 9",
    ),
    "quantized_linear: output_zero_point": (
        lambda: quantized_linear(
            Q, WEIGHT, **CALL, output_scale=1.0, output_bits=4, output_zero_point=8
        ),
        ValueError,
        "quantized_linear: output_zero_point must be from -8 to 7, got 8",
    ),
    "quantized_linear: activation": (
        lambda: quantized_linear(Q, WEIGHT, **CALL, activation="mish"),
        ValueError,
        "quantized_linear: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
        "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'mish'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_raise_and_change_nothing(call, error, message):
    check_refusal(call, error, message)
