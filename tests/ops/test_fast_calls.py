"""The C++ entries past torch.ops: the same bits, and words for a wrong argument."""

import numpy
import pytest
import torch
from support import leaf
from support.operands import (
    IN_SCALE,
    IN_ZERO,
    INT_BIAS,
    NAMESPACE,
    PACKED,
    SCALE,
    ZERO,
    N,
    Q,
    X,
)

from torchquant import ops
from torchquant._extension import load


def test_linear_static_past_torch_ops_gives_the_same_bits():
    rest = (IN_SCALE, IN_ZERO, PACKED, SCALE, ZERO, INT_BIAS)
    output = (IN_SCALE, 5, -100, 100, -128, 127)
    got = ops.linear_static(
        Q,
        *rest,
        out_features=N,
        activation="silu",
        output_dtype=torch.int8,
        output_scale=IN_SCALE,
        output_zero_point=5,
        output_qmin=-100,
        output_qmax=100,
    )
    slow = NAMESPACE.linear_static.default(Q, *rest, N, "silu", torch.int8, *output)
    assert torch.equal(got, slow)
    x = leaf(X)  # gradients are recorded
    ops.linear_static(x, IN_SCALE, None, PACKED, SCALE, out_features=N).sum().backward()
    assert x.grad is not None and x.grad.shape == X.shape


BAD_CALLS = {
    "too few": ((X, "relu", 3), "activation: expected 2 positional arguments, got 3"),
    "no tensor": (([1.0], "relu"), "activation: argument 1 must be a tensor, got list"),
    "no text": ((X, b"relu"), "activation: argument 2 must be a str, got bytes"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_entries_past_torch_ops_name_the_wrong_argument(name):
    arguments, message = BAD_CALLS[name]
    with pytest.raises(TypeError) as caught:
        load().activation(*arguments)
    assert str(caught.value) == message


def test_entries_past_torch_ops_read_every_kind_of_argument():
    rest = (PACKED, SCALE, None, None)
    split, static = load().linear_dynamic_split, load().linear_static
    plain = ops.linear_dynamic(X, PACKED, SCALE, out_features=N)
    assert torch.equal(load().linear_dynamic(X, *rest, numpy.int64(N), True, "none", 8), plain)
    assert torch.equal(split(X, *rest, (N,), True, [])[0], plain)
    for wrong, message in {
        (N, 1, "none", 8): "argument 7 must be a bool, got int",
        ("20", True, "none", 8): "argument 6 must be an int, got str",
        (2**64, True, "none", 8): "argument 6 must be an int of 64 bits, got int",
    }.items():
        with pytest.raises(TypeError, match=f"linear_dynamic: {message}"):
            load().linear_dynamic(X, *rest, *wrong)
    with pytest.raises(TypeError, match="split: argument 6 must be a list or a tuple, got int"):
        split(X, *rest, N, True, [])
    with pytest.raises(TypeError, match=r"static: argument 10 must be a torch\.dtype"):
        static(Q, IN_SCALE, None, *rest, N, "none", "int8", None, 0, -128, 127, -128, 127)
    with pytest.raises(TypeError, match="rms_norm: argument 3 must be a float, got str"):
        load().rms_norm(X, None, "1", False)
    with pytest.raises(UnicodeEncodeError):
        load().activation(X, "\ud800")
