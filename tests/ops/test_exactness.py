"""Every operator gives the same bits everywhere: instruction sets, threads, batches, steps.

The other side of each comparison is `torchquant.functional` (or integers in plain torch): with
float64 sums of integers and an exact fmaf it cannot share a mistake with the kernels.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    EXTREME,
    FLOATS,
    FLT_MAX,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SHAPES,
    SPECIAL,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from torch import Tensor

from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range

SPICES: dict[str, tuple[float, ...]] = {
    "plain": (),
    "special": SPECIAL,
    "extreme": SPECIAL + EXTREME,
    "not_finite": SPECIAL + NOT_FINITE,
}
SIZES = st.one_of(
    st.integers(1, 10),
    st.sampled_from([2**power + step for power in range(4, 8) for step in (-1, 0, 1)]),
)
FLOAT_DTYPES = st.sampled_from(FLOATS)
shape_classes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


# ---------------------------------------------------------------- one layer, in all its options


@dataclass(frozen=True)
class Layer:
    """A linear layer's shape and options; the tensors follow from them and the seed."""

    shape: Shape
    seed: int = 0
    bias: str = "none"  # none, float, int32
    weight_zero_point: bool = False
    one_scale: bool = False  # weight_scale [1] instead of [N]
    minus_128: bool = True  # weights may be -128
    activation: str = "none"
    layout: str = "contiguous"

    @property
    def weight(self) -> Tensor:
        w = integers(self.shape.outputs, self.shape.inputs, seed=self.seed + 1)
        return w if self.minus_128 else w.clamp(min=-127)

    @property
    def weight_side(self) -> dict[str, Tensor | None]:
        channels = 1 if self.one_scale else self.shape.outputs
        zero_point = integers(channels, seed=self.seed + 3).to(torch.int32)
        return {
            "weight_scale": positive(channels, seed=self.seed + 2),
            "weight_zero_point": zero_point if self.weight_zero_point else None,
        }

    @property
    def bias_tensor(self) -> Tensor | None:
        if self.bias == "float":
            return floats(self.shape.outputs, seed=self.seed + 4)
        if self.bias == "int32":
            return integers(self.shape.outputs, seed=self.seed + 4, dtype=torch.int32)
        return None

    def float_input(self, dtype: torch.dtype, spice: str = "plain") -> Tensor:
        x = floats(self.shape.rows, self.shape.inputs, seed=self.seed)
        return in_layout(sprinkle(x, SPICES[spice], self.seed).to(dtype), self.layout)

    def integer_input(self, dtype: torch.dtype) -> Tensor:
        x = integers(self.shape.rows, self.shape.inputs, seed=self.seed, dtype=dtype)
        return in_layout(x, self.layout)


def layers(biases: tuple[str, ...]) -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer,
        shape=st.builds(Shape, st.integers(0, 40), SIZES, SIZES),
        seed=st.integers(0, 10**6),
        bias=st.sampled_from(biases),
        weight_zero_point=st.booleans(),
        one_scale=st.booleans(),
        minus_128=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        layout=st.sampled_from(LAYOUTS),
    )


def check_dynamic(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    symmetric: bool = True,
    spice: str = "plain",
    counts: tuple[int, ...] = (1,),
) -> None:
    x, weight, bias = layer.float_input(dtype, spice), layer.weight, layer.bias_tensor
    options = {
        "symmetric": symmetric,
        "output_dtype": output_dtype,
        "activation": layer.activation,
    }
    expected = functional.linear_dynamic(x, weight, bias=bias, **layer.weight_side, **options)
    packed, side = ops.pack_weight(weight), layer.weight_side
    check_everywhere(
        lambda: ops.linear_dynamic(
            x, packed, **side, bias=bias, out_features=layer.shape.outputs, **options
        ),
        expected,
        counts,
        layer,
    )


def check_integer(
    layer: Layer,
    dtype: torch.dtype = torch.int8,
    per_row: bool = False,
    zero_point: bool = True,
    counts: tuple[int, ...] = (1,),
    **output: object,
) -> None:
    x, bias = layer.integer_input(dtype), layer.bias_tensor
    rows = (layer.shape.rows, 1) if per_row else (1,)
    zero = integers(*rows, seed=layer.seed + 5, dtype=dtype).to(torch.int32)
    options = {
        "input_scale": positive(*rows, seed=layer.seed + 6),
        "input_zero_point": zero if zero_point else 0,
        **layer.weight_side,
        "activation": layer.activation,
        **output,
    }
    expected = functional.quantized_linear(x, layer.weight, bias, **options)
    packed = PackedWeight.pack(layer.weight)
    check_everywhere(lambda: quantized_linear(x, packed, bias, **options), expected, counts, layer)


