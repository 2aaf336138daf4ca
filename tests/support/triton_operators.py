"""Calls of operators on Triton's kernels for tests, with the expected results and odd arguments.

Import :mod:`support.triton` (or this module) before anything of torchquant.triton.
"""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import torchquant  # noqa: F401  (the operators)
from support import (
    EXTREME,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    generator,
    sprinkle,
)
from support.triton import DEVICE, module
from support.triton import poisoned as poison
from torchquant.cuda.host import FAMILY_OF

layout, norms, tiles = (module(name) for name in ("layout", "kernels.norms", "kernels.tiles"))
CPU = torch.ops.torchquant
RANGES = ((-128, 127), (-127, 127), (0, 255), (-8, 7), (0, 15), (-2, 1), (0, 3), (-(2**20), 2**20))
ZERO_POINTS = ("none", "integer", "one_integer", "far_integer", "real", "one_real")


@pytest.fixture
def small_tiles_and_poisoned_memory(monkeypatch):
    """Small tensors need several programs; torch.empty returns NaN or large integers."""
    monkeypatch.setattr(tiles, "TILE", 512)
    monkeypatch.setattr(norms, "LEAST_PROGRAMS", 2)
    monkeypatch.setattr(norms, "CACHED_BYTES", 2**12)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def operator(name: str) -> Any:
    """The function of torchquant.triton for the operator."""
    return getattr(module(f"ops.{FAMILY_OF[name]}"), name)


def moved(*arguments):
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]


def run(name, *args, **kwargs):
    """The operator in Triton, and on the CPU."""
    got = operator(name)(*moved(*args), **kwargs)
    assert got is not NotImplemented
    expected = getattr(torch.ops.torchquant, name)(*args, **kwargs)
    return got, expected


def check(name, *args, **kwargs):
    got, expected = run(name, *args, **kwargs)
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device == DEVICE or ours.device.type == DEVICE.type
        assert_same_bits(ours.cpu(), theirs, (name, kwargs))


def awkward(*shape, seed=0, dtype=torch.float32, share=0.1):
    """Values near the ends of every range, and all special values."""
    x = floats(*shape, seed=seed)
    return sprinkle(x, SPECIAL + EXTREME + NOT_FINITE, seed, share).to(dtype)


def layouts_of_scales(shape):
    """``axis`` or ``group_size`` of every kind, also with groups that do not divide the row."""
    found = [{}, *({"axis": axis} for axis in range(-len(shape), len(shape)))]
    row = shape[-1]
    return found + [{"group_size": size} for size in sorted({1, 3, 8, 32, row, row + 5})]


def scales_of(x, layout, seed=0):
    """Ordinary scales, and sometimes the least scale, a huge scale or NaN."""
    _, shape = tiles.spans_of(x.shape, layout.get("axis"), layout.get("group_size"))
    s = torch.rand(shape, generator=generator(seed)) * 0.3 + 1e-3
    pick = torch.randint(0, 40, shape, generator=generator(seed + 1))
    s[pick == 0] = 2.0**-126
    s[pick == 1] = 2.0**100
    s[pick == 2] = NAN
    return s


def zero_points(kind, shape, qmin, qmax, seed=0):
    if kind == "none":
        return None
    if kind.startswith("one"):
        shape = (1,)
    if kind.endswith("real"):
        return torch.randn(shape, generator=generator(seed))
    if kind == "far_integer":
        return torch.tensor([-(2**22), 2**22, 1000])[
            torch.randint(0, 3, shape, generator=generator(seed))
        ].to(torch.int32)
    return torch.randint(qmin, qmax + 1, shape, generator=generator(seed)).to(torch.int32)


shapes = st.builds(
    lambda sizes, last: (*sizes, last), st.lists(st.integers(1, 6), max_size=2), st.integers(1, 80)
)
seeds = st.integers(0, 10_000)


def call(name: str, *args: object) -> object:
    """The Triton operator on ``DEVICE``, with poison in the memory that it allocates."""
    empty = torch.empty

    def poisoned_empty(*size: object, dtype: torch.dtype, device: object = None) -> Tensor:
        shape = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
        return poison(*shape, dtype=dtype)

    moved = [arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args]
    torch.empty = poisoned_empty
    try:
        return operator(name)(*moved)
    finally:
        torch.empty = empty


def check_rows(name: str, tiles: list[object], rows: list[object], what: object = "") -> None:
    """``name`` gives the CPU's bits; ``tiles`` and ``rows`` differ in how the weight is packed."""
    got, expected = call(name, *rows), getattr(CPU, name)(*tiles)
    assert got is not NotImplemented, what
    if isinstance(expected, Tensor):
        got, expected = [got], [expected]
    for index, (one, want) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(one.cpu(), want, f"{name}, result {index}, {what}")


def in_rows(weight: Tensor) -> Tensor:
    """The rows layout as csrc/formats/int8_rows.h draws it, in plain torch."""
    n, k = weight.shape
    packed = torch.zeros(layout.layout_shape(n, k), dtype=torch.int8)
    packed[:n, :k] = weight
    sums = torch.zeros(layout.padded_n(n), dtype=torch.int32)
    sums[:n] = weight.sum(1)
    packed.view(-1)[layout.padded_n(n) * packed.shape[1] :][: 4 * len(sums)] = sums.view(torch.int8)
    return packed
