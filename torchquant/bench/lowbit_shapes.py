"""The cases of the low-bit benchmark: a layer, a format of its weights, and a number of rows.

The layers are those of language models: of width 4096 (7B), 2048 (1B) and 576 (SmolLM2-135M). A
format is a number of bits and of inputs that share a scale: `4g128`; `4` has a scale per output.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torchquant.bench.shapes import LinearShape

# Weights that are read from memory: so many bytes of copies of a layer are used in turn.
OUT_OF_CACHE_BYTES = 128 << 20
MOST_COPIES = 32


@dataclass(frozen=True)
class Format:
    """Bits of a weight, and the inputs that share a scale; None: one scale per output channel."""

    bits: int
    group_size: int | None = None

    def bytes_of(self, n: int, k: int) -> int:
        """The least bytes of a weight `[n, k]` with float32 scales."""
        groups = 1 if self.group_size is None else -(-k // self.group_size)
        return (n * k * self.bits + 7) // 8 + 4 * n * groups

    def __str__(self) -> str:
        return f"{self.bits}" if self.group_size is None else f"{self.bits}g{self.group_size}"


def parse_format(text: str) -> Format:
    """The format of a text.

    >>> parse_format("4g128")
    Format(bits=4, group_size=128)

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"([2-8])(?:g([1-9]\d*))?", text)
    if not found:
        raise ValueError(
            f"{text!r} is no format; try '4g128' (4 bits, 128 inputs share a scale) or '4' (one "
            "scale per output), with 2 to 8 bits"
        )
    return Format(int(found[1]), int(found[2]) if found[2] else None)


@dataclass(frozen=True)
class LowbitCase:
    """One product with a weight in a format.

    `cold`: copies of the layer are called in turn, so that no cache holds the weight, as in a model
    that is larger than the caches.
    """

    shape: LinearShape
    format: Format
    cold: bool = False

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product, counted separately."""
        return self.shape.operations

    @property
    def weight_bytes(self) -> int:
        """The least bytes of the weight and its scales."""
        return self.format.bytes_of(self.shape.n, self.shape.k)

    @property
    def limit_bytes(self) -> int:
        """The weight's bytes: whatever the number of rows, all of them are read."""
        return self.weight_bytes

    @property
    def cycle_bytes(self) -> int:
        """The bytes that are read before the same ones are read again."""
        return self.weight_bytes * (copies(self.weight_bytes) if self.cold else 1)

    def load_request(self) -> dict[str, int | bool | None]:
        """The layer."""
        layer = self.shape.load_request()
        return {
            **layer,
            "bits": self.format.bits,
            "group_size": self.format.group_size,
            "cold": self.cold,
        }

    def input_request(self) -> dict[str, int]:
        """The rows."""
        return self.shape.input_request()

    def fields(self) -> dict[str, int | bool | None]:
        """The case in a results file."""
        return {
            **self.shape.fields(),
            "bits": self.format.bits,
            "group_size": self.format.group_size,
            "cold": self.cold,
            "weight_bytes": self.weight_bytes,
        }

    def __str__(self) -> str:
        return f"{self.shape} {self.format}{' cold' if self.cold else ''}"


def copies(layer_bytes: int) -> int:
    """How many copies of a layer are used in turn, so that no cache holds them.

    >>> copies(8 << 20), copies(1 << 10)
    (16, 32)
    """
    return max(2, min(MOST_COPIES, -(-OUT_OF_CACHE_BYTES // layer_bytes)))


def _formats(*texts: str) -> tuple[Format, ...]:
    return tuple(parse_format(text) for text in texts)


MANY = _formats(
    *("8g128", "8g32", "8", "6g128", "5g128", "4g128", "4g64", "4g32", "4"),
    *("3g128", "3g32", "2g128", "2g64", "2g32"),
)
MOST = _formats("8g128", "6g128", "5g128", "4g128", "4g32", "3g128", "2g128")
SOME = _formats("8g128", "4g128", "4g32", "2g128")
FEW = _formats("8g128", "4g128", "2g128")
NARROW = _formats("8g64", "4g64", "4g32", "2g64")  # 576 inputs are no multiple of 128
# (rows, outputs, inputs), formats, whether the weights are out of the caches.
CASES: tuple[tuple[tuple[int, int, int], tuple[Format, ...], bool], ...] = (
    ((1, 4096, 4096), MANY, False),
    ((1, 4096, 4096), MOST, True),
    ((1, 11008, 4096), FEW, False),
    ((1, 11008, 4096), FEW, True),
    ((1, 1536, 576), NARROW, False),
    ((1, 49152, 576), _formats("8g64", "4g64"), False),
    ((1, 8192, 2048), _formats("4g128", "2g128"), False),
    ((4, 4096, 4096), _formats("4g128", "2g128"), False),
    ((16, 4096, 4096), SOME, False),
    ((256, 4096, 4096), SOME, False),
    ((256, 1536, 576), _formats("4g64"), False),
)
SMOKE_CASES = (
    LowbitCase(LinearShape(n=64, k=128, m=1), Format(4, 32)),
    LowbitCase(LinearShape(n=64, k=128, m=1), Format(2, 64), cold=True),
    LowbitCase(LinearShape(n=48, k=96, m=5), Format(8)),
)


def lowbit_cases() -> list[LowbitCase]:
    """The cases of the benchmark, layer by layer and format by format."""
    return [
        LowbitCase(LinearShape(n=n, k=k, m=m), format, cold)
        for (m, n, k), formats, cold in CASES
        for format in formats
    ]


def select(
    cases: Iterable[LowbitCase], shapes: Iterable[str], formats: Iterable[str]
) -> list[LowbitCase]:
    """The cases whose `MxNxK` and format match; all without patterns.

    A shape without `*`, `?` or `[`, and a format, need not be among the cases: every such shape is
    then measured in every such format.

    Args:
        cases: to choose from.
        shapes: patterns (`"1x*"`) or shapes (`"7x500x300"`, `"1x4096x4096c"` with the weights out
            of the caches).
        formats: `"4g128"`, `"8"`.

    Raises:
        ValueError: a pattern matches no case, or a text is no format.
    """
    known, wanted = list(cases), [parse_format(text) for text in formats]
    if not shapes:
        layers = dict.fromkeys((case.shape, case.cold) for case in known)
    else:
        layers = {}
        for pattern in shapes:
            layers |= dict.fromkeys(_matching(known, pattern))
    if not wanted:
        found = [case for case in known if (case.shape, case.cold) in layers]
        own = [layer for layer in layers if layer not in {(c.shape, c.cold) for c in known}]
        return found + [LowbitCase(shape, format, cold) for shape, cold in own for format in SOME]
    return [LowbitCase(shape, format, cold) for shape, cold in layers for format in wanted]


def _matching(cases: list[LowbitCase], pattern: str) -> list[tuple[LinearShape, bool]]:
    named = {(c.shape, c.cold): f"{c.shape}{'c' if c.cold else ''}" for c in cases}
    found = [layer for layer, name in named.items() if fnmatch.fnmatchcase(name, pattern)]
    exact = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(c?)", pattern)
    if exact and not found:
        m, n, k = (int(number) for number in exact.groups()[:3])
        found = [(LinearShape(n=n, k=k, m=m), exact[4] == "c")]
    if not found:
        raise ValueError(
            f"{pattern!r} matches no MxNxK of the benchmark, for example {cases[0].shape}; try "
            "'1x*', '*x4096x4096', '*c' (weights out of the caches) or your own shape"
        )
    return found