def check_static(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    zero_point: int = 0,
    spice: str = "plain",
    counts: tuple[int, ...] = (1,),
    **output: object,
) -> None:
    x, bias = layer.float_input(dtype, spice), layer.bias_tensor
    scale, side = positive(1, seed=layer.seed + 6), layer.weight_side
    if "output_scale" in output:
        output = {"output_dtype": torch.int8, **output}
        signed = output["output_dtype"] == torch.int8
        limits = quant_range(output.pop("output_bits", 8), signed=signed)
        output |= {"output_qmin": limits[0], "output_qmax": limits[1]}
        output["output_scale"] = torch.tensor([output["output_scale"]])
    output = {"output_dtype": torch.float32, "activation": layer.activation, **output}
    expected = functional.linear_static(
        x, scale, zero_point, layer.weight, bias=bias, **side, **output
    )
    packed = ops.pack_weight(layer.weight)
    zero = torch.tensor([zero_point], dtype=torch.int32)
    check_everywhere(
        lambda: ops.linear_static(
            x,
            scale,
            zero,
            packed,
            **side,
            bias=bias,
            out_features=layer.shape.outputs,
            **output,
        ),
        expected,
        counts,
        layer,
    )


INTEGER_OUTPUTS = st.one_of(
    st.builds(
        lambda bits, scale, zero: {
            "output_scale": scale,
            "output_bits": bits,
            "output_zero_point": zero % 2**bits - 2 ** (bits - 1),
        },
        st.integers(2, 8),
        st.sampled_from([0.03, 1.0, 7.5]),
        st.integers(0, 255),
    ),
    st.builds(
        lambda bits, scale, zero: {
            "output_scale": scale,
            "output_bits": bits,
            "output_zero_point": zero % 2**bits,
            "output_dtype": torch.uint8,
        },
        st.integers(2, 8),
        st.sampled_from([0.03, 1.0, 7.5]),
        st.integers(0, 255),
    ),
)
OUTPUTS = st.one_of(st.builds(lambda d: {"output_dtype": d}, FLOAT_DTYPES), INTEGER_OUTPUTS)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float")),
    dtype=FLOAT_DTYPES,
    output_dtype=st.sampled_from((None, *FLOATS)),
    symmetric=st.booleans(),
    spice=st.sampled_from(list(SPICES)),
)
def test_linear_dynamic_is_its_specification(layer, dtype, output_dtype, symmetric, spice):
    check_dynamic(layer, dtype, output_dtype, symmetric, spice)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float", "int32")),
    dtype=st.sampled_from((torch.int8, torch.uint8)),
    per_row=st.booleans(),
    zero_point=st.booleans(),
    output=OUTPUTS,
)
def test_quantized_linear_is_its_specification(layer, dtype, per_row, zero_point, output):
    check_integer(layer, dtype, per_row, zero_point, **output)


@settings(max_examples=60)
@given(
    layer=layers(("none", "float", "int32")),
    dtype=FLOAT_DTYPES,
    zero_point=st.sampled_from((0, -128, 127, 13)),
    spice=st.sampled_from(list(SPICES)),
    output=OUTPUTS,
)
def test_linear_static_of_floats_is_its_specification(layer, dtype, zero_point, spice, output):
    check_static(layer, dtype, zero_point, spice, **output)


@settings(max_examples=40)
@given(
    layer=layers(("none",)),
    dtype=st.sampled_from((torch.int8, torch.uint8)),
)
def test_int8_mm_is_the_integer_product(layer, dtype):
    x, weight = layer.integer_input(dtype), layer.weight
    expected = (x.to(torch.int64) @ weight.to(torch.int64).t()).to(torch.int32)
    packed = ops.pack_weight(weight)
    check_everywhere(lambda: ops.int8_mm(x, packed, layer.shape.outputs), expected, what=layer)


# ---------------------------------------------------------------- shape classes


def activation_at(number: int, shape: Shape) -> str:
    """Another one each time; the specification of the long ones is slow on large results."""
    return ACTIVATIONS[number % (5 if shape.rows * shape.outputs < 8000 else 2)]


@shape_classes
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_linear_dynamic_at_every_shape(shapes, symmetric):
    for number, shape in enumerate(shapes):
        layer = Layer(
            shape,
            seed=number,
            bias=("float", "none")[number % 2],
            weight_zero_point=not symmetric and number % 3 == 0,
            minus_128=number % 3 > 0,
            activation=activation_at(number, shape),
        )
        check_dynamic(layer, FLOATS[number % 3], symmetric=symmetric, counts=(1, 2))


@shape_classes
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_quantized_linear_at_every_shape(shapes, dtype):
    for number, shape in enumerate(shapes):
        layer = Layer(
            shape,
            seed=number,
            bias=("float", "none", "int32")[number % 3],
            weight_zero_point=number % 2 == 0,
            minus_128=number % 4 > 0,
        )
        check_integer(layer, dtype, per_row=number % 5 > 2, counts=(1, 2))


@shape_classes
def test_linear_static_at_every_shape(shapes):
    for number, shape in enumerate(shapes):
        activation = activation_at(number, shape)
        layer = Layer(shape, seed=number, bias="float", activation=activation)
        output = {"output_scale": 3.0, "output_zero_point": 7} if number % 2 else {}
        check_static(layer, FLOATS[number % 3], zero_point=-9, counts=(1, 2), **output)


