"""linear_intx as torch and Python call it: gradients, refusals, entries."""

import re

import numpy
import pytest
import torch
import torch._dynamo.testing
from support import ACTIVATIONS, FLOATS, Shape, assert_same_bits, floats, integers, leaf
from support.aten import ATEN
from support.intx_cases import few_bits
from support.intx_layers import Layer
from support.refusals import Refusals
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchquant import functional, ops
from torchquant._extension import load

N, K = 20, 70
LAYER = Layer(Shape(6, N, K), 5, 20, True, bias=True)
PACKED, CANONICAL, X = LAYER.packed, LAYER.canonical, LAYER.input()
SIZES = (N, 5, 20, True)
BIAS = LAYER.bias_tensor
assert BIAS is not None
WEIGHT = (LAYER.weight.float() - CANONICAL["weight_zero_point"].repeat_interleave(20, 1)[:, :K]) * (
    CANONICAL["weight_scale"].repeat_interleave(20, 1)[:, :K]
)
TORCH_ACTIVATIONS = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "relu6")},
    **{name: getattr(F, name) for name in ("hardswish", "hardsigmoid", "leaky_relu")},
}


def call(x: Tensor = X, bias: Tensor | None = BIAS, **changes: object) -> Tensor:
    return ops.linear_intx(x, **{**PACKED, "bias": bias, **changes})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_float_layer(activation):
    """On the weight that the integers mean, and at our values of the output."""
    for dtype, shape in ((torch.float32, (6, K)), (torch.bfloat16, (2, 3, K)), (torch.half, (K,))):
        x = floats(*shape, seed=6).to(dtype)
        leaves, others = (leaf(x), leaf(BIAS)), (leaf(x), leaf(BIAS))
        direction = floats(*shape[:-1], N, seed=11)
        got = call(*leaves, activation=activation)
        got = torch.autograd.grad((got.float() * direction).sum(), leaves)
        pre = F.linear(others[0].float(), WEIGHT, others[1])
        pre = pre + (call(x, BIAS, output_dtype=torch.float32) - pre).detach()
        expected = TORCH_ACTIVATIONS[activation](pre)
        expected = torch.autograd.grad((expected * direction).sum(), others)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, reference in zip(got, expected, strict=True):
            assert mine.dtype == reference.dtype and mine.shape == reference.shape
            scale = tolerance * float(reference.float().abs().max())
            torch.testing.assert_close(mine, reference, rtol=tolerance, atol=scale)


def test_gradients_of_gradients():
    x = leaf(X)
    first = torch.autograd.grad(call(x, activation="tanh").sum(), x, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), x)
    y = leaf(X)
    pre = F.linear(y, WEIGHT, BIAS)
    wanted = torch.autograd.grad(torch.tanh(pre).sum(), y, create_graph=True)[0]
    (expected,) = torch.autograd.grad(wanted.square().sum(), y)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


