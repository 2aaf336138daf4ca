"""torchquant.ops and torch.ops.torchquant: the wrappers, fake kernels, gradients and refusals."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support import (
    ACTIVATIONS,
    FLOATS,
    assert_same_bits,
    check_everywhere,
    floats,
    generator,
    integers,
    positive,
)
from torch import Tensor
from torch.nn import functional as F

import torchquant
from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant._extension import load
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken

REFERENCE = Path(__file__).parents[1] / "reference"
NAMESPACE = torch.ops.torchquant

N, K = 20, 70  # outputs and inputs of the samples: tails on both sides
WEIGHT = integers(N, K, seed=1)
PACKED = ops.pack_weight(WEIGHT)
SCALE, ZERO = positive(N, seed=2), integers(N, seed=3).to(torch.int32)
BIAS, INT_BIAS = floats(N, seed=4), integers(N, seed=5, dtype=torch.int32)
X, Q = floats(6, K, seed=6), integers(6, K, seed=7)
QUERY = floats(3, 4, 5, 6, seed=8)
# Two layers on one input: the one above, and its first 16 outputs.
BOTH = torch.cat([PACKED, ops.pack_weight(WEIGHT[:16])])
SCALES, ZEROS, BIASES = (torch.cat([t, t[:16]]) for t in (SCALE, ZERO, BIAS))
IN_SCALE, IN_ZERO = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# ---------------------------------------------------------------- torch's own checks

Sample = tuple[tuple[Any, ...], dict[str, Any]]


def sample(*args: Any, **kwargs: Any) -> Sample:
    return args, kwargs


def samples() -> dict[str, list[Sample]]:
    zero = torch.tensor([3], dtype=torch.int32)
    rows = positive(6, 1, seed=8)
    row_zero = integers(6, 1, seed=9).to(torch.int32)
    groups, group_zero = positive(6, 3), torch.randn(6, 3)
    bf16, weight = X.bfloat16(), torch.randn(N, K)
    dynamic: tuple[Any, ...] = (None, None, None, -128, 127, False)
    static: tuple[Any, ...] = (IN_SCALE, zero, None, -128, 127, False)
    learned: tuple[Any, ...] = (leaf(IN_SCALE), None, leaf(torch.randn(1)), -8, 7, False)
    to_int8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.5])}
    to_uint8 = {**to_int8, "output_dtype": torch.uint8, "output_qmin": 0, "output_qmax": 255}
    return {
        "quantize": [
            sample(X, IN_SCALE, None, -128, 127),
            sample(bf16, IN_SCALE, zero, 0, 15, dtype=torch.uint8),
            sample(X, SCALE[:6], zero.expand(6), -8, 7, axis=0),
            sample(X, positive(K), None, -128, 127, axis=-1),
            sample(X, groups, group_zero, -128, 127, group_size=32),
            sample(leaf(X), IN_SCALE, None, -128, 127),
            sample(X[:0], IN_SCALE, None, -128, 127),
        ],
        "dequantize": [
            sample(Q, IN_SCALE, None),
            sample(Q, IN_SCALE, zero, dtype=torch.bfloat16),
            sample(Q, groups, group_zero, group_size=32),
            sample(Q, SCALE[:6], zero.expand(6), axis=0, dtype=torch.float16),
        ],
        "quantize_per_token": [
            sample(X),
            sample(bf16, False),
            sample(X.reshape(2, 3, K), symmetric=False),
            sample(leaf(X)),
            sample(X[:0]),
        ],
        "pack_weight": [sample(WEIGHT), sample(WEIGHT.t())],
        "unpack_weight": [sample(PACKED, N, K)],
        "int8_mm": [
            sample(Q, PACKED, N),
            sample(Q.view(torch.uint8), PACKED, N),
            sample(Q.reshape(2, 3, K), PACKED, N),
            sample(Q[0], PACKED, N),
        ],
        "linear_dynamic": [
            sample(X, PACKED, SCALE, None, None, N),
            sample(bf16, PACKED, SCALE, ZERO, BIAS, N, False, "gelu"),
            sample(X.reshape(2, 3, K), PACKED, SCALE, None, BIAS, N, True, "silu", torch.float16),
            sample(leaf(X), PACKED, SCALE, None, None, N),
            sample(leaf(X), PACKED, SCALE, ZERO, leaf(BIAS), N, True, "gelu"),
            sample(X, PACKED, SCALE, None, leaf(BIAS), N, False, "relu"),
            sample(leaf(X).bfloat16(), PACKED, SCALE, ZERO, BIAS, N, True, "gelu_tanh"),
            sample(X[:0], PACKED, SCALE, None, None, N),
            sample(X[0], PACKED, SCALE[:1], None, None, N),
        ],
        "linear_dynamic_split": [
            sample(X, PACKED, SCALE, None, None, [N], True, []),
            sample(bf16, BOTH, SCALES, ZEROS, BIASES, [N, 16], False, ["gelu", "none"]),
            sample(X.reshape(2, 3, K), BOTH, SCALES, None, None, [N, 16], True, [], torch.half),
            sample(leaf(X), BOTH, SCALES, None, None, [N, 16], True, []),
            sample(leaf(X), BOTH, SCALES, ZEROS, leaf(BIASES), [N, 16], True, ["none", "silu"]),
            sample(X, BOTH, SCALES, None, leaf(BIASES), [N, 16], False, []),
            sample(X[:0], BOTH, SCALES, None, BIASES, [N, 16], True, []),
            sample(X[0], BOTH, SCALES, None, None, [N, 16], True, []),
        ],
        "linear_static": [
            sample(Q, IN_SCALE, None, PACKED, SCALE, None, None, N),
            sample(Q, rows, row_zero, PACKED, SCALE, ZERO, INT_BIAS, N, "gelu", torch.bfloat16),
            sample(Q, IN_SCALE, IN_ZERO, PACKED, SCALE, None, BIAS, N, **to_int8),
            sample(Q.view(torch.uint8), IN_SCALE, None, PACKED, SCALE, None, BIAS, N, **to_uint8),
            sample(X, IN_SCALE, IN_ZERO, PACKED, SCALE, None, BIAS, N, "silu", torch.float32),
            sample(leaf(X), IN_SCALE, IN_ZERO, PACKED, SCALE, ZERO, leaf(BIAS), N, "gelu"),
            sample(leaf(X), IN_SCALE, None, PACKED, SCALE, None, None, N, input_qmin=-127),
            sample(Q, IN_SCALE, None, PACKED, SCALE, None, leaf(BIAS), N),
            sample(leaf(X), IN_SCALE, None, PACKED, SCALE, None, None, N, **to_int8),
        ],
        "activation": [
            sample(X, "gelu"),
            sample(bf16.t(), "tanh", torch.float32),
            sample(X[:, 3:9], "sigmoid", torch.float16),
            sample(X[:, :1].expand(6, 5), "relu"),
            sample(leaf(X), "silu"),
            sample(leaf(X), "gelu_tanh", torch.bfloat16),
            sample(X[:0], "none"),
        ],
        "gated_activation": [
            sample(X, X.flip(0), "silu"),
            sample(X[:, :35], X[:, 35:], "gelu"),
            sample(bf16.t(), bf16.t(), "gelu_tanh"),
            sample(leaf(X), leaf(X), "sigmoid"),
            sample(X, leaf(X), "silu"),
            sample(X[:0], X[:0], "tanh"),
        ],
        "rms_norm": [
            sample(X, None, 1e-6),
            sample(bf16.reshape(2, 3, K), positive(K), 1e-6, True),
            sample(leaf(X), leaf(positive(K)), 1e-6),
            sample(X[:, 3:40], leaf(positive(37).bfloat16()), 0.0),
            sample(X[:0], None, 1e-6),
        ],
        "layer_norm": [
            sample(X, None, None, 1e-5),
            sample(bf16, positive(K), positive(K).half(), 1e-5, bf16.flip(0)),
            sample(leaf(X), leaf(positive(K)), leaf(positive(K)), 1e-5),
            sample(X, None, None, 1e-5, leaf(X)),
            sample(X, positive(K), leaf(positive(K)), 1e-5, X),
            sample(X[:0], None, None, 1e-5),
        ],
        "attention": [
            sample(QUERY, QUERY, QUERY),
            sample(QUERY.bfloat16(), QUERY[:, :2].bfloat16(), QUERY[:, 2:].bfloat16(), None, 0.3),
            sample(QUERY, QUERY, QUERY, torch.ones(5, 5, dtype=torch.bool).tril(), None, True),
            sample(leaf(QUERY), leaf(QUERY), leaf(QUERY)),
            sample(leaf(QUERY), QUERY[:, :1], leaf(QUERY[:, :1]), leaf(torch.randn(3, 4, 1, 5))),
            sample(QUERY[:0], QUERY[:0], QUERY[:0]),
        ],
        "fake_quantize": [
            sample(X, IN_SCALE, None, -128, 127),
            sample(leaf(X), IN_SCALE, zero, -8, 7),
            sample(leaf(bf16), SCALE[:6], zero.expand(6), -8, 7, axis=0),
            sample(leaf(X.t()), positive(K), torch.randn(K), 0, 15, axis=0),
            sample(leaf(X), groups, group_zero, -128, 127, group_size=32),
            sample(leaf(X[:0]), IN_SCALE, None, -128, 127),
        ],
        "fake_quantize_mask": [
            sample(X, IN_SCALE, None, -128, 127),
            sample(leaf(X), rows, row_zero, -128, 127, group_size=K),
            sample(bf16, positive(K), None, -8, 7, axis=-1),
            sample(X[:0], IN_SCALE, None, -128, 127),
        ],
        "in_range": [
            sample(X, IN_SCALE, None, -128, 127),
            sample(leaf(X), groups, group_zero, -8, 7, group_size=32),
        ],
        "positive": [sample(X), sample(leaf(bf16.t())), sample(X[:0]), sample(X[0, 0])],
        "mask_gradient": [
            sample(X, ops.positive(X)),
            sample(leaf(X), ops.positive(X)),
            sample(leaf(bf16.t()), ops.positive(bf16.t())),
            sample(X[:0], ops.positive(X[:0])),
        ],
        "fake_quantize_learned": [
            sample(X, IN_SCALE, None, -128, 127, 1.0),
            sample(leaf(X), leaf(IN_SCALE), None, -8, 7, 0.1),
            sample(leaf(bf16), leaf(SCALE[:6]), leaf(BIAS[:6]), -8, 7, 0.1, axis=0),
            sample(X, leaf(positive(K)), leaf(torch.randn(K)), 0, 15, 0.5, axis=-1),
            sample(leaf(X), leaf(groups), None, -2, 1, 1.0, group_size=32),
            sample(leaf(X[:0]), leaf(IN_SCALE), None, -8, 7, 1.0),
        ],
        "fake_quantize_learned_backward": [
            sample(X, X, IN_SCALE, None, -128, 127),
            sample(bf16, bf16, SCALE[:6], zero.expand(6), -8, 7, axis=0),
            sample(X, X, positive(K), None, -8, 7, axis=-1),
            sample(X, X, groups, None, -2, 1, group_size=32),
            sample(X[:0], X[:0], IN_SCALE, None, -8, 7),
        ],
        "quantize_rows": [
            sample(X, None, None, -128, 127, False),
            sample(bf16, None, None, -8, 7, True),
            sample(X, IN_SCALE, zero, -128, 127, False),
            sample(X[:0], None, None, -128, 127, False),
        ],
        "quantize_pack": [
            sample(weight, None, -127, 127, True),
            sample(weight.bfloat16(), None, -8, 7, False),
            sample(weight, SCALE, -128, 127, True),
        ],
        "mm_fake_quantized": [
            sample(torch.randn(4, N), weight, SCALE, None, -127, 127),
            sample(torch.randn(0, N), weight, SCALE, None, -8, 7),
        ],
        "qat_linear": [
            sample(X, weight, BIAS, *dynamic, None, -127, 127, True),
            sample(leaf(X), leaf(weight), leaf(BIAS), *dynamic, None, -8, 7, False, "relu"),
            sample(
                leaf(bf16), leaf(weight), None, *dynamic, leaf(SCALE), -8, 7, True, "none", 0.0, 0.1
            ),
            sample(leaf(X), leaf(weight), None, *static, None, -127, 127, True),
            sample(leaf(X), leaf(weight), None, *learned, None, -127, 127, True, "relu", 0.1),
            sample(leaf(X[:0]), leaf(weight), None, *dynamic, None, -127, 127, True),
        ],
        "minmax": [
            sample(X),
            sample(bf16, axis=-1),
            sample(leaf(X), group_size=32),
            sample(X[:0], axis=1),
            sample(X, group_size=1000),
        ],
    }


OPERATORS = sorted(
    name.removeprefix("torchquant::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchquant::")
)


def test_every_operator_has_samples_and_a_wrapper():
    assert sorted(samples()) == OPERATORS
    assert set(OPERATORS) <= set(ops.__all__)


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name, cases in samples().items() for number in range(len(cases))],
)
def test_opcheck(name, number):
    """Schema, fake kernel, autograd registration, tracing with fixed and with symbolic shapes."""
    args, kwargs = samples()[name][number]
    torch.library.opcheck(getattr(NAMESPACE, name).default, args, kwargs)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_calls_have_the_same_bits(name):
    operator = getattr(NAMESPACE, name).default
    for args, kwargs in samples()[name]:
        torch._dynamo.reset()
        compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
        got, expected = compiled(*args, **kwargs), operator(*args, **kwargs)
        if isinstance(expected, Tensor):
            got, expected = (got,), (expected,)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.detach(), b.detach())


def test_wrappers_compile_in_one_graph():
    torch._dynamo.reset()
    rows = positive(6)

    def everything(x: Tensor, q: Tensor) -> list[Tensor]:
        token, scale, zero = ops.quantize_per_token(x, symmetric=False)
        return [
            ops.quantize(x, 0.1, 3),
            ops.quantize(x, rows, granularity=PerAxis(0)),
            ops.dequantize(token, scale, zero, granularity=PerToken()),
            ops.linear_dynamic(x, PACKED, SCALE, bias=BIAS, out_features=N),
            quantized_linear(q, WEIGHT, BIAS, input_scale=0.1, weight_scale=SCALE),
            quantized_linear(
                q,
                PackedWeight(PACKED, N, K),
                input_scale=0.1,
                input_zero_point=5,
                weight_scale=SCALE,
                weight_zero_point=ZERO,
                output_scale=0.3,
                activation="gelu",
            ),
        ]

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(X, Q), everything(X, Q), strict=True):
        assert_same_bits(got, expected)


def test_meta_tensors_give_shapes():
    meta = {"device": "meta"}
    y = ops.linear_dynamic(
        X.to(**meta), PACKED.to(**meta), SCALE.to(**meta), out_features=N, output_dtype=torch.half
    )
    assert y.is_meta and y.shape == (6, N) and y.dtype == torch.half
    assert ops.pack_weight(WEIGHT.to(**meta)).shape == PACKED.shape
    assert ops.unpack_weight(PACKED.to(**meta), N, K).shape == (N, K)


# ---------------------------------------------------------------- wrappers

GRANULARITIES = {
    "tensor": PerTensor(),
    "rows": PerAxis(0),
    "columns": PerAxis(-1),
    "groups": PerGroup(32),
    "tokens": PerToken(),
}


@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES.keys())
def test_quantize_takes_numbers_and_tensors(granularity):
    shape = granularity.scale_shape(X.shape)
    scale, zero = positive(*shape), integers(*shape).to(torch.int32)
    for z in (None, 3, torch.tensor([3], dtype=torch.int32), zero, zero.float() / 7):
        q = ops.quantize(X, scale, z, granularity=granularity)
        assert_same_bits(q, functional.quantize(X, scale, z, granularity=granularity))
        x = ops.dequantize(q, scale, z, granularity=granularity, dtype=torch.float16)
        expected = functional.dequantize(q, scale, z, granularity=granularity, dtype=torch.float16)
        assert_same_bits(x, expected)


def test_quantize_takes_scalars_of_every_kind():
    expected = functional.quantize(X, 0.5, 3)
    for scale in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        for zero in (3, torch.tensor(3, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)):
            assert_same_bits(ops.quantize(X, scale, zero), expected)
    assert ops.quantize(torch.tensor(1.3), 0.5).tolist() == 3
    assert ops.dequantize(torch.tensor(3, dtype=torch.int8), 0.5).tolist() == 1.5
    assert ops.quantize(X, 1).dtype == torch.int8


def test_numbers_and_scalar_tensors_of_quantized_linear():
    expected = functional.quantized_linear(
        Q,
        WEIGHT,
        INT_BIAS,
        input_scale=0.5,
        input_zero_point=3,
        weight_scale=0.25,
        weight_zero_point=-4,
        output_scale=1e6,
        output_zero_point=2,
    )

    def int32(value: int, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32)

    for shape in ((), (1,)):
        got = quantized_linear(
            Q,
            WEIGHT,
            INT_BIAS,
            input_scale=torch.full(shape, 0.5),
            input_zero_point=int32(3, shape),
            weight_scale=torch.full(shape, 0.25),
            weight_zero_point=int32(-4, shape),
            output_scale=torch.full(shape, 1e6),
            output_zero_point=int32(2, shape),
        )
        assert_same_bits(got, expected)


@pytest.mark.parametrize("leading", [(6,), (2, 3), (1, 1), ()], ids=str)
def test_row_parameters_have_inputs_leading_shape(leading):
    q = integers(*leading, K)
    for shape in ((*leading, 1), leading):
        scale, zero = positive(*shape), integers(*shape).to(torch.int32)
        options = {"input_scale": scale, "input_zero_point": zero, "weight_scale": SCALE}
        expected = functional.quantized_linear(q, WEIGHT, **options)
        check_everywhere(lambda: quantized_linear(q, WEIGHT, **options), expected)  # noqa: B023


def test_packed_weight():
    weight = PackedWeight.pack(WEIGHT)
    assert (weight.out_features, weight.in_features) == (N, K)
    assert torch.equal(weight.unpack(), WEIGHT)
    assert torch.equal(weight.packed, PACKED)
    assert_same_bits(
        quantized_linear(Q, weight, input_scale=0.1, weight_scale=0.2),
        quantized_linear(Q, WEIGHT, input_scale=0.1, weight_scale=0.2),
    )


def test_output_dtype_is_inputs_or_the_one_asked_for():
    for dtype, output in itertools.product(FLOATS, (None, *FLOATS)):
        y = ops.linear_dynamic(X.to(dtype), PACKED, SCALE, out_features=N, output_dtype=output)
        assert y.dtype == (output or dtype)


def test_results_do_not_alias_the_arguments():
    before = PACKED.clone()
    ops.unpack_weight(PACKED, N, K).fill_(0)
    ops.linear_dynamic(X, PACKED, SCALE, out_features=N).fill_(0)
    q = ops.quantize(X, 0.5)
    ops.dequantize(q, 0.5).fill_(0)
    assert torch.equal(PACKED, before)
    assert torch.equal(q, ops.quantize(X, 0.5))


def test_views_with_the_negative_bit():
    """torch resolves lazy negation before it calls an operator."""
    x = torch._neg_view(X)
    assert x.is_neg()
    assert_same_bits(
        ops.linear_dynamic(x, PACKED, SCALE, out_features=N),
        ops.linear_dynamic(-X, PACKED, SCALE, out_features=N),
    )


# ---------------------------------------------------------------- gradients

TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def float_layer(
    x: Tensor, bias: Tensor | None, zero: Tensor | None, values: Tensor, activation: str
) -> Tensor:
    """The float formulation, straight through the quantizer: torch's gradients at our values."""
    weight = WEIGHT.float() if zero is None else WEIGHT.float() - zero.reshape(-1, 1)
    pre = F.linear(x.float(), weight * SCALE.reshape(-1, 1), bias)
    return TORCH_ACTIVATIONS[activation](pre + (values - pre).detach())


