"""Tensors that fit together for the calls in tests/cases.py, and the list of their generators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from support import Shape, floats, integers, positive
from support.aten import Packed, packed

ONE = torch.tensor([0.02])
ZERO = torch.tensor([3], dtype=torch.int32)


@dataclass
class Operands:
    """Tensors that fit together, each made when it is first used."""

    shape: Shape = field(default_factory=lambda: Shape(6, 20, 70))  # tails on all sides
    dtype: torch.dtype = torch.float32

    @cached_property
    def x(self) -> Tensor:
        return floats(self.shape.rows, self.shape.inputs, seed=6, dtype=self.dtype)

    @cached_property
    def bf16(self) -> Tensor:
        return self.x.bfloat16()

    @cached_property
    def batch(self) -> Tensor:
        return floats(2, 3, self.shape.inputs, seed=16, dtype=self.dtype)

    @cached_property
    def q(self) -> Tensor:
        return integers(self.shape.rows, self.shape.inputs, seed=7)

    @cached_property
    def weight(self) -> Tensor:
        return integers(self.shape.outputs, self.shape.inputs, seed=1)

    @cached_property
    def float_weight(self) -> Tensor:
        return floats(self.shape.outputs, self.shape.inputs, seed=2)

    @property
    def packed(self) -> Packed:
        return packed(self.weight)

    @cached_property
    def half_outputs(self) -> int:
        return (self.shape.outputs + 1) // 2

    @property
    def both(self) -> Packed:
        """Two layers on one input: that of ``packed``, and the first half of its outputs."""
        return packed(self.weight, self.weight[: self.half_outputs])

    @cached_property
    def scale(self) -> Tensor:
        return positive(self.shape.outputs, seed=2)

    @cached_property
    def zero_point(self) -> Tensor:
        return integers(self.shape.outputs, seed=3).to(torch.int32)

    @cached_property
    def bias(self) -> Tensor:
        return floats(self.shape.outputs, seed=4)

    def twice(self, channels: Tensor) -> Tensor:
        """Of both layers of :attr:`both`."""
        return torch.cat([channels, channels[: self.half_outputs]])

    @cached_property
    def rows(self) -> Tensor:
        return positive(self.shape.rows, 1, seed=8)

    @cached_property
    def row_zeros(self) -> Tensor:
        return integers(self.shape.rows, 1, seed=9).to(torch.int32)

    @cached_property
    def columns(self) -> Tensor:
        return positive(self.shape.inputs, seed=10)

    @cached_property
    def groups(self) -> Tensor:
        """Scales of groups of 32."""
        return positive(self.shape.rows, -(-self.shape.inputs // 32), seed=11)

    @cached_property
    def group_zeros(self) -> Tensor:
        return floats(*self.groups.shape, seed=12)

    @cached_property
    def query(self) -> Tensor:
        return floats(3, 4, self.shape.rows, self.shape.inputs, seed=13, dtype=self.dtype)


Samples = Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]
GENERATORS: dict[str, Callable[[Operands], Samples]] = {}


def sample(name: str, *gradients: str, **given: Any) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    return name, given, gradients


def generator(function: Callable[[Operands], Samples]) -> Callable[[Operands], Samples]:
    GENERATORS[function.__name__.removesuffix("_")] = function
    return function