NAMES = (
    "none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid, leaky_relu"
)
REFUSALS: Refusals = {
    "integer input": (
        lambda: call(integers(6, K)),
        TypeError,
        "linear_intx: input must be float32, bfloat16 or float16, got int8 "
        f"[6, {K}]; convert it with .to(torch.float32)",
    ),
    "scalar": (
        lambda: call(X[0, 0]),
        ValueError,
        "linear_intx: input must have at least 1 dimension, got float32 []",
    ),
    "empty rows": (
        lambda: call(X[:, :0]),
        ValueError,
        "linear_intx: in_features must be between 1 and 8388608, got 0",
    ),
    "input too short": (
        lambda: call(X[:, :65]),
        ValueError,
        f"linear_intx: packed was made for out_features = {N}, in_features = {K}, bits = 5, "
        f"group_size = 20 (layout 1), but this call has out_features = {N}, in_features = 65, "
        "bits = 5, group_size = 20 (layout 1); pack the weight again with pack_intx_weight",
    ),
    "input shorter than a group": (
        lambda: call(X[:, :19]),
        ValueError,
        "linear_intx: group_size must be None (one scale per output channel) or between 1 and "
        "in_features = 19, got 20",
    ),
    "no outputs": (
        lambda: call(out_features=0),
        ValueError,
        "linear_intx: out_features must be between 1 and 2147483647, got 0",
    ),
    "bits": (
        lambda: call(bits=9),
        ValueError,
        "linear_intx: bits must be from 2 to 8, got 9",
    ),
    "int32 bias": (
        lambda: call(bias=BIAS.int()),
        TypeError,
        "linear_intx: bias must be float32, bfloat16 or float16, got int32 "
        f"[{N}]; convert it with .to(torch.float32)",
    ),
    "a bias too short": (
        lambda: call(bias=BIAS[:-1]),
        ValueError,
        f"linear_intx: bias must be float32 [{N}] with one value per output channel, "
        f"got float32 [{N - 1}]",
    ),
    "an unknown activation": (
        lambda: call(activation="swish"),
        ValueError,
        f"linear_intx: activation must be one of {NAMES}, got 'swish'",
    ),
    "integer output": (
        lambda: call(output_dtype=torch.int8),
        TypeError,
        "linear_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "the fallback: integer output": (
        lambda: ATEN.linear_intx(X, ROWS, None, *SIZES, output_dtype=torch.int8),
        TypeError,
        "linear_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "the fallback: an unknown activation": (
        lambda: ATEN.linear_intx(X, ROWS, None, *SIZES, activation="swish"),
        ValueError,
        f"linear_intx: activation must be one of {NAMES}, got 'swish'",
    ),
    "the specification: more bits": (
        lambda: functional.linear_intx(X, **{**CANONICAL, "bits": 4}),
        ValueError,
        "linear_intx: weight must be from -8 to 7 for bits = 4, got -16",
    ),
    "the specification: integer output": (
        lambda: functional.linear_intx(X, **CANONICAL, output_dtype=torch.int8),
        TypeError,
        "linear_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
}
ROWS = ATEN.pack_intx_weight(
    *(CANONICAL[name] for name in ("weight", "weight_scale", "weight_zero_point")), 5, 20
)


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_raise(name):
    function, error, message = REFUSALS[name]
    before = [tensor.clone() for tensor in (PACKED["packed"], BIAS, X)]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function()
    for tensor, copy in zip((PACKED["packed"], BIAS, X), before, strict=True):
        assert torch.equal(tensor, copy)


def test_meta_tensors_give_shapes():
    meta = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in PACKED.items()}
    y = ops.linear_intx(torch.empty(2, 3, K, device="meta").half(), **meta)
    assert y.is_meta and y.shape == (2, 3, N) and y.dtype == torch.half


def test_output_dtype_is_inputs_or_the_one_asked_for():
    for dtype in FLOATS:
        assert call(X.to(dtype)).dtype == dtype
        for output in FLOATS:
            assert call(X.to(dtype), output_dtype=output).dtype == output


def test_flops_are_those_of_the_float_layer():
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 6 * N * K


def test_the_entry_past_torch_ops():
    rest = (BIAS, numpy.int64(N), *SIZES[1:])
    assert_same_bits(
        load().linear_intx(X, PACKED["packed"], *rest, "silu"), call(activation="silu")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = load().linear_intx(X, PACKED["packed"], *rest, "none")
    assert_same_bits(y, call(output_dtype=torch.bfloat16))


def test_compiled_once_for_every_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: call(x, activation="gelu"), backend=counter, fullgraph=True)
    torch._dynamo.mark_dynamic(x := floats(5, K), 0)
    assert_same_bits(compiled(x), call(x, activation="gelu"))
    for rows in (2, 17):
        x = floats(rows, K, seed=rows)
        assert_same_bits(compiled(x), call(x, activation="gelu"))
    assert counter.frame_count == 1


def test_many_inputs_of_one_scale():
    """As many as a scale may have; a sum of fp32 in ascending order, which counts to 2^24."""
    weight = few_bits(1, 65_793, bits=2).clamp(min=0)
    packed = ops.pack_intx_weight(weight, torch.ones(1), bits=2)
    y = ops.linear_intx(torch.ones(2, 65_793), packed, out_features=1, bits=2)
    assert y.tolist() == [[float(weight.sum())]] * 2