def check_gradients(
    call: Callable[[Tensor, Tensor | None], Tensor],
    reference: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    bias: Tensor | None,
) -> None:
    direction = floats(*x.shape[:-1], N, seed=11)
    results = []
    for function in (call, call, reference):
        leaves = [leaf(x)] + ([] if bias is None else [leaf(bias)])
        y = function(leaves[0], None if bias is None else leaves[1])
        results.append(torch.autograd.grad((y.float() * direction).sum(), leaves))
    for first, again, expected in zip(*results, strict=True):
        assert_same_bits(again, first, "the same call twice")
        assert first.dtype == expected.dtype and first.shape == expected.shape
        tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [None, ZERO], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_linear_dynamic(isa, activation, zero, bias, dtype):
    common = {"out_features": N, "symmetric": zero is None}
    for shape in ((6, K), (2, 3, K), (K,)):
        x = floats(*shape, seed=6).to(dtype)
        values = ops.linear_dynamic(
            x, PACKED, SCALE, zero, bias, output_dtype=torch.float32, **common
        )
        check_gradients(
            lambda x, b: ops.linear_dynamic(
                x, PACKED, SCALE, zero, b, activation=activation, **common
            ),
            lambda x, b: float_layer(x, b, zero, values, activation),  # noqa: B023
            x,
            bias,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [None, ZERO], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("input_zero", [None, IN_ZERO], ids=["centred", "shifted"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
def test_gradient_of_linear_static(activation, zero, input_zero, bias):
    """Straight through where the rounded value lies within the range, zero outside."""
    x = torch.randn(6, K, generator=generator(0)) * 2  # about a third of it saturates
    limits = {"input_qmin": -100, "input_qmax": 90}

    def call(x: Tensor, b: Tensor | None, name: str = activation) -> Tensor:
        side = (PACKED, SCALE, zero, b)
        return ops.linear_static(
            x, IN_SCALE, input_zero, *side, out_features=N, activation=name, **limits
        )

    q = (x * (1 / IN_SCALE)).round() + (0 if input_zero is None else input_zero)
    inside = (q >= -100) & (q <= 90)
    assert 0.2 < inside.logical_not().float().mean() < 0.5
    values = call(x, bias, "none")
    check_gradients(
        call,
        lambda x, b: float_layer(torch.where(inside, x, x.detach()), b, zero, values, activation),
        x,
        bias,
    )


def test_gradient_of_the_bias_behind_integer_input():
    bias = leaf(BIAS)
    y = ops.linear_static(Q, IN_SCALE, None, PACKED, SCALE, bias=bias, out_features=N)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 6.0))
    assert not quantized_linear(Q, WEIGHT, BIAS, input_scale=1.0, weight_scale=1.0).requires_grad


def test_rows_outside_fp32_have_no_gradient_of_their_own():
    """NaN stays visible; other rows' gradients are what they are without it."""
    x = X.clone()
    x[2, 3] = math.nan
    for activation in ACTIVATIONS:
        grads = []
        for values in (X, x):
            input = leaf(values)
            ops.linear_dynamic(
                input, PACKED, SCALE, out_features=N, activation=activation
            ).sum().backward()
            grads.append(input.grad)
        rest = torch.arange(6) != 2
        assert_same_bits(grads[1][rest], grads[0][rest])


def test_frozen_tensors_get_no_gradient():
    scale = leaf(SCALE)
    x = leaf(X)
    ops.linear_dynamic(x, PACKED, scale, out_features=N).sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    frozen = ops.linear_dynamic(X, PACKED, scale, bias=BIAS, out_features=N)
    assert not frozen.requires_grad


def test_no_graph_is_built_where_none_is_wanted():
    x = leaf(X)
    with torch.no_grad():
        assert not ops.linear_dynamic(x, PACKED, SCALE, out_features=N).requires_grad
    with torch.inference_mode():
        assert ops.linear_dynamic(x, PACKED, SCALE, out_features=N).is_inference()
    assert ops.linear_dynamic(x, PACKED, SCALE, out_features=N).requires_grad
    assert not ops.quantize(x, 0.1).requires_grad
    assert not any(tensor.requires_grad for tensor in ops.quantize_per_token(x))
    assert not ops.dequantize(Q, leaf(IN_SCALE)).requires_grad
    quantized = ops.linear_static(
        x,
        IN_SCALE,
        None,
        PACKED,
        SCALE,
        out_features=N,
        output_scale=torch.ones(1),
        output_dtype=torch.int8,
    )
    assert not quantized.requires_grad


def test_only_what_is_asked_for_is_computed():
    bias = leaf(BIAS)
    ops.linear_dynamic(X, PACKED, SCALE, None, bias, out_features=N).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 6.0))
    x = leaf(X)
    y = ops.linear_dynamic(x, PACKED, SCALE, ZERO, bias, out_features=N)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


