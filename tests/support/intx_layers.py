"""A linear layer on a weight of 2 to 8 bits in all its options, against its specification."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    SPICES,
    Shape,
    check_everywhere,
    floats,
    in_layout,
    positive,
    sprinkle,
)
from support.intx_cases import few_bits
from support.linear_layers import SIZES
from torchquant import functional, ops

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (None, 32, 64, 128, 20)  # per channel, whole blocks of 32 inputs, and a part of one


@dataclass(frozen=True)
class Layer:
    """A layer's shape and options; the tensors follow from them and the seed."""

    shape: Shape
    bits: int = 4
    group_size: int | None = 32  # in_features at most
    zero_points: bool = False
    bias: bool = False
    activation: str = "none"
    seed: int = 0
    layout: str = "contiguous"

    @property
    def size(self) -> int | None:
        return None if self.group_size is None else min(self.group_size, self.shape.inputs)

    @property
    def weight(self) -> Tensor:
        return few_bits(self.shape.outputs, self.shape.inputs, bits=self.bits, seed=self.seed + 1)

    @property
    def scales(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point."""
        shape = (self.shape.outputs,)
        if self.size is not None:
            shape = (self.shape.outputs, -(-self.shape.inputs // self.size))
        zero = few_bits(*shape, bits=self.bits, seed=self.seed + 3) if self.zero_points else None
        return positive(*shape, seed=self.seed + 2), zero

    @property
    def groups(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.size}

    @property
    def canonical(self) -> dict[str, Any]:
        """The weight as the specification takes it."""
        scale, zero = self.scales
        given = {"weight": self.weight, "weight_scale": scale, "weight_zero_point": zero}
        return {**given, **self.groups, "bias": self.bias_tensor}

    @property
    def packed(self) -> dict[str, Any]:
        """The weight as the operators take it."""
        packed = ops.pack_intx_weight(self.weight, *self.scales, **self.groups)
        given = {"packed": packed, "out_features": self.shape.outputs, **self.groups}
        return {**given, "has_zero_point": self.zero_points, "bias": self.bias_tensor}

    @property
    def bias_tensor(self) -> Tensor | None:
        return floats(self.shape.outputs, seed=self.seed + 4) if self.bias else None

    def input(self, dtype: torch.dtype = torch.float32, spice: str = "plain") -> Tensor:
        x = floats(self.shape.rows, self.shape.inputs, seed=self.seed)
        return in_layout(sprinkle(x, SPICES[spice], self.seed).to(dtype), self.layout)


def layers() -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer,
        shape=st.builds(Shape, st.integers(0, 20), SIZES, SIZES),
        bits=st.sampled_from(BITS),
        group_size=st.one_of(st.sampled_from(GROUPS), st.integers(1, 70)),
        zero_points=st.booleans(),
        bias=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        seed=st.integers(0, 10**6),
        layout=st.sampled_from(LAYOUTS),
    )


def check_dynamic(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    symmetric: bool = True,
    activation_bits: int = 8,
    spice: str = "plain",
    counts: tuple[int, ...] = (1,),
) -> None:
    x, packed = layer.input(dtype, spice), layer.packed
    options = {"symmetric": symmetric, "output_dtype": output_dtype}
    options |= {"activation": layer.activation, "activation_bits": activation_bits}
    expected = functional.linear_dynamic_intx(x, **layer.canonical, **options)
    check_everywhere(
        lambda: ops.linear_dynamic_intx(x, **packed, **options), expected, counts, layer
    )


def check_static(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    zero_point: int = 0,
    limits: tuple[int, int] = (-128, 127),
    output_dtype: torch.dtype = torch.float32,
    spice: str = "plain",
    counts: tuple[int, ...] = (1,),
) -> None:
    x, packed, scale = layer.input(dtype, spice), layer.packed, positive(1, seed=layer.seed + 6)
    options = {"activation": layer.activation, "output_dtype": output_dtype}
    options |= {"input_qmin": limits[0], "input_qmax": limits[1]}
    zero = torch.tensor([zero_point], dtype=torch.int32)
    expected = functional.linear_static_intx(x, scale, zero, **layer.canonical, **options)
    check_everywhere(
        lambda: ops.linear_static_intx(x, scale, zero, **packed, **options),
        expected,
        counts,
        layer,
    )


def check_float(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    spice: str = "plain",
    counts: tuple[int, ...] = (1,),
) -> None:
    x, packed = layer.input(dtype, spice), layer.packed
    options = {"activation": layer.activation, "output_dtype": output_dtype}
    expected = functional.linear_intx(x, **layer.canonical, **options)
    check_everywhere(lambda: ops.linear_intx(x, **packed, **options), expected, counts, layer)


FLOAT_DTYPES = st.sampled_from(FLOATS)