@shape_classes
def test_int8_mm_at_every_shape(shapes):
    for number, shape in enumerate(shapes):
        layer = Layer(shape, seed=number, minus_128=number % 2 == 0)
        x, packed = layer.integer_input((torch.int8, torch.uint8)[number % 2]), layer.weight
        # Integers below 2^53: exact in float64, whatever the order.
        expected = (x.double() @ packed.double().t()).to(torch.int32)
        packed = ops.pack_weight(packed)
        outputs = shape.outputs
        check_everywhere(lambda: ops.int8_mm(x, packed, outputs), expected, (1, 2), shape)  # noqa: B023


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_every_epilogue(activation, dtype, bias):
    """Whole vectors and every length of tail, each output type, each activation."""
    layer = Layer(Shape(5, 47, 33), bias="float" if bias else "none", activation=activation)
    check_dynamic(layer, output_dtype=dtype)
    check_integer(layer, output_dtype=dtype)
    if dtype == torch.float32:
        for bits, signed in itertools.product((8, 3), (True, False)):
            output = {"output_scale": 2.5, "output_zero_point": 3, "output_bits": bits}
            output |= {} if signed else {"output_dtype": torch.uint8}
            check_integer(layer, **output)
            check_static(layer, **output)


@pytest.mark.parametrize("outputs", range(1, 35))
def test_every_tail_of_columns(outputs):
    for rows in (1, 2, 4, 7, 17):
        check_dynamic(Layer(Shape(rows, outputs, 20), seed=outputs, bias="float"))


@pytest.mark.parametrize("inputs", range(1, 131, 3))
def test_every_tail_of_a_row(inputs):
    for rows, dtype in zip((1, 3, 18), FLOATS, strict=True):
        for symmetric in (True, False):
            layer = Layer(Shape(rows, 18, inputs), seed=inputs, weight_zero_point=True)
            check_dynamic(layer, dtype, symmetric=symmetric)
        check_integer(layer, torch.uint8, per_row=True)


# ---------------------------------------------------------------- batches, layouts, threads


def batch_splits(rows: int) -> list[list[int]]:
    return [
        [1] * rows,
        [rows - 1, 1],
        [2, 3, rows - 5],
        [16, rows - 16],
        [0, rows],
        [31, 2, rows - 33],
    ]


@pytest.mark.parametrize("shape", [Shape(70, 50, 100), Shape(40, 300, 257)], ids=["small", "wide"])
def test_a_row_alone_is_the_row_in_any_batch(isa, shape):
    layer = Layer(shape, bias="float", weight_zero_point=True, activation="gelu")
    x = layer.float_input(torch.float32, "not_finite")
    xq = layer.integer_input(torch.uint8)
    packed, side, bias = ops.pack_weight(layer.weight), layer.weight_side, layer.bias_tensor
    scale, zero = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)
    calls = {
        "symmetric": (x, lambda part: ops.linear_dynamic(part, packed, **side, bias=bias, **n)),
        "asymmetric": (
            x,
            lambda part: ops.linear_dynamic(
                part, packed, **side, bias=bias, symmetric=False, **n, activation="silu"
            ),
        ),
        "static": (
            x,
            lambda part: ops.linear_static(part, scale, zero, packed, **side, bias=bias, **n),
        ),
        "integer": (
            xq,
            lambda part: ops.linear_static(part, scale, zero, packed, **side, bias=bias, **n),
        ),
        "int8_mm": (xq, lambda part: ops.int8_mm(part, packed, shape.outputs)),
        "quantize_per_token": (x, lambda part: ops.quantize_per_token(part)[0]),
    }
    n = {"out_features": shape.outputs}
    for name, (batch, call) in calls.items():
        whole = call(batch)
        for split in batch_splits(shape.rows):
            parts = torch.cat([call(part) for part in batch.split(split)])
            assert_same_bits(parts, whole, f"{name} split into {split}")


def test_a_row_with_nan_leaves_the_others_alone(isa):
    layer = Layer(Shape(37, 40, 70), bias="float")
    packed, side, n = ops.pack_weight(layer.weight), layer.weight_side, {"out_features": 40}
    clean = layer.float_input(torch.float32)
    scale, zero = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32)
    for value, row in itertools.product(NOT_FINITE, (0, 5, 36)):
        x = clean.clone()
        x[row, 69] = value
        others = torch.arange(37) != row
        for symmetric in (True, False):
            y = ops.linear_dynamic(x, packed, **side, **n, symmetric=symmetric)
            expected = ops.linear_dynamic(clean, packed, **side, **n, symmetric=symmetric)
            assert y[row].isnan().all()
            assert_same_bits(y[others], expected[others])
        y = ops.linear_static(x, scale, zero, packed, **side, **n)
        assert_same_bits(
            y[others], ops.linear_static(clean, scale, zero, packed, **side, **n)[others]
        )
        assert y[row].isnan().all() == math.isnan(value)
        quantized = ops.linear_static(
            x,
            scale,
            zero,
            packed,
            **side,
            **n,
            output_scale=torch.tensor([1.0]),
            output_zero_point=-3,
            output_dtype=torch.int8,
        )
        if math.isnan(value):
            assert quantized[row].eq(-3).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 1, 3)], ids=str)
