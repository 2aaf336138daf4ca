"""Wrong arguments of quantize, dequantize and choose_qparams."""

import re

import pytest
import torch
from support.affine import NAN

from torchquant.functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
    quantize_per_token,
)
from torchquant.scheme import PerAxis, PerGroup, PerToken

X = torch.zeros(2, 6)
Q = torch.zeros(2, 6, dtype=torch.int8)
SUM_TYPE = "PerTensor(), PerAxis(axis), PerGroup(group_size) or PerToken()"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize(X.double(), 1.0),
            TypeError,
            "quantize: input must be float32, bfloat16 or float16, got float64 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize([1.0], 1.0),
            TypeError,
            "quantize: input must be a torch.Tensor, got list",
        ),
        (
            lambda: quantize(X, torch.ones(3)),
            ValueError,
            "quantize with PerTensor(): scale must have shape [1], got [3]",
        ),
        (
            lambda: quantize(X, torch.ones(2), granularity=PerAxis(1)),
            ValueError,
            "quantize with PerAxis(axis=1): scale must have shape [6], got [2]",
        ),
        (
            lambda: fake_quantize(X, 0.5, granularity=PerGroup(4)),
            ValueError,
            "fake_quantize with PerGroup(group_size=4): scale must have shape [2, 2], got [1]",
        ),
        (
            lambda: quantize(X, torch.ones(2, 1, dtype=torch.float64), granularity=PerToken()),
            TypeError,
            "quantize with PerToken(): scale must be float32, got float64 [2, 1]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize(X, "0.1"),
            TypeError,
            "quantize with PerTensor(): scale must be a float or a float32 tensor of shape [1], "
            "got str '0.1'",
        ),
        (
            lambda: quantize(X, 0.0),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got 0.0",
        ),
        (
            lambda: quantize(X, -1.0),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got -1.0",
        ),
        (
            lambda: quantize(X, NAN),
            ValueError,
            "quantize with PerTensor(): scale must be finite and at least 2^-126, got nan",
        ),
        (
            lambda: quantize(X, torch.ones(1, device="meta")),
            ValueError,
            "quantize with PerTensor(): scale must be on the input's device cpu, got meta; "
            "move it with .to(device)",
        ),
        (
            lambda: quantize(X, 1.0, 128),
            ValueError,
            "quantize with PerTensor(): zero_point must be from -128 to 127, got 128",
        ),
        (
            lambda: quantize(X, 1.0, 1.5),
            TypeError,
            "quantize with PerTensor(): zero_point must be None, an int or an int32 tensor of "
            "shape [1], got float 1.5; pass a float32 tensor for a real-valued zero point",
        ),
        (
            lambda: quantize(X, 1.0, torch.zeros(1, dtype=torch.int64)),
            TypeError,
            "quantize with PerTensor(): zero_point must be int32 or float32, got int64 [1]; "
            "convert it with .to()",
        ),
        (
            lambda: quantize(
                X, torch.ones(2), torch.zeros(3, dtype=torch.int32), granularity=PerAxis(0)
            ),
            ValueError,
            "quantize with PerAxis(axis=0): zero_point must have shape [2] or [1], got [3]",
        ),
        (
            lambda: quantize(X, 1.0, qmin=5, qmax=5),
            ValueError,
            "quantize: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 5, qmax = 5",
        ),
        (
            lambda: fake_quantize(X, 1.0, qmin=0, qmax=2**23),
            ValueError,
            "fake_quantize: qmin must be less than qmax, both within [-2^22, 2^22], "
            "got qmin = 0, qmax = 8388608",
        ),
        (
            lambda: quantize(X, 1.0, dtype=torch.uint8),
            ValueError,
            "quantize: dtype must hold [qmin, qmax] = [-128, 127], got uint8",
        ),
        (
            lambda: quantize(X, 1.0, dtype=torch.float32),
            TypeError,
            "quantize: dtype must be int8, uint8, int16 or int32, got float32",
        ),
        (
            lambda: quantize(X, 1.0, granularity="per_tensor"),
            TypeError,
            f"quantize: granularity must be {SUM_TYPE}, got str 'per_tensor'",
        ),
        (
            lambda: quantize(X, torch.ones(2), granularity=PerAxis(2)),
            ValueError,
            "PerAxis: axis must be from -2 to 1 for an input of shape [2, 6], got 2",
        ),
        (
            lambda: dequantize(X, 1.0),
            TypeError,
            "dequantize: input must be int8, uint8, int16 or int32, got float32 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: dequantize(Q, 1.0, dtype=torch.float64),
            TypeError,
            "dequantize: dtype must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: quantize_per_token(torch.tensor(1.0)),
            ValueError,
            "quantize_per_token: input must have shape [..., K], got a 0-dimensional tensor",
        ),
        (
            lambda: quantize_per_token(Q),
            TypeError,
            "quantize_per_token: input must be float32, bfloat16 or float16, got int8 [2, 6]; "
            "convert it with .to()",
        ),
        (
            lambda: choose_qparams(X, bits=9),
            ValueError,
            "quant_range: bits must be an integer from 2 to 8, got 9",
        ),
        (
            lambda: choose_qparams(X, granularity=3),
            TypeError,
            f"choose_qparams: granularity must be {SUM_TYPE}, got int 3",
        ),
        (
            lambda: choose_qparams(X, real_zero_point="middle"),
            ValueError,
            "choose_qparams: real_zero_point must be None, 'midpoint' or 'minimum', got 'middle'",
        ),
        (
            lambda: choose_qparams(X, preserve_range=True),
            ValueError,
            "qparams_from_range: preserve_range must be False for a symmetric range, got True; "
            "pass symmetric=False with it",
        ),
        (
            lambda: qparams_from_range(0.0, X, qmin=0, qmax=1, symmetric=False),
            TypeError,
            "qparams_from_range: min and max must both be tensors or both be numbers, "
            "got float 0.0 and float32 [2, 6]",
        ),
        (
            lambda: qparams_from_range(X, X[0], qmin=0, qmax=1, symmetric=False),
            ValueError,
            "qparams_from_range: max must have min's shape [2, 6], got [6]",
        ),
        (
            lambda: qparams_from_range(1.0, -1.0, qmin=0, qmax=1, symmetric=False),
            ValueError,
            "qparams_from_range: min must not exceed max, got min = 1.0, max = -1.0",
        ),
        (
            lambda: qparams_from_range(-1.0, 1.0, qmin=-5, qmax=0, symmetric=True),
            ValueError,
            "qparams_from_range: qmax must be positive for a symmetric range, got 0",
        ),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
