"""Wrong arguments of the linear operators raise."""

import pytest
import torch
from support.operands import (
    BIAS,
    IN_SCALE,
    INT_BIAS,
    PACKED,
    SCALE,
    WEIGHT,
    ZERO,
    K,
    N,
    Q,
    X,
    dynamic,
    static,
)
from support.refusals import Refusals, check_refusal

from torchquant import ops

WIDE = ops.pack_weight(torch.zeros(1, 65_794, dtype=torch.int8))
DEEP = torch.zeros(1, 65_794, dtype=torch.int8)


REFUSALS: Refusals = {
    # pack_weight, unpack_weight
    "pack_weight: float weight": (
        lambda: ops.pack_weight(X),
        TypeError,
        f"pack_weight: weight must be int8 [out_features, in_features], got float32 [6, {K}]; "
        "quantize it first (torchquant.ops.quantize)",
    ),
    "pack_weight: one dimension": (
        lambda: ops.pack_weight(Q[0]),
        ValueError,
        f"pack_weight: weight must be int8 [out_features, in_features], got int8 [{K}]",
    ),
    "pack_weight: no outputs": (
        lambda: ops.pack_weight(Q[:0]),
        ValueError,
        "pack_weight: weight must have at least one output and between 1 and 8388608 inputs, "
        f"got int8 [0, {K}]",
    ),
    "pack_weight: no inputs": (
        lambda: ops.pack_weight(Q[:, :0]),
        ValueError,
        "pack_weight: weight must have at least one output and between 1 and 8388608 inputs, "
        "got int8 [6, 0]",
    ),
    "pack_weight: too many inputs": (
        lambda: ops.pack_weight(Q[:1, :1].expand(1, 2**23 + 1)),
        ValueError,
        "pack_weight: weight must have at least one output and between 1 and 8388608 inputs, "
        "got int8 [1, 8388609]",
    ),
    "unpack_weight: outputs beyond 32 bits": (
        lambda: ops.unpack_weight(PACKED, 2**63 - 1, K),
        ValueError,
        f"unpack_weight: out_features must be at most {2**31 - 1}, got {2**63 - 1}",
    ),
    "pack_weight: outputs beyond 32 bits": (
        lambda: ops.pack_weight(WEIGHT[:1, :1].expand(2**31, 1)),
        ValueError,
        f"pack_weight: weight must have at most {2**31 - 1} outputs, got int8 [{2**31}, 1]",
    ),
    "unpack_weight: other outputs": (
        lambda: ops.unpack_weight(PACKED, 33, K),
        ValueError,
        f"unpack_weight: packed must be the int8 [3, 2176] result of pack_weight for "
        f"out_features = 33 and in_features = {K}, got int8 [2, 2176]; the last dimension of "
        "input must be in_features",
    ),
    "unpack_weight: other inputs, as long when padded": (
        lambda: ops.unpack_weight(PACKED, N, K + 1),
        ValueError,
        f"unpack_weight: packed was made for out_features = {N}, in_features = {K} (layout 1), "
        f"but this call has out_features = {N}, in_features = {K + 1} (layout 1); "
        "pack the weight again with pack_weight",
    ),
    # int8_mm
    "int8_mm: float input": (
        lambda: ops.int8_mm(X, PACKED, N),
        TypeError,
        f"int8_mm: input must be int8 or uint8, got float32 [6, {K}]; "
        "quantize it first (torchquant.ops.quantize)",
    ),
    "int8_mm: scalar": (
        lambda: ops.int8_mm(Q[0, 0], PACKED, N),
        ValueError,
        "int8_mm: input must have at least 1 dimension, got int8 []",
    ),
    "int8_mm: sums beyond 32 bits": (
        lambda: ops.int8_mm(DEEP, WIDE, 1),
        ValueError,
        "int8_mm: in_features must be at most 65793 for sums that fit int32, got 65794; "
        "split the input along its last dimension and add in int64",
    ),
    # linear_dynamic
    "linear_dynamic: integer input": (
        lambda: dynamic(Q),
        TypeError,
        f"linear_dynamic: input must be float32, bfloat16 or float16, got int8 [6, {K}]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_dynamic: scalar": (
        lambda: dynamic(X[0, 0]),
        ValueError,
        "linear_dynamic: input must have at least 1 dimension, got float32 []",
    ),
    "linear_dynamic: empty rows": (
        lambda: dynamic(X[:, :0]),
        ValueError,
        "linear_dynamic: in_features must be between 1 and 8388608, got 0",
    ),
    "linear_dynamic: rows too long": (
        lambda: dynamic(X[:1, :1].expand(1, 2**23 + 1)),
        ValueError,
        "linear_dynamic: in_features must be between 1 and 8388608, got 8388609",
    ),
    "linear_dynamic: no outputs": (
        lambda: dynamic(out_features=0),
        ValueError,
        "linear_dynamic: out_features must be at least 1, got 0",
    ),
    "linear_dynamic: outputs beyond 32 bits": (
        lambda: dynamic(out_features=2**63 - 1),
        ValueError,
        f"linear_dynamic: out_features must be at most {2**31 - 1}, got {2**63 - 1}",
    ),
    "linear_dynamic: input too short": (
        lambda: dynamic(X[:, :60]),
        ValueError,
        f"linear_dynamic: packed must be the int8 [2, 1152] result of pack_weight for "
        f"out_features = {N} and in_features = 60, got int8 [2, 2176]; the last dimension of "
        "input must be in_features",
    ),
    "linear_dynamic: input a little too short": (
        lambda: dynamic(X[:, :-1]),
        ValueError,
        f"linear_dynamic: packed was made for out_features = {N}, in_features = {K} (layout 1), "
        f"but this call has out_features = {N}, in_features = {K - 1} (layout 1); "
        "pack the weight again with pack_weight",
    ),
    "linear_dynamic: other outputs, as many when padded": (
        lambda: dynamic(out_features=N + 1),
        ValueError,
        f"linear_dynamic: packed was made for out_features = {N}, in_features = {K} (layout 1), "
        f"but this call has out_features = {N + 1}, in_features = {K} (layout 1); "
        "pack the weight again with pack_weight",
    ),
    "linear_dynamic: weight not packed": (
        lambda: dynamic(packed=WEIGHT),
        ValueError,
        f"linear_dynamic: packed must be the int8 [2, 2176] result of pack_weight for "
        f"out_features = {N} and in_features = {K}, got int8 [{N}, {K}]; the last dimension of "
        "input must be in_features",
    ),
    "linear_dynamic: packed weight's type": (
        lambda: dynamic(packed=PACKED.to(torch.int32)),
        TypeError,
        "linear_dynamic: packed must be the int8 result of pack_weight, got int32 [2, 2176]",
    ),
    "linear_dynamic: weight_scale's type": (
        lambda: dynamic(weight_scale=SCALE.bfloat16()),
        TypeError,
        f"linear_dynamic: weight_scale must be float32, got bfloat16 [{N}]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_dynamic: weight_scale's shape": (
        lambda: dynamic(weight_scale=SCALE[:5]),
        ValueError,
        f"linear_dynamic: weight_scale must be float32 [{N}] or [1] with one value per output "
        "channel, got float32 [5]",
    ),
    "linear_dynamic: weight_scale as a column": (
        lambda: dynamic(weight_scale=SCALE.reshape(N, 1)),
        ValueError,
        f"linear_dynamic: weight_scale must be float32 [{N}] or [1] with one value per output "
        f"channel, got float32 [{N}, 1]",
    ),
    "linear_dynamic: weight_zero_point's type": (
        lambda: dynamic(weight_zero_point=ZERO.long()),
        TypeError,
        f"linear_dynamic: weight_zero_point must be int32, got int64 [{N}]; "
        "convert it with .to(torch.int32)",
    ),
    "linear_dynamic: weight_zero_point's shape": (
        lambda: dynamic(weight_zero_point=ZERO[:2]),
        ValueError,
        f"linear_dynamic: weight_zero_point must be int32 [{N}] or [1] with one value per output "
        "channel, got int32 [2]",
    ),
    "linear_dynamic: weight_zero_point's value": (
        lambda: dynamic(weight_zero_point=ZERO + 1000),
        ValueError,
        "linear_dynamic: weight_zero_point must be from -128 to 127, got 1127",
    ),
    "linear_dynamic: bias's type": (
        lambda: dynamic(bias=BIAS.double()),
        TypeError,
        f"linear_dynamic: bias must be float32, bfloat16 or float16, got float64 [{N}]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_dynamic: integer bias": (
        lambda: dynamic(bias=INT_BIAS),
        TypeError,
        f"linear_dynamic: bias must be float32, bfloat16 or float16, got int32 [{N}]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_dynamic: bias's shape": (
        lambda: dynamic(bias=BIAS[:1]),
        ValueError,
        f"linear_dynamic: bias must be float32 [{N}] with one value per output channel, "
        "got float32 [1]",
    ),
    "linear_dynamic: activation": (
        lambda: dynamic(activation="swish"),
        ValueError,
        "linear_dynamic: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
        "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'swish'",
    ),
    "linear_dynamic: output_dtype": (
        lambda: dynamic(output_dtype=torch.int8),
        TypeError,
        "linear_dynamic: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    # linear_static
    "linear_static: input": (
        lambda: static(Q.int()),
        TypeError,
        "linear_static: input must be int8, uint8, float32, bfloat16 or float16, "
        f"got int32 [6, {K}]",
    ),
    "linear_static: scalar": (
        lambda: static(Q[0, 0]),
        ValueError,
        "linear_static: input must have at least 1 dimension, got int8 []",
    ),
    "linear_static: bias's type": (
        lambda: static(bias=BIAS.double()),
        TypeError,
        f"linear_static: bias must be float32, bfloat16, float16 or int32, got float64 [{N}]",
    ),
    "linear_static: bias's shape": (
        lambda: static(bias=INT_BIAS[:3]),
        ValueError,
        f"linear_static: bias must be int32 [{N}] with one value per output channel, got int32 [3]",
    ),
    "linear_static: input_scale's type": (
        lambda: static(scale=IN_SCALE.half()),
        TypeError,
        "linear_static: input_scale must be float32, got float16 [1]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_static: input_scale per row": (
        lambda: static(scale=torch.ones(5)),
        ValueError,
        "linear_static: input_scale must hold one value, or one per row of input [..., 1], "
        f"got float32 [5] for input int8 [6, {K}]",
    ),
    "linear_static: input_scale of other rows": (
        lambda: static(Q.reshape(2, 3, K), scale=torch.ones(3, 2)),
        ValueError,
        "linear_static: input_scale must hold one value, or one per row of input [..., 1], "
        f"got float32 [3, 2] for input int8 [2, 3, {K}]",
    ),
    "linear_static: input_scale per row of floats": (
        lambda: static(X, scale=torch.ones(6, 1)),
        ValueError,
        "linear_static: input_scale must hold one value (float input is quantized per tensor), "
        f"got float32 [6, 1] for input float32 [6, {K}]",
    ),
    "linear_static: input_scale of zero": (
        lambda: static(X, scale=torch.zeros(1)),
        ValueError,
        "linear_static: input_scale must be finite and at least 2^-126, got 0",
    ),
    "linear_static: input_zero_point's type": (
        lambda: static(zero=torch.zeros(1)),
        TypeError,
        "linear_static: input_zero_point must be int32, got float32 [1]; "
        "convert it with .to(torch.int32)",
    ),
    "linear_static: input_zero_point's shape": (
        lambda: static(zero=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        "linear_static: input_zero_point must hold one value, or one per row of input [..., 1], "
        f"got int32 [2] for input int8 [6, {K}]",
    ),
    "linear_static: input_zero_point of int8": (
        lambda: static(zero=torch.tensor([128], dtype=torch.int32)),
        ValueError,
        "linear_static: input_zero_point must be from -128 to 127, got 128",
    ),
    "linear_static: input_zero_point of uint8": (
        lambda: static(Q.view(torch.uint8), zero=torch.tensor([-1], dtype=torch.int32)),
        ValueError,
        "linear_static: input_zero_point must be from 0 to 255, got -1",
    ),
    "linear_static: input range": (
        lambda: static(X, input_qmin=-200),
        ValueError,
        "linear_static: input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, "
        "got -200, -7, 127",
    ),
    "linear_static: input range without its zero point": (
        lambda: static(X[:0], input_qmin=0),
        ValueError,
        "linear_static: input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, "
        "got 0, -7, 127",
    ),
    "linear_static: integers without a scale": (
        lambda: static(output_dtype=torch.int8),
        TypeError,
        "linear_static: output_dtype must be int8 or uint8 exactly where output_scale is given, "
        "got int8 without output_scale",
    ),
    "linear_static: floats with a scale": (
        lambda: static(output_scale=torch.ones(1)),
        TypeError,
        "linear_static: output_dtype must be int8 or uint8 exactly where output_scale is given, "
        "got float32 with output_scale",
    ),
    "linear_static: output_dtype": (
        lambda: static(output_dtype=torch.float64),
        TypeError,
        "linear_static: output_dtype must be float32, bfloat16 or float16 (int8 or uint8 with "
        "output_scale), got float64",
    ),
    "linear_static: output_scale's type": (
        lambda: static(output_dtype=torch.int8, output_scale=torch.ones(1).half()),
        TypeError,
        "linear_static: output_scale must be float32, got float16 [1]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_static: output_scale's shape": (
        lambda: static(output_dtype=torch.int8, output_scale=SCALE),
        ValueError,
        f"linear_static: output_scale must hold one value, got float32 [{N}]",
    ),
    "linear_static: output_scale of zero": (
        lambda: static(output_dtype=torch.int8, output_scale=torch.zeros(1)),
        ValueError,
        "linear_static: output_scale must be finite and at least 2^-126, got 0",
    ),
    "linear_static: output range": (
        lambda: static(output_dtype=torch.uint8, output_scale=torch.ones(1)),
        ValueError,
        "linear_static: output_qmin <= output_zero_point <= output_qmax must lie within 0 .. 255 "
        "for uint8, got -128, 0, 127",
    ),
    "linear_static: output_zero_point": (
        lambda: static(
            output_dtype=torch.int8,
            output_scale=torch.ones(1),
            output_qmin=-8,
            output_qmax=7,
            output_zero_point=8,
        ),
        ValueError,
        "linear_static: output_qmin <= output_zero_point <= output_qmax must lie within "
        "-128 .. 127 for int8, got -8, 8, 7",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_raise_and_change_nothing(call, error, message):
    check_refusal(call, error, message)
