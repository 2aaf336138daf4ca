"""Wrong arguments of the linear layers in plain torch."""

import re

import pytest
import torch

from torchquant.functional import (
    linear_dynamic,
    linear_static,
    quantize_bias,
    quantized_linear,
    shift_bias,
)

X, W = torch.zeros(2, 6, dtype=torch.int8), torch.zeros(4, 6, dtype=torch.int8)
SCALES = {"input_scale": 1.0, "weight_scale": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantized_linear(X.float(), W, **SCALES),
            TypeError,
            "quantized_linear: input must be int8 or uint8, got float32 [2, 6]; quantize it first "
            "(quantize), or use linear_static or linear_dynamic, which take float input",
        ),
        (
            lambda: quantized_linear(X[0, 0], W, **SCALES),
            ValueError,
            "quantized_linear: input must have shape [..., K], got a 0-dimensional tensor",
        ),
        (
            lambda: quantized_linear(X, W[:, :5], **SCALES),
            ValueError,
            "quantized_linear: weight must be int8 [N, K] with K = 6, got int8 [4, 5]",
        ),
        (
            lambda: quantized_linear(X, W.float(), **SCALES),
            TypeError,
            "quantized_linear: weight must be int8 [N, K] with K = 6, got float32 [4, 6]",
        ),
        (
            lambda: quantized_linear(X, W.to("meta"), **SCALES),
            ValueError,
            "quantized_linear: weight must be on the input's device cpu, got meta; "
            "move it with .to(device)",
        ),
        (
            lambda: quantized_linear(X, W, torch.zeros(3), **SCALES),
            ValueError,
            "quantized_linear: bias must have shape [N] with N = 4, got [3]",
        ),
        (
            lambda: quantized_linear(X, W, torch.zeros(4).double(), **SCALES),
            TypeError,
            "quantized_linear: bias must be float32, bfloat16, float16 or int32, got float64 [4]; "
            "convert it with .to()",
        ),
        (
            lambda: quantized_linear(X, W, input_scale=torch.ones(3), weight_scale=1.0),
            ValueError,
            "quantized_linear: input_scale must have shape [1] or [2, 1] or [2], got [3]",
        ),
        (
            lambda: quantized_linear(X, W, input_scale=1.0, weight_scale=torch.ones(4, 1)),
            ValueError,
            "quantized_linear: weight_scale must have shape [1] or [4], got [4, 1]",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, input_zero_point=200),
            ValueError,
            "quantized_linear: input_zero_point must be from -128 to 127, got 200",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, weight_zero_point=torch.zeros(4)),
            TypeError,
            "quantized_linear: weight_zero_point must be int32, got float32 [4]; "
            "convert it with .to()",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, output_dtype=torch.int8),
            TypeError,
            "quantized_linear: output_dtype must be float32, bfloat16 or float16 without "
            "output_scale, got int8; pass output_scale for an integer result",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, output_scale=1.0, output_dtype=torch.half),
            TypeError,
            "quantized_linear: output_dtype must be int8 or uint8 with output_scale, "
            "got float16; leave output_scale out for a float result",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, output_scale=1.0, output_bits=1),
            ValueError,
            "quant_range: bits must be an integer from 2 to 8, got 1",
        ),
        (
            lambda: quantized_linear(
                X, W, **SCALES, output_scale=1.0, output_bits=2, output_zero_point=2
            ),
            ValueError,
            "quantized_linear: output_zero_point must be from -2 to 1, got 2",
        ),
        (
            lambda: quantized_linear(X, W, **SCALES, activation="swish"),
            ValueError,
            "quantized_linear: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
            "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'swish'",
        ),
        (
            lambda: linear_dynamic(X, W, 1.0),
            TypeError,
            "linear_dynamic: input must be float32, bfloat16 or float16, got int8 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: linear_dynamic(X.float(), W, 1.0, bias=torch.zeros(4, dtype=torch.int32)),
            TypeError,
            "linear_dynamic: bias must be float32, bfloat16 or float16, got int32 [4]; "
            "convert it with .to()",
        ),
        (
            lambda: linear_static(X.float(), torch.ones(2), None, W, 1.0),
            ValueError,
            "linear_static: input_scale must have shape [1], got [2]",
        ),
        (
            lambda: quantize_bias(torch.zeros(2, 2), 1.0, 1.0),
            ValueError,
            "quantize_bias: bias must have shape [N], got [2, 2]",
        ),
        (
            lambda: shift_bias(torch.zeros(3, dtype=torch.int32), W, 1),
            ValueError,
            "shift_bias: qbias must have shape [N] and qweight [N, K], got [3] and [4, 6]",
        ),
        (
            lambda: shift_bias(torch.full((4,), 2**31 - 1, dtype=torch.int32), W + 1, -1),
            ValueError,
            "shift_bias: the shifted bias must fit into int32, got 2147483653; "
            "pass the unshifted bias to quantized_linear instead",
        ),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
