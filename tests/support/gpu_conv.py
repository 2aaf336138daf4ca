"""Drawn calls of the operators of convolutions, for tests on a GPU and of those tests on a CPU."""

from typing import Any

import torch
from torch import Tensor

from support import ACTIVATIONS, FLOATS, floats, integers, positive
from support.aten import PackedConv


class Drawn:
    """A convolution of random sizes; ``case`` draws and has a seed."""

    def __init__(self, case: Any) -> None:
        self.case, self.seed = case, case.seed
        self.groups, inputs, outputs = case.pick((1, 5, 7), (1, 3, 16), (4, 1, 1), (2, 4, 3))
        spatial = case.pick(1, 2)
        self.channels, self.outputs = self.groups * inputs, self.groups * outputs
        kernel = case.pick(1, 3)
        self.weight = integers(self.outputs, inputs, *[kernel] * spatial, seed=self.seed)
        self.image = (case.pick(1, 3), self.channels, *[case.pick(5, 8)] * spatial)
        self.places = (
            list(self.weight.shape),
            [case.pick(1, 2)] * spatial,
            [case.pick(0, 1) for _ in range(2 * spatial)],
            [case.pick(1, 2)] * spatial,
            self.groups,
        )

    @property
    def packed(self) -> PackedConv:
        return PackedConv((self.weight,), self.groups)

    @property
    def scale(self) -> Tensor:
        return positive(self.outputs, seed=self.seed)

    @property
    def bias(self) -> Tensor | None:
        return self.case.pick(None, floats(self.outputs, seed=self.seed))

    def floats(self) -> Tensor:
        return self.case.x(*self.image)


def static(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    x = case.pick(drawn.floats(), integers(*drawn.image, seed=drawn.seed))
    activation, scale = case.pick(*ACTIVATIONS), positive(1, seed=drawn.seed)
    zero = case.zero_points(1)
    given = (x, scale, zero, drawn.packed, drawn.scale, drawn.bias, *drawn.places, activation)
    if case.pick(True, False):
        return (*given, None, None, 0, case.pick(*FLOATS))
    return (*given, None, None, 0, torch.int8, positive(1, seed=drawn.seed + 1), 3)


def dynamic(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    symmetric, activation = case.pick(True, False), case.pick(*ACTIVATIONS)
    operands = (drawn.packed, drawn.scale, drawn.bias, *drawn.places)
    return (drawn.floats(), *operands, symmetric, activation)


def pack(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    return drawn.weight, drawn.groups


def unpack(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    return drawn.packed, list(drawn.weight.shape), drawn.groups
