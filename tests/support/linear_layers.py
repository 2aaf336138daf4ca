"""A linear layer in all its options, and its operators against their specification."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    SHAPES,
    SPICES,
    Shape,
    check_everywhere,
    floats,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant.scheme import quant_range

SIZES = st.one_of(
    st.integers(1, 10),
    st.sampled_from([2**power + step for power in range(4, 8) for step in (-1, 0, 1)]),
)


FLOAT_DTYPES = st.sampled_from(FLOATS)
shape_classes = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


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


def activation_at(number: int, shape: Shape) -> str:
    """Another one each time; the specification of the long ones is slow on large results."""
    return ACTIVATIONS[number % (5 if shape.rows * shape.outputs < 8000 else 2)]
