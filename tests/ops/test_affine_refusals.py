"""Wrong arguments of quantize, dequantize and quantize_per_token raise."""

import math
from typing import Any

import pytest
import torch
from support.operands import (
    IN_SCALE,
    NAMESPACE,
    K,
    Q,
    X,
)
from support.refusals import Refusals, check_refusal
from torch import Tensor

from torchquant import ops
from torchquant.scheme import PerAxis, PerGroup, PerToken


def raw_quantize(**options: Any) -> Tensor:
    return NAMESPACE.quantize(X, IN_SCALE, None, -128, 127, **options)


REFUSALS: Refusals = {
    # quantize
    "quantize: not a tensor": (
        lambda: ops.quantize([1.0], 0.5),
        TypeError,
        "quantize: input must be a torch.Tensor, got list",
    ),
    "quantize: integer input": (
        lambda: ops.quantize(Q, 0.5),
        TypeError,
        f"quantize: input must be float32, bfloat16 or float16, got int8 [6, {K}]; "
        "convert it with .to(torch.float32)",
    ),
    "quantize: double input": (
        lambda: ops.quantize(X.double(), 0.5),
        TypeError,
        f"quantize: input must be float32, bfloat16 or float16, got float64 [6, {K}]; "
        "convert it with .to(torch.float32)",
    ),
    "quantize: result type": (
        lambda: ops.quantize(X, 0.5, dtype=torch.int16),
        TypeError,
        "quantize: dtype must be int8 or uint8, got int16",
    ),
    "quantize: range": (
        lambda: ops.quantize(X, 0.5, qmin=0, qmax=255),
        ValueError,
        "quantize: qmin < qmax must lie within -128 .. 127 for int8, got 0 and 255",
    ),
    "quantize: unsigned range": (
        lambda: ops.quantize(X, 0.5, qmin=-1, qmax=1, dtype=torch.uint8),
        ValueError,
        "quantize: qmin < qmax must lie within 0 .. 255 for uint8, got -1 and 1",
    ),
    "quantize: empty range": (
        lambda: ops.quantize(X, 0.5, qmin=3, qmax=3),
        ValueError,
        "quantize: qmin < qmax must lie within -128 .. 127 for int8, got 3 and 3",
    ),
    "quantize: granularity": (
        lambda: ops.quantize(X, 0.5, granularity="per_tensor"),
        TypeError,
        "quantize: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
        "PerToken(), got str 'per_tensor'",
    ),
    "quantize: axis": (
        lambda: ops.quantize(X, torch.ones(6), granularity=PerAxis(2)),
        ValueError,
        f"PerAxis: axis must be from -2 to 1 for an input of shape [6, {K}], got 2",
    ),
    "quantize: axis, in C++": (
        lambda: raw_quantize(axis=2),
        ValueError,
        "quantize: axis must be within the 2 dimensions of input, got 2",
    ),
    "quantize: axis and group_size": (
        lambda: raw_quantize(axis=0, group_size=4),
        ValueError,
        "quantize: axis and group_size exclude each other, got both; leave one out",
    ),
    "quantize: group_size": (
        lambda: raw_quantize(group_size=0),
        ValueError,
        "quantize: group_size must be at least 1, got 0",
    ),
    "quantize: scalar per axis": (
        lambda: NAMESPACE.quantize(X[0, 0], IN_SCALE, None, -128, 127, axis=0),
        ValueError,
        "quantize: input must have at least 1 dimension, got float32 []",
    ),
    "quantize: scalar per group": (
        lambda: ops.quantize(X[0, 0], 0.5, granularity=PerGroup(4)),
        ValueError,
        "quantize: input must have at least 1 dimension, got float32 []",
    ),
    "quantize: scalar per token": (
        lambda: ops.quantize(X[0, 0], 0.5, granularity=PerToken()),
        ValueError,
        "PerToken: input must have at least 1 dimension, got a 0-dimensional tensor",
    ),
    "quantize: scale of an axis": (
        lambda: ops.quantize(X, torch.ones(5), granularity=PerAxis(0)),
        ValueError,
        "quantize: scale must have shape [6], one value per slice along axis 0 of input, "
        "got float32 [5]",
    ),
    "quantize: scale of groups": (
        lambda: ops.quantize(X, torch.ones(6, 2), granularity=PerGroup(32)),
        ValueError,
        "quantize: scale must have shape [6, 3] (one value per group of 32), got float32 [6, 2]",
    ),
    "quantize: scale of tokens": (
        lambda: ops.quantize(X, torch.ones(6), granularity=PerToken()),
        ValueError,
        f"quantize: scale must have shape [6, 1] (one value per group of {K}), got float32 [6]",
    ),
    "quantize: scale of a tensor": (
        lambda: ops.quantize(X, torch.ones(6)),
        ValueError,
        "quantize: scale must hold one value without axis or group_size, got float32 [6]; "
        "pass axis=... or group_size=...",
    ),
    "quantize: scale's type": (
        lambda: ops.quantize(X, torch.ones(1).double()),
        TypeError,
        "quantize: scale must be float32, got float64 [1]; convert it with .to(torch.float32)",
    ),
    "quantize: scale of zero": (
        lambda: ops.quantize(X, torch.tensor([0.0])),
        ValueError,
        "quantize: scale must be finite and at least 2^-126, got 0",
    ),
    "quantize: scale below zero": (
        lambda: ops.quantize(X, torch.tensor([-0.5])),
        ValueError,
        "quantize: scale must be finite and at least 2^-126, got -0.5",
    ),
    "quantize: infinite scale": (
        lambda: ops.quantize(X, torch.tensor([math.inf])),
        ValueError,
        "quantize: scale must be finite and at least 2^-126, got inf",
    ),
    "quantize: number as scale": (
        lambda: ops.quantize(X, 0),
        ValueError,
        "quantize: scale must be finite and at least 2^-126, got 0",
    ),
    "quantize: text as scale": (
        lambda: ops.quantize(X, "0.5"),
        TypeError,
        "quantize: scale must be a float or a float32 tensor of shape [1], got str '0.5'",
    ),
    "quantize: zero point's type": (
        lambda: ops.quantize(X, 0.5, torch.tensor([1])),
        TypeError,
        "quantize: zero_point must be int32, or float32 for a real-valued one, got int64 [1]",
    ),
    "quantize: zero point's shape": (
        lambda: ops.quantize(X, 0.5, torch.zeros(6, dtype=torch.int32)),
        ValueError,
        "quantize: zero_point must have scale's shape [1] or hold one value, got int32 [6]",
    ),
    "quantize: zero point beyond what fp32 adds exactly": (
        lambda: ops.quantize(X, 0.5, torch.tensor([2**22 + 1], dtype=torch.int32)),
        ValueError,
        "quantize: zero_point must be from -4194304 to 4194304, got 4194305",
    ),
    "quantize: number as zero point": (
        lambda: ops.quantize(X, 0.5, 128),
        ValueError,
        "quantize: zero_point must be from -128 to 127, got 128",
    ),
    "quantize: fraction as zero point": (
        lambda: ops.quantize(X, 0.5, 1.5),
        TypeError,
        "quantize: zero_point must be None, an int or an int32 tensor of shape [1], "
        "got float 1.5; pass a float32 tensor for a real-valued zero point",
    ),
    # dequantize
    "dequantize: not a tensor": (
        lambda: ops.dequantize(3, 0.5),
        TypeError,
        "dequantize: input must be a torch.Tensor, got int",
    ),
    "dequantize: float input": (
        lambda: ops.dequantize(X, 0.5),
        TypeError,
        f"dequantize: input must be int8 or uint8, got float32 [6, {K}]; "
        "quantize it first (torchquant.ops.quantize)",
    ),
    "dequantize: result type": (
        lambda: ops.dequantize(Q, 0.5, dtype=torch.float64),
        TypeError,
        "dequantize: dtype must be float32, bfloat16 or float16, got float64",
    ),
    "dequantize: granularity": (
        lambda: ops.dequantize(Q, 0.5, granularity=None),
        TypeError,
        "dequantize: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
        "PerToken(), got NoneType None",
    ),
    "dequantize: zero point": (
        lambda: ops.dequantize(Q, 0.5, torch.tensor([-(2**31)], dtype=torch.int32)),
        ValueError,
        "dequantize: zero_point must be from -4194304 to 4194304, got -2147483648",
    ),
    # quantize_per_token
    "quantize_per_token: integer input": (
        lambda: ops.quantize_per_token(Q),
        TypeError,
        f"quantize_per_token: input must be float32, bfloat16 or float16, got int8 [6, {K}]; "
        "convert it with .to(torch.float32)",
    ),
    "quantize_per_token: scalar": (
        lambda: ops.quantize_per_token(X[0, 0]),
        ValueError,
        "quantize_per_token: input must have at least 1 dimension, got float32 []",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_raise_and_change_nothing(call, error, message):
    check_refusal(call, error, message)
