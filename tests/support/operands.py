"""Tensors of one small linear layer, and calls of its operators."""

from typing import Any

import torch
from torch import Tensor

from support import (
    floats,
    integers,
    positive,
)
from torchquant import ops

NAMESPACE = torch.ops.torchquant
N, K = 20, 70  # outputs and inputs of the samples: tails on both sides
WEIGHT = integers(N, K, seed=1)
PACKED = ops.pack_weight(WEIGHT)
SCALE, ZERO = positive(N, seed=2), integers(N, seed=3).to(torch.int32)
BIAS, INT_BIAS = floats(N, seed=4), integers(N, seed=5, dtype=torch.int32)
X, Q = floats(6, K, seed=6), integers(6, K, seed=7)
IN_SCALE, IN_ZERO = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)


LINEAR = {"packed": PACKED, "weight_scale": SCALE, "out_features": N}
CALL = {"input_scale": 1.0, "weight_scale": 1.0}


def dynamic(input: Tensor = X, **changes: Any) -> Tensor:
    return ops.linear_dynamic(input, **{**LINEAR, **changes})


def static(input: Tensor = Q, scale: Any = IN_SCALE, zero: Any = IN_ZERO, **changes: Any) -> Tensor:
    return ops.linear_static(input, scale, zero, **{**LINEAR, **changes})
