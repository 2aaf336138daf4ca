"""torchquant.ops: numbers, granularities and packed weights as arguments of the wrappers."""

import itertools
import math

import pytest
import torch
from support import (
    FLOATS,
    assert_same_bits,
    check_everywhere,
    integers,
    positive,
)
from support.operands import (
    BIAS,
    IN_SCALE,
    IN_ZERO,
    INT_BIAS,
    NAMESPACE,
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
from torch import Tensor

import torchquant
from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken


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


def test_a_group_may_be_longer_than_any_row():
    q = NAMESPACE.quantize(X, torch.ones(6, 1), None, -128, 127, group_size=2**63 - 1)
    assert torch.equal(q, NAMESPACE.quantize(X, torch.ones(6, 1), None, -128, 127, group_size=K))
