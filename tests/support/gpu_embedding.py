"""Drawn calls of the operators on embeddings, for tests on a GPU and on a CPU of those calls."""

from typing import Any

import torch
from torch import Tensor

from support import FLOATS, floats
from support import generator as seeded
from support.gpu_intx import Drawn


def indices(case: Any, *shape: int) -> Tensor:
    found = torch.randint(case.n, shape, generator=seeded(case.seed))
    return found.int() if case.pick(True, False) else found


def table(drawn: Drawn) -> tuple[Any, ...]:
    """The arguments that say how the table was packed."""
    outputs, *rest = drawn.sizes
    return outputs, drawn.case.k, *rest


def rows(case: Any) -> tuple[Any, ...]:
    drawn = Drawn(case)
    return indices(case, case.m), drawn.packed, *table(drawn), case.pick(*FLOATS)


def bags(case: Any) -> tuple[Any, ...]:
    drawn, mode = Drawn(case), case.pick("sum", "mean", "max")
    given = indices(case, case.m) if case.pick(True, False) else indices(case, case.m, 3)
    offsets = None
    if given.dim() == 1:
        offsets = torch.tensor([0, case.m // 3, case.m // 3])  # the second bag is empty
    weights = None
    if mode == "sum" and case.pick(True, False):
        weights = floats(*given.shape, seed=case.seed, dtype=case.pick(*FLOATS))
    rest = (mode, case.pick(None, 0, -1), False, case.pick(*FLOATS))
    return given, drawn.packed, offsets, weights, *table(drawn), *rest
