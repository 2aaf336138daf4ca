"""The shapes of the linear benchmarks: sizes of real layers, and their numbers of rows.

A layer has N outputs and K inputs, a call has M rows (tokens). The named sizes come from encoders
of width 384 and 768 (MiniLM, BERT) and decoders of width 4096 (7B language models); the odd sizes
are included because a kernel's tails and padding cost most if no size is a multiple of 16.
"""

from __future__ import annotations

import fnmatch
import math
import random
import re
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
    def weight_bytes(self) -> int:
        """Bytes of the int8 weight."""
        return self.n * self.k

    @property
    def limit_bytes(self) -> int:
        """The weight's bytes: whatever the number of rows, all of them are read."""
        return self.weight_bytes

    @property
    def cycle_bytes(self) -> int:
        """The same: the next call reads them again."""
        return self.limit_bytes

    @property
    def traffic_bytes(self) -> int:
        """The least bytes of a call's reads and writes: int8 weight, fp32 input and result."""
        return self.n * self.k + 4 * self.m * (self.n + self.k)

    @property
    def is_large(self) -> bool:
        """Whether all three dimensions are at least `LARGE_DIMENSION`."""
        return min(self.m, self.n, self.k) >= LARGE_DIMENSION

    @property
    def layer(self) -> str:
        """The layer's size as text, outputs first: `"768x3072"`."""
        return f"{self.n}x{self.k}"

    def load_request(self) -> dict[str, int]:
        """The layer."""
        return {"n": self.n, "k": self.k}

    def input_request(self) -> dict[str, int]:
        """The rows."""
        return {"m": self.m}

    def fields(self) -> dict[str, int]:
        """The shape in a results file."""
        return {"n": self.n, "k": self.k, "m": self.m}

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
RANDOM_SHAPES = 40
MOST_PRODUCTS = 1 << 32  # of a random shape: fp32 then takes about 50 ms
LARGE = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 4096, 4096), (1024, 11008, 4096))
FEW_ROWS = (1, 2, 4, 8, 16)
STREAMED_LAYERS = (
    (11008, 4096),
    (4096, 11008),
)  # few rows: reading weights dominates
LARGE_DIMENSION = 1024
SMOKE_SHAPES = (LinearShape(n=384, k=384, m=1), LinearShape(n=129, k=257, m=16))


def named_shapes() -> list[LinearShape]:
    """The layers above with every number of rows."""
    return [LinearShape(n=n, k=k, m=m) for n, k in LAYERS + ODD_LAYERS for m in ROWS]


def random_shapes(count: int = RANDOM_SHAPES, seed: int = 0) -> list[LinearShape]:
    """Random shapes: M 1 to 2048, N and K 32 to 8192, also odd ones.

    Log-uniform, at most `MOST_PRODUCTS` multiplications each; the same for the same seed.

    >>> random_shapes(2) == random_shapes(3)[:2]
    True
    """
    generator = random.Random(seed)
    shapes: list[LinearShape] = []
    while len(shapes) < count:
        m, n, k = (
            round(math.exp(generator.uniform(math.log(low), math.log(high))))
            for low, high in ((1, 2048), (32, 8192), (32, 8192))
        )
        if m * n * k <= MOST_PRODUCTS:
            shapes.append(LinearShape(n=n, k=k, m=m))
    return shapes


def linear_shapes() -> list[LinearShape]:
    """The shapes of the dynamic suite, layer by layer: weights are prepared once per layer."""
    return named_shapes() + random_shapes()


def prequantized_shapes() -> list[LinearShape]:
    """The shapes of the prequantized suite: large products, and few rows on large weights."""
    large = [LinearShape(n=n, k=k, m=m) for m, n, k in LARGE]
    few = [LinearShape(n=n, k=k, m=m) for n, k in STREAMED_LAYERS for m in FEW_ROWS]
    tall = LinearShape(n=4096, k=11008, m=1024)
    return sorted([*large, *few, tall])


SUITE_SHAPES = {"dynamic": linear_shapes, "prequantized": prequantized_shapes}


def select(shapes: list[LinearShape], patterns: list[str]) -> list[LinearShape]:
    """The shapes whose `MxNxK` matches one of the patterns; all without patterns.

    A pattern without `*`, `?` or `[` is a shape (`"7x500x300"`), which need not be in `shapes`.

    Raises:
        ValueError: a pattern matches no shape; a benchmark without shapes would look fast.
    """
    if not patterns:
        return shapes
    chosen: dict[LinearShape, None] = {}
    for pattern in patterns:
        found = [shape for shape in shapes if fnmatch.fnmatchcase(str(shape), pattern)]
        exact = re.fullmatch(r"(\d+)x(\d+)x(\d+)", pattern)
        if exact and not found:
            m, n, k = map(int, exact.groups())
            found = [LinearShape(n=n, k=k, m=m)] if min(m, n, k) >= 1 else []
        if not found:
            raise ValueError(
                f"{pattern!r} matches no MxNxK of the benchmark, "
                f"for example {shapes[0]}; try '1x*', '*x768x768' or your own shape"
            )
        chosen.update(dict.fromkeys(found))
    known = [shape for shape in shapes if shape in chosen]
    return known + [shape for shape in chosen if shape not in known]