def test_gradients_of_the_same_values_are_the_same_in_training_and_without():
    x = leaf(X)
    trained = ops.linear_dynamic(x, PACKED, SCALE, ZERO, BIAS, out_features=N, activation="gelu")
    with torch.no_grad():
        plain = ops.linear_dynamic(x, PACKED, SCALE, ZERO, BIAS, out_features=N, activation="gelu")
    assert_same_bits(trained.detach(), plain)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("op", ["dynamic", "static"])
def test_gradients_of_gradients(op, activation):
    """A gradient penalty: the pre-activation that backward computes again is part of the graph."""

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = leaf(X / 4)
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    def call(x: Tensor, name: str = activation) -> Tensor:
        if op == "dynamic":
            return ops.linear_dynamic(x, PACKED, SCALE, out_features=N, activation=name)
        wide = torch.tensor([1.0])  # nothing saturates
        return ops.linear_static(x, wide, None, PACKED, SCALE, out_features=N, activation=name)

    values = call(X / 4, "none")
    got = second(call)
    expected = second(lambda x: float_layer(x, None, None, values, activation))
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


def test_an_adapter_below_a_quantized_layer_trains():
    """LoRA: y = quantized(x) + quantized(x A B); the loss falls, the weight stays."""
    torch.manual_seed(0)
    a, b = leaf(torch.randn(K, 4) * 0.1), leaf(torch.zeros(4, K))
    target, before = torch.randn(6, N), PACKED.clone()
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        y = ops.linear_dynamic(X + X @ a @ b, PACKED, SCALE / 50, out_features=N)
        loss = F.mse_loss(y, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(PACKED, before)


def test_checkpointing_and_compiled_backward():
    x = leaf(X)

    def layer(x: Tensor) -> Tensor:
        return ops.linear_dynamic(x, PACKED, SCALE, bias=BIAS, out_features=N, activation="silu")

    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(again.square().sum(), x)[0], expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------- the source systems' numbers


def test_source_system_5_comes_out_of_the_kernel(isa):
    """Its quantized fully-connected layer, exactly, from torchquant.quantized_linear."""
    reference = json.loads((REFERENCE / "linear_quantization.json").read_text())["quantized_fc"]
    bits = reference["bits"]
    x, weight = torch.tensor(reference["input"]), torch.tensor(reference["weight"])
    weight_scale = torch.tensor(reference["weight_scale"])
    qx = ops.quantize(x, reference["input_scale"], reference["input_zero_point"], qmin=-2, qmax=1)
    qweight = ops.quantize(weight, weight_scale, qmin=-2, qmax=1, granularity=PerAxis(0))
    qbias = torch.tensor(reference["quantized_bias"], dtype=torch.int32)
    options = {
        "input_scale": reference["input_scale"],
        "weight_scale": weight_scale,
        "output_scale": reference["output_scale"],
        "output_zero_point": reference["output_zero_point"],
        "output_bits": bits,
    }
    zero_point = reference["input_zero_point"]
    for packed in (qweight, PackedWeight.pack(qweight)):
        y = quantized_linear(qx, packed, qbias, **options, input_zero_point=zero_point)
        assert y.dtype == torch.int8
        assert y.tolist() == reference["expected_output"]
    # Its own form: the zero point folded into the bias beforehand.
    shifted = torch.tensor(reference["shifted_quantized_bias"], dtype=torch.int32)
    assert functional.shift_bias(qbias, qweight, zero_point).tolist() == shifted.tolist()
    y = quantized_linear(qx, qweight, shifted, **options)
    assert y.tolist() == reference["expected_output"]


def test_source_system_5_quantizes_on_the_kernel(isa):
    reference = json.loads((REFERENCE / "linear_quantization.json").read_text())["linear_quantize"]
    x = torch.tensor(reference["input"])
    q = ops.quantize(x, reference["scale"], reference["zero_point"], qmin=-2, qmax=1)
    assert q.tolist() == reference["expected"]


def test_source_system_1_round_trip_on_the_kernel(isa):
    """It adds the zero point before rounding; on its reference numbers that makes no difference."""
    reference = json.loads((REFERENCE / "affine_round_trip.json").read_text())
    x = torch.tensor(reference["x"])
    q = ops.quantize(x, reference["scale"], reference["zero_point"])
    assert q.tolist() == reference["quantized"]
    back = ops.dequantize(q, reference["scale"], reference["zero_point"])
    torch.testing.assert_close(back, torch.tensor(reference["dequantized"]))


@pytest.mark.parametrize("case", ["signed_midpoint", "unsigned_minimum"])
def test_source_system_3_real_zero_points_on_the_kernel(isa, case):
    reference = json.loads((REFERENCE / "real_zero_point.json").read_text())
    numbers, x = reference[case], torch.tensor(reference["x"])
    dtype = torch.int8 if case == "signed_midpoint" else torch.uint8
    zero_point = torch.tensor([numbers["zero_point"]])
    limits = {"qmin": numbers["qmin"], "qmax": numbers["qmax"], "dtype": dtype}
    q = ops.quantize(x, numbers["scale"], zero_point, **limits)
    assert_same_bits(q, functional.quantize(x, numbers["scale"], zero_point, **limits))
    assert (q.int() - torch.tensor(numbers["quantized"]).int()).abs().max() <= 1
    back = ops.dequantize(q, numbers["scale"], zero_point)
    torch.testing.assert_close(back, x, **reference["tolerance"])


# ---------------------------------------------------------------- refusals

LINEAR = {"packed": PACKED, "weight_scale": SCALE, "out_features": N}
CALL = {"input_scale": 1.0, "weight_scale": 1.0}
WIDE = ops.pack_weight(torch.zeros(1, 65_794, dtype=torch.int8))
DEEP = torch.zeros(1, 65_794, dtype=torch.int8)


def dynamic(input: Tensor = X, **changes: Any) -> Tensor:
    return ops.linear_dynamic(input, **{**LINEAR, **changes})


def static(input: Tensor = Q, scale: Any = IN_SCALE, zero: Any = IN_ZERO, **changes: Any) -> Tensor:
    return ops.linear_static(input, scale, zero, **{**LINEAR, **changes})


def raw_quantize(**options: Any) -> Tensor:
    return NAMESPACE.quantize(X, IN_SCALE, None, -128, 127, **options)


REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
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
        lambda: dynamic(bias=BIAS.half()),
        TypeError,
        f"linear_dynamic: bias must be float32, got float16 [{N}]; "
        "convert it with .to(torch.float32)",
    ),
    "linear_dynamic: integer bias": (
        lambda: dynamic(bias=INT_BIAS),
        TypeError,
        f"linear_dynamic: bias must be float32, got int32 [{N}]; "
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
        "sigmoid, got 'swish'",
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
        f"linear_static: bias must be float32 or int32, got float64 [{N}]",
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
        lambda: quantized_linear(Q, WEIGHT, BIAS.half(), **CALL),
        TypeError,
        f"quantized_linear: bias must be float32 or int32, got float16 [{N}]; "
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
        "sigmoid, got 'mish'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_raise_and_change_nothing(call, error, message):
    tensors = [WEIGHT, PACKED, SCALE, ZERO, BIAS, INT_BIAS, X, Q, IN_SCALE, IN_ZERO]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    assert_same_bits(dynamic(), functional.linear_dynamic(X, WEIGHT, SCALE))


MIXED = {
    "input": lambda: dynamic(X.to("meta")),
    "packed": lambda: dynamic(packed=PACKED.to("meta")),
    "weight_scale": lambda: dynamic(weight_scale=SCALE.to("meta")),
    "weight_zero_point": lambda: dynamic(weight_zero_point=ZERO.to("meta")),
    "bias": lambda: dynamic(bias=BIAS.to("meta")),
    "input_scale": lambda: static(scale=IN_SCALE.to("meta")),
    "input_zero_point": lambda: static(zero=IN_ZERO.to("meta")),
    "output_scale": lambda: static(
        output_scale=torch.ones(1, device="meta"), output_dtype=torch.int8
    ),
    "scale": lambda: ops.quantize(X, IN_SCALE.to("meta")),
    "zero_point": lambda: ops.dequantize(Q, 0.5, IN_ZERO.to("meta")),
}


@pytest.mark.parametrize(("name", "call"), MIXED.items(), ids=MIXED.keys())
def test_tensors_on_two_devices_raise(name, call):
    """Else the fake kernel would answer, with memory that nobody wrote."""
    devices = "cpu, got meta" if name != "input" else "meta, got cpu"
    subject = name if name != "input" else "packed"
    message = (
        rf"^\w+: {subject} must be on the input's device {devices}; move it with .to\(device\)$"
    )
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_other_kinds_of_tensors_raise(kind):
    x = X.to_sparse() if kind == "sparse" else X.to_mkldnn()
    with pytest.raises(NotImplementedError, match="torchquant::linear_dynamic"):
        dynamic(x)


def damaged(change: Callable[[Tensor], None]) -> Tensor:
    blob = PACKED.clone()
    change(blob)
    return blob


HEADER = PACKED.shape[1] - 64  # flags: holds -128, K, N, version
DAMAGE: dict[str, Callable[[], Tensor]] = {
    "truncated": lambda: PACKED[:, :-1],
    "a tile too few": lambda: PACKED[:1],
    "a tile too many": lambda: torch.cat([PACKED, PACKED[:1]]),
    "one long row": lambda: PACKED.reshape(1, -1),
    "transposed in memory": lambda: PACKED.t().contiguous().t(),
    "zeros": lambda: torch.zeros_like(PACKED),
    "a header of zeros": lambda: damaged(lambda blob: blob[:, HEADER:].zero_()),
    "a version to come": lambda: damaged(lambda blob: blob[:, HEADER + 12].fill_(2)),
    "another K in the same padding": lambda: ops.pack_weight(integers(N, K + 20)),
    "another N in the same tiles": lambda: ops.pack_weight(integers(N + 5, K)),
    "uint8": lambda: PACKED.view(torch.uint8),
}


@pytest.mark.parametrize("make", DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_packed_weights_are_refused(make):
    packed = make()
    for call in (
        lambda: dynamic(packed=packed),
        lambda: static(packed=packed),
        lambda: ops.int8_mm(Q, packed, N),
        lambda: ops.unpack_weight(packed, N, K),
        lambda: quantized_linear(Q, PackedWeight(packed, N, K), **CALL),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=r"^\w+: packed (must be the int8|was made)"
        ):
            call()


def test_scales_of_nan_stay_visible():
    """A diverged scale is no wrong argument: everything computed with it is NaN."""
    nan = torch.tensor([math.nan])
    assert ops.quantize(X, nan, 7).eq(7).all()
    assert ops.dequantize(Q, nan).isnan().all()
    assert static(X, scale=nan).isnan().all()
    assert dynamic(weight_scale=nan).isnan().all()


def test_public_names():
    assert torchquant.quantized_linear is ops.quantized_linear
    for name in ops.__all__:
        assert getattr(ops, name).__doc__


# ---------------------------------------------------------------- the entries past torch.ops


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


def test_a_group_may_be_longer_than_any_row():
    q = NAMESPACE.quantize(X, torch.ones(6, 1), None, -128, 127, group_size=2**63 - 1)
    assert torch.equal(q, NAMESPACE.quantize(X, torch.ones(6, 1), None, -128, 127, group_size=K))