def test_layout_of_the_input_does_not_matter(layout, leading):
    weight, side = integers(20, 33), Layer(Shape(6, 20, 33)).weight_side
    packed = ops.pack_weight(weight)
    for dtype in FLOATS:
        x = in_layout(floats(*leading, 33).to(dtype), layout)
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, **side, out_features=20),  # noqa: B023
            functional.linear_dynamic(x, weight, **side),
        )
        check_everywhere(
            lambda: ops.quantize_per_token(x, symmetric=False),  # noqa: B023
            functional.quantize_per_token(x, symmetric=False),
        )
    xq = in_layout(integers(*leading, 33), layout)
    check_everywhere(
        lambda: quantized_linear(xq, PackedWeight(packed, 20, 33), input_scale=0.1, **side),
        functional.quantized_linear(xq, weight, input_scale=0.1, **side),
    )


def test_expanded_tensors():
    row, weight = floats(1, 40), integers(20, 40)
    packed, x = ops.pack_weight(weight), row.expand(35, 40)
    bias, scale = torch.tensor([0.5]).expand(20), torch.tensor([0.1]).expand(20)
    zero = torch.tensor([3], dtype=torch.int32).expand(20)
    check_everywhere(
        lambda: ops.linear_dynamic(x, packed, scale, zero, bias, out_features=20),
        functional.linear_dynamic(x, weight, scale, zero, bias),
    )
    column = floats(35, 1).expand(35, 40)
    check_everywhere(
        lambda: ops.linear_dynamic(column, packed, scale, out_features=20),
        functional.linear_dynamic(column, weight, weight_scale=scale),
    )
    weights = integers(1, 40).expand(20, 40)
    check_everywhere(
        lambda: ops.int8_mm(integers(5, 40, seed=1), ops.pack_weight(weights), 20),
        (integers(5, 40, seed=1).int() @ weights.int().t()),
    )


def test_parameters_in_any_layout():
    layer = Layer(Shape(9, 21, 40), bias="float", weight_zero_point=True)
    x, side, packed = layer.float_input(torch.float32), layer.weight_side, layer.weight
    expected = functional.linear_dynamic(x, packed, bias=layer.bias_tensor, **side)
    packed = in_layout(ops.pack_weight(packed), "offset")  # contiguous, at an odd address
    assert packed.data_ptr() % 2 == 1
    for layout in ("offset", "strided"):
        scale, zero, bias = (
            in_layout(t, layout)
            for t in (side["weight_scale"], side["weight_zero_point"], layer.bias_tensor)
        )
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, scale, zero, bias, out_features=21),  # noqa: B023
            expected,
        )
    rows = in_layout(positive(9, 1), "strided")
    zeros = in_layout(integers(9, 1).int(), "strided")
    xq = layer.integer_input(torch.int8)
    check_everywhere(
        lambda: quantized_linear(
            xq, PackedWeight(packed, 21, 40), input_scale=rows, input_zero_point=zeros, **side
        ),
        functional.quantized_linear(
            xq, layer.weight, input_scale=rows, input_zero_point=zeros, **side
        ),
    )


@pytest.mark.parametrize("rows", [0, 1], ids=["no_rows", "one_row"])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0)], ids=str)
def test_empty_and_one_dimensional_batches(rows, leading):
    """No rows at all, and [K] without a batch dimension."""
    shape = (*leading, rows, 30) if leading or not rows else (30,)
    weight, packed = integers(7, 30), ops.pack_weight(integers(7, 30))
    side = Layer(Shape(1, 7, 30)).weight_side
    x = floats(*shape) if math.prod(shape) else torch.empty(shape)
    q = integers(*shape)
    check_everywhere(
        lambda: ops.linear_dynamic(x, packed, **side, out_features=7),
        functional.linear_dynamic(x, weight, **side),
    )
    check_everywhere(
        lambda: quantized_linear(q, PackedWeight(packed, 7, 30), input_scale=0.1, **side),
        functional.quantized_linear(q, weight, input_scale=0.1, **side),
    )
    check_everywhere(lambda: ops.int8_mm(q, packed, 7), q.int() @ weight.int().t())
    check_everywhere(lambda: ops.quantize_per_token(x), functional.quantize_per_token(x))
    check_everywhere(lambda: ops.quantize(x, 0.1), functional.quantize(x, 0.1))
    check_everywhere(lambda: ops.dequantize(q, 0.1), functional.dequantize(q, 0.1))


