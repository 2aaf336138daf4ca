"""Refusals: calls that have to raise, with the whole text, and change nothing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support import assert_same_bits
from support.operands import (
    BIAS,
    IN_SCALE,
    IN_ZERO,
    INT_BIAS,
    PACKED,
    SCALE,
    WEIGHT,
    ZERO,
    Q,
    X,
    dynamic,
)
from torchquant import functional

Refusals = dict[str, tuple[Callable[[], Any], type[Exception], str]]


def check_refusal(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    tensors = [WEIGHT, PACKED, SCALE, ZERO, BIAS, INT_BIAS, X, Q, IN_SCALE, IN_ZERO]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    assert_same_bits(dynamic(), functional.linear_dynamic(X, WEIGHT, SCALE))
