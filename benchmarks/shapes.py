"""The shapes every benchmark of linear layers runs over: real layer sizes, and the rows they meet.

A layer has N outputs and K inputs, a call has M rows (tokens). The named sizes come from encoders
of width 384 and 768 (MiniLM, BERT) and decoders of width 4096 (7B language models); the odd sizes
are there because a kernel's tails and padding cost most where nothing divides by 16.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LinearShape:
    """One product: `[m, k]` activations with `[n, k]` weights."""

    n: int
    k: int
    m: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product, counted separately."""
        return 2 * self.m * self.n * self.k

    @property
    def layer(self) -> str:
        """The layer's size as text, outputs first: `"768x3072"`."""
        return f"{self.n}x{self.k}"

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


ROWS = (1, 4, 16, 64, 128, 256, 1024)
LAYERS = (
    (384, 384),
    (1536, 384),
    (384, 1536),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (4096, 4096),
    (11008, 4096),
)
ODD_LAYERS = ((100, 100), (129, 257), (333, 77))
SMOKE_SHAPES = (LinearShape(n=384, k=384, m=1), LinearShape(n=129, k=257, m=16))


def linear_shapes() -> list[LinearShape]:
    """Every benchmarked shape, layer by layer, so that weights are prepared once per layer."""
    return [LinearShape(n=n, k=k, m=m) for n, k in LAYERS + ODD_LAYERS for m in ROWS]


def select(shapes: list[LinearShape], patterns: list[str]) -> list[LinearShape]:
    """The shapes whose `MxNxK` matches one of the patterns (`"1x*"`, `"*x768x768"`); all without
    patterns.

    Raises:
        ValueError: a pattern that matches no shape, since a benchmark that silently runs nothing
        looks like a fast one.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(str(shape), pattern) for shape in shapes):
            raise ValueError(
                f"--shapes: {pattern!r} matches no MxNxK of the benchmark, "
                f"which look like {shapes[0]}; try '1x*' or '*x768x768'"
            )
    return [
        s for s in shapes if not patterns or any(fnmatch.fnmatchcase(str(s), p) for p in patterns)
    ]
