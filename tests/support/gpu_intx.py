"""Drawn calls of the operators on weights of few bits, for tests on a GPU and on a CPU of those."""

from typing import Any

from support import ACTIVATIONS, FLOATS, positive
from support.aten import PackedIntx
from support.intx_cases import few_bits
from torchquant import quant_range


class Drawn:
    """A weight of random bits and groups; ``case`` draws and has a seed."""

    def __init__(self, case: Any) -> None:
        self.case, self.seed = case, case.seed
        self.bits = case.pick(2, 3, 4, 5, 6, 7, 8)
        group = case.pick(None, 20, 32, 64, 128)
        self.group_size = None if group is None else min(group, case.k)
        shape = (case.n,) if group is None else (case.n, -(-case.k // self.group_size))
        self.scale = positive(*shape, seed=self.seed)
        self.weight = few_bits(case.n, case.k, bits=self.bits, seed=self.seed)
        zeros = few_bits(*shape, bits=self.bits, seed=self.seed + 1)
        self.zero_point = case.pick(None, zeros)

    @property
    def packed(self) -> PackedIntx:
        return PackedIntx((self.weight,), self.scale, self.zero_point, self.bits, self.group_size)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The arguments of a layer that say how the weight was packed."""
        return self.case.n, self.bits, self.group_size, self.zero_point is not None


def pack(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    return drawn.weight, drawn.scale, drawn.zero_point, drawn.bits, drawn.group_size


def unpack(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    outputs, *rest = drawn.sizes
    return drawn.packed, outputs, case.k, *rest


def dynamic(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    rest = (case.pick(True, False), case.pick(*ACTIVATIONS), case.pick(None, *FLOATS))
    return (case.input(), drawn.packed, case.bias(), *drawn.sizes, *rest, case.pick(8, 8, 4))


def floats_stay(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    rest = (case.pick(*ACTIVATIONS), case.pick(None, *FLOATS))
    return (case.input(), drawn.packed, case.bias(), *drawn.sizes, *rest)


def static(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    given = (case.input(), positive(1, seed=drawn.seed), case.zero_points(1))
    rest = (case.pick(*ACTIVATIONS), case.pick(*FLOATS))
    return (*given, drawn.packed, case.bias(), *drawn.sizes, *rest)


def quantize_pack(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    weight = case.x(case.n, case.k, dtype=case.pick(*FLOATS))
    symmetric = case.pick(True, False)
    scale = case.pick(None, drawn.scale) if symmetric else None
    qmin, qmax = quant_range(drawn.bits)
    return weight, scale, drawn.bits, drawn.group_size, qmin, qmax, symmetric