# ---------------------------------------------------------------- fused and unfused


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_dynamic_is_its_steps(isa, symmetric, activation, dtype):
    """Quantize the rows, multiply, activate, round: one operator or four, the same bits."""
    layer = Layer(Shape(19, 35, 72), bias="float", weight_zero_point=True)
    x, packed, side = layer.float_input(dtype, "not_finite"), layer.weight, layer.weight_side
    packed = ops.pack_weight(packed)
    q, scale, zero_point = ops.quantize_per_token(x, symmetric=symmetric)
    y = ops.linear_static(
        q, scale, zero_point, packed, **side, bias=layer.bias_tensor, out_features=35
    )
    y = functional.ACTIVATIONS[activation](y).to(dtype)
    fused = ops.linear_dynamic(
        x,
        packed,
        **side,
        bias=layer.bias_tensor,
        out_features=35,
        symmetric=symmetric,
        activation=activation,
    )
    assert_same_bits(fused, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("limits", [(-128, 127), (-127, 127), (-8, 7)], ids=str)
def test_linear_static_is_its_steps(isa, activation, limits):
    layer = Layer(Shape(19, 35, 72), bias="float", weight_zero_point=True)
    x, packed = layer.float_input(torch.float32, "extreme"), ops.pack_weight(layer.weight)
    scale, zero = torch.tensor([0.3]), torch.tensor([-5], dtype=torch.int32)
    q = ops.quantize(x, scale, zero, qmin=limits[0], qmax=limits[1])
    options = {**layer.weight_side, "bias": layer.bias_tensor, "out_features": 35}
    y = functional.ACTIVATIONS[activation](ops.linear_static(q, scale, zero, packed, **options))
    options |= {"activation": activation, "input_qmin": limits[0], "input_qmax": limits[1]}
    assert_same_bits(ops.linear_static(x, scale, zero, packed, **options), y)
    quantized = ops.linear_static(
        x,
        scale,
        zero,
        packed,
        **options,
        output_scale=torch.tensor([0.7]),
        output_zero_point=11,
        output_dtype=torch.int8,
    )
    assert_same_bits(quantized, ops.quantize(y, 0.7, 11))


def test_integer_linear_is_int8_mm_and_its_compensation(isa):
    """The zero-point algebra, once more in int64: sum (p - zp)(w - zw) from four plain sums."""
    layer = Layer(Shape(21, 40, 130))
    x, w, packed = layer.integer_input(torch.uint8), layer.weight, ops.pack_weight(layer.weight)
    zx = integers(21, 1, seed=8, dtype=torch.uint8).to(torch.int32)
    zw = integers(40, seed=9).to(torch.int32)
    acc = ops.int8_mm(x, packed, 40).long()
    acc = acc - zx * w.long().sum(1) - zw * x.long().sum(1, keepdim=True) + 130 * zx * zw
    y = ops.linear_static(x, torch.ones(1), zx, packed, torch.ones(1), zw, out_features=40)
    assert_same_bits(y, acc.float())


# ---------------------------------------------------------------- extreme integers


@pytest.mark.parametrize(
    ("dtype", "value", "weight"),
    [
        (torch.uint8, 255, -128),
        (torch.uint8, 255, 127),
        (torch.uint8, 0, -128),
        (torch.int8, -128, -128),
        (torch.int8, -128, 127),
        (torch.int8, 127, -128),
        (torch.int8, 127, 127),
        (torch.int8, -128, -127),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_extreme_products(dtype, value, weight, rows):
    """All activations and all weights at an end: where 16-bit sums saturate."""
    x = torch.full((rows, 200), value, dtype=dtype)
    w = torch.full((18, 200), weight, dtype=torch.int8)
    packed = ops.pack_weight(w)
    expected = torch.full((rows, 18), value * weight * 200, dtype=torch.int32)
    check_everywhere(lambda: ops.int8_mm(x, packed, 18), expected)


def test_one_weight_of_minus_128_among_many():
    """The flag is per tile of 16 outputs: in the first, in the last, in the tail of K."""
    x = torch.cat([torch.full((3, 77), -128), integers(9, 77).int()]).to(torch.int8)
    for output, position in itertools.product((0, 15, 16, 33), (0, 31, 76)):
        w = torch.full((34, 77), -127, dtype=torch.int8)
        w[output, position] = -128
        expected = x.int() @ w.int().t()
        packed = ops.pack_weight(w)
        check_everywhere(
            lambda: ops.int8_mm(x, packed, 34),  # noqa: B023
            expected,
            what=(output, position),
        )


@pytest.mark.parametrize("inputs", [33_025, 33_026, 65_728, 65_793, 65_794, 131_500])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_deep_sums_are_exact(inputs, dtype):
    """Past 33,025 the sum with zero points on both sides, past 65,793 any, leaves 32 bits."""
    top, limits = 3, torch.iinfo(dtype)
    ends = torch.tensor([[limits.max], [limits.min]]).expand(2, inputs)
    x = torch.cat([ends, integers(1, inputs, dtype=dtype).int()]).to(dtype)
    w = torch.cat([torch.full((1, inputs), -128), torch.full((1, inputs), 127)])
    w = torch.cat([w, integers(1, inputs, seed=1).int()]).to(torch.int8)
    packed = PackedWeight.pack(w)
    zero = torch.tensor([[limits.min], [limits.max], [3]], dtype=torch.int32)
    both = {"weight_zero_point": torch.tensor([127, -128, 5], dtype=torch.int32)}
    both |= {"input_zero_point": zero}
    int_bias = torch.tensor([-(2**31), 2**31 - 1, 12345], dtype=torch.int32)
    for options, bias in itertools.product(
        ({}, {"input_zero_point": zero}, both), (None, torch.randn(top), int_bias)
    ):
        options = {"input_scale": 1.0, "weight_scale": positive(top), **options}
        expected = functional.quantized_linear(x, w, bias, **options)
        check_everywhere(
            lambda: quantized_linear(x, packed, bias, **options),  # noqa: B023
            expected,
            what=options,
        )
    if inputs <= 65_793:
        expected = (x.double() @ w.double().t()).to(torch.int32)
        check_everywhere(lambda: ops.int8_mm(x, packed.packed, top), expected)


@pytest.mark.parametrize("inputs", [33_026, 65_800])
def test_deep_float_rows_are_exact(inputs):
    """The same from float rows: the asymmetric ends -128 and 127 against weights of one sign."""
    x = torch.full((3, inputs), 1.0)
    x[0, 0], x[1, : inputs // 2] = -1.0, 0.0
    x[2] = floats(inputs)
    w = torch.stack([torch.full((inputs,), -128), torch.full((inputs,), 127)]).to(torch.int8)
    packed, scale = ops.pack_weight(w), positive(2)
    zero = torch.tensor([127, -128], dtype=torch.int32)
    for symmetric, zw in itertools.product((True, False), (None, zero)):
        check_everywhere(
            lambda: ops.linear_dynamic(x, packed, scale, zw, out_features=2, symmetric=symmetric),  # noqa: B023
            functional.linear_dynamic(
                x, w, weight_scale=scale, weight_zero_point=zw, symmetric=symmetric
            ),
        )


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    bias=st.sampled_from(["none", "float", "int32"]),
    inputs=st.sampled_from([33_024, 33_027, 66_000, 70_001]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_deep_layers(seed, bias, inputs, activation):
    layer = Layer(Shape(2, 3, inputs), seed, bias, seed % 2 == 0, activation=activation)
    check_integer(layer, (torch.int8, torch.uint8)[seed % 2], per_row=True)
    check_static(layer, zero_point=-100)
    if bias != "int32":
        check_dynamic(layer, symmetric=False)


def test_the_float_bias_is_fused():
    """acc * scale + bias where one and two roundings differ."""
    x = torch.arange(1, 128, dtype=torch.int8).reshape(-1, 1)
    scale = torch.tensor([1 + 2.0**-23])
    bias = -x[:40, 0].float().repeat(5)[:130]
    w = torch.ones(130, 1, dtype=torch.int8)
    packed = PackedWeight.pack(w)
    expected = functional.fmaf(x.float(), scale, bias)
    assert not torch.equal(expected, x.float() * scale + bias)
    check_everywhere(
        lambda: quantized_linear(x, packed, bias, input_scale=scale, weight_scale=1.0), expected
    )


def test_the_integer_bias_is_added_before_the_rounding():
    """2^24 + 1 is no fp32 number: adding in float, or fusing, would lose the one."""
    x = torch.ones(2, 1, dtype=torch.int8)
    w = torch.tensor([[1], [-1], [1]], dtype=torch.int8)
    bias = torch.tensor([2**24, -(2**24), 2**31 - 1], dtype=torch.int32)
    scale = torch.tensor([1 / 3])
    exact = torch.tensor([2**24 + 1, -(2**24) - 1, 2**31], dtype=torch.int64)
    expected = (exact.float() * scale).expand(2, 3)
    packed = PackedWeight.pack(w)
    check_everywhere(
        lambda: quantized_linear(x, packed, bias, input_scale=scale, weight_scale=1.0), expected
    )


def test_scales_that_overflow_or_vanish():
    """sx * sw beyond fp32 gives infinities and NaN, below it zeros, as specified."""
    x = torch.tensor([[1, -1], [0, 0], [127, -128]], dtype=torch.int8)
    w = torch.tensor([[1, 0], [0, 1], [1, 1], [5, -7]], dtype=torch.int8)
    packed, bias = PackedWeight.pack(w), torch.tensor([1.0, INF, -INF, NAN])
    scales = torch.tensor([FLT_MAX, 2.0**-126, NAN]).reshape(3, 1)
    for weight_scale, b, activation in itertools.product(
        (2.0, 2.0**-20, FLT_MAX), (None, bias), ACTIVATIONS
    ):
        options = {"input_scale": scales, "weight_scale": weight_scale, "activation": activation}
        check_everywhere(
            lambda: quantized_linear(x, packed, b, **options),  # noqa: B023
            functional.quantized_linear(x, w, b, **options),
        )
        options |= {"output_scale": 0.5, "output_zero_point": 9}
        check_everywhere(
            lambda: quantized_linear(x, packed, b, **options),  # noqa: B023
            functional.quantized_linear(x, w, b, **options),
        )


# ---------------------------------------------------------------- quantize, dequantize


GRANULARITIES = ("tensor", "axis", "group", "token")


def granularity_of(name: str, dims: int, axis: int, size: int):
    if name == "axis":
        return PerAxis(axis % (2 * dims) - dims)
    return {"tensor": PerTensor(), "group": PerGroup(size), "token": PerToken()}[name]


def parameters(
    granularity, shape: tuple[int, ...], kind: str, seed: int, limits: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    sizes = granularity.scale_shape(shape)
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-8, 3, sizes, generator=g).float())
    scale = scale * (1 + torch.rand(sizes, generator=g))
    if kind == "none":
        return scale, None
    if kind == "real":
        return scale, torch.randn(sizes, generator=g) * 3
    return scale, torch.randint(limits[0], limits[1] + 1, sizes, generator=g).to(torch.int32)


@settings(max_examples=120)
@given(
    shape=st.lists(st.one_of(st.integers(0, 5), st.integers(15, 34)), min_size=1, max_size=3),
    name=st.sampled_from(GRANULARITIES),
    axis=st.integers(0, 5),
    group=st.integers(1, 40),
    dtype=FLOAT_DTYPES,
    bits=st.integers(2, 8),
    signed=st.booleans(),
    kind=st.sampled_from(["none", "integer", "real"]),
    layout=st.sampled_from(LAYOUTS),
    spice=st.sampled_from(list(SPICES)),
    seed=st.integers(0, 10**6),
)
def test_quantize_and_dequantize_are_their_specification(
    shape, name, axis, group, dtype, bits, signed, kind, layout, spice, seed
):
    granularity = granularity_of(name, len(shape), axis, group)
    qmin, qmax = quant_range(bits, signed=signed)
    scale, zero_point = parameters(granularity, tuple(shape), kind, seed, (qmin, qmax))
    x = sprinkle(floats(*shape, seed=seed), SPICES[spice], seed).to(dtype)
    x = in_layout(x, layout) if x.numel() else x
    integer = torch.int8 if signed else torch.uint8
    options = {"granularity": granularity, "qmin": qmin, "qmax": qmax, "dtype": integer}
    expected = functional.quantize(x, scale, zero_point, **options)
    check_everywhere(lambda: ops.quantize(x, scale, zero_point, **options), expected)

    q = integers(*shape, seed=seed, dtype=integer)
    q = in_layout(q, layout) if q.numel() else q
    options = {"granularity": granularity, "dtype": dtype}
    expected = functional.dequantize(q, scale, zero_point, **options)
    check_everywhere(lambda: ops.dequantize(q, scale, zero_point, **options), expected)


@pytest.mark.parametrize("size", [40_000, 65_537])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_large_tensors_and_threads(name, size):
    """Large enough that threads share them: one long span, long rows, many rows, odd lengths."""
    for shape in ((size,), (3, size // 3), (size // 7, 7), (size // 100, 10, 10), (1, size)):
        for axis in range(len(shape) if name == "axis" else 1):
            granularity = granularity_of(name, len(shape), axis, 128)
            scale, zero_point = parameters(granularity, shape, "integer", 1, (-128, 127))
            x = floats(*shape)
            options = {"granularity": granularity}
            q = functional.quantize(x, scale, zero_point, **options)
            check_everywhere(
                lambda: ops.quantize(x, scale, zero_point, **options),  # noqa: B023
                q,
                (1, 2),
            )
            check_everywhere(
                lambda: ops.dequantize(q, scale, zero_point, **options),  # noqa: B023
                functional.dequantize(q, scale, zero_point, **options),
                (1, 2),
            )


@settings(max_examples=60)
@given(
    shape=st.lists(SIZES, min_size=1, max_size=3),
    dtype=FLOAT_DTYPES,
    symmetric=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    spice=st.sampled_from(list(SPICES)),
    seed=st.integers(0, 10**6),
)
def test_quantize_per_token_is_its_specification(shape, dtype, symmetric, layout, spice, seed):
    shape = [min(size, 20) for size in shape[:-1]] + shape[-1:]
    x = sprinkle(floats(*shape, seed=seed), SPICES[spice], seed).to(dtype)
    x = in_layout(x, layout)
    expected = functional.quantize_per_token(x, symmetric=symmetric)
    check_everywhere(lambda: ops.quantize_per_token(x, symmetric=symmetric), expected)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_per_token_of_odd_rows(symmetric, dtype):
    """One extreme each: only zeros, denormals, the largest numbers of both signs, infinity."""
    top = float(torch.finfo(dtype).max)
    small = float(torch.finfo(dtype).smallest_normal) / 4
    rows = [
        [0.0, -0.0],
        [-0.0, -0.0],
        [small, 0.0],
        [-small, small],
        [top, -top],
        [top, 0.0],
        [-top, top / 2],
        [INF, 1.0],
        [-INF, 1.0],
        [NAN, 1.0],
        [INF, -INF],
        [-1.0, -3.0],
        [3.0, 1.0],
        [2.0**-126, 1.0],
    ]
    for width in (2, 8, 31, 32, 33, 70):
        x = torch.tensor(rows, dtype=torch.float64).to(dtype)
        x = torch.cat([x, x[:, :1].expand(-1, width - 2)], dim=1)
        expected = functional.quantize_per_token(x, symmetric=symmetric)
        check_everywhere(lambda: ops.quantize_per_token(x, symmetric=symmetric), expected)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number(dtype):
    """All 65,536 bit patterns through quantize; all results that an 8-bit number can have back."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale, zero in ((0.37, 5), (2.0**-20, -128), (300.0, 0)):
        expected = functional.quantize(x, scale, zero)
        check_everywhere(lambda: ops.quantize(x, scale, zero), expected)  # noqa: B023
    q = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    for exponent in range(-126, 121, 3):
        scale = torch.tensor([1.37 * 2.0**exponent])
        expected = functional.dequantize(q, scale, 3, dtype=dtype)
        check_everywhere(lambda: ops.dequantize(q, scale, 3, dtype=dtype), expected)  # noqa: B023


def test_dequantize_with_a_real_zero_point_rounds_twice():
    """fl(fl(q * s) + z): a fused multiply-add, which compilers like to make of it, differs."""
    q = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).repeat(8)
    scale, zero = torch.tensor([0.1]), torch.tensor([0.7])
    expected = q.float() * scale + zero
    assert not torch.equal(functional.fmaf(q.float(), scale, zero), expected)
    assert_same_bits(functional.dequantize(q, scale, zero), expected)
    check_everywhere(lambda: ops.dequantize(q, scale, zero), expected)


def test_rounding_to_half_types():
    """Ties, overflow and denormals of the output types, through the epilogue of a linear layer."""
    steps = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).reshape(-1, 1)
    weight = PackedWeight.pack(torch.ones(40, 1, dtype=torch.int8))
    scales = torch.exp2(torch.arange(-140, 130, 7).float())[:40]
    scales = torch.cat([scales, torch.ones(40 - len(scales))]) * (1 + 2.0**-11)
    for dtype in FLOATS:
        options = {"input_scale": 1.0, "weight_scale": scales, "output_dtype": dtype}
        expected = (steps.float() * scales).to(dtype)
        check_everywhere(lambda: quantized_linear(steps, weight, **options), expected)  # noqa: B023


# ---------------------------------------------------------------- the packed layout


def packed_by_hand(weight: Tensor) -> Tensor:
    """csrc/formats/int8_tiles.h, read from its picture."""
    outputs, inputs = weight.shape
    tiles, depth = -(-outputs // 16), -(-inputs // 64) * 64
    padded = torch.zeros(tiles * 16, depth, dtype=torch.int8)
    padded[:outputs, :inputs] = weight
    rows = padded.reshape(tiles, 16, depth // 4, 4).transpose(1, 2).reshape(tiles, depth * 16)
    sums = padded.to(torch.int32).sum(1, dtype=torch.int32).reshape(tiles, 16)
    flags = torch.zeros(tiles, 16, dtype=torch.int32)
    flags[:, 0] = (padded == -128).reshape(tiles, -1).any(1)
    flags[:, 1], flags[:, 2], flags[:, 3] = inputs, outputs, 1
    tail = torch.cat([sums, flags], dim=1).view(torch.int8)
    return torch.cat([rows, tail], dim=1)


@settings(max_examples=40)
@given(SIZES, SIZES, st.booleans(), st.sampled_from(LAYOUTS), st.integers(0, 1000))
def test_pack_weight_is_its_picture(outputs, inputs, minus_128, layout, seed):
    weight = integers(outputs, inputs, seed=seed).clamp(min=-128 if minus_128 else -127)
    weight = in_layout(weight, layout)
    expected = packed_by_hand(weight)
    check_everywhere(lambda: ops.pack_weight(weight), expected)
    check_everywhere(lambda: ops.unpack_weight(ops.pack_weight(weight), outputs, inputs), weight)


def test_pack_weight_with_threads():
    weight = integers(1000, 1111)
    check_everywhere(lambda: ops.pack_weight(weight), packed_by_hand(weight), (1, 2))
    packed = ops.pack_weight(weight)
    check_everywhere(lambda: ops.unpack_weight(packed, 1000, 1111), weight, (1, 2))


# ---------------------------------------------------------------- again and again


def test_the_same_call_twice_and_after_others(isa):
    """Scratch memory is kept between calls: what an earlier, larger call left must not show."""
    layer = Layer(Shape(5, 20, 70), bias="float", weight_zero_point=True)
    x, packed, side = layer.float_input(torch.float32), layer.weight, layer.weight_side
    packed = ops.pack_weight(packed)
    first = ops.linear_dynamic(x, packed, **side, out_features=20)
    for shape in (Shape(200, 16, 500), Shape(3, 100, 64), Shape(1, 1, 1000)):
        other = replace(layer, shape=shape)
        big = torch.full((shape.rows, shape.inputs), NAN)
        ops.linear_dynamic(
            big, ops.pack_weight(other.weight), **other.weight_side, out_features=shape.outputs
        )
        ops.int8_mm(
            torch.full(big.shape, -1, dtype=torch.int8),
            ops.pack_weight(other.weight),
            shape.outputs,
        )
        assert_same_bits(ops.linear_dynamic(x, packed, **side, out_features=20), first)


def test_more_threads_than_processors():
    layer = Layer(Shape(150, 260, 300), bias="float", weight_zero_point=True)
    check_dynamic(layer, counts=(1, 2, 5))
    check_integer(layer, per_row=True, counts=(1, 3))
