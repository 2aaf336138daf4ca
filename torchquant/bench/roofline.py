"""The machine's limits, measured with every benchmark: arithmetic and read bandwidth.

The loops are part of the C++ library (`csrc/bench/peak.cpp`), so nothing is compiled at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torchquant._extension import load
from torchquant.bench.case import Case

ARITHMETIC, BANDWIDTH = "arithmetic", "bandwidth"
VPDPBUSD = ("avx512_vnni", "avx_vnni")  # instruction sets whose peak is that of vpdpbusd
FMA = ("fp32_fma_512", "fp32_fma_256")
# Below this size, bandwidth is measured at the nearest power of sqrt(2); above, at the size.
EXACT_MEBIBYTES = 4.0
# Buffers of `torchquant bench roofline`: the caches' sizes, and two layers of a language model.
DEFAULT_MEBIBYTES = (0.03125, 0.25, 1.0, 2.0, 4.0, 16.0, 43.0, 256.0)
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limit:
    """The least possible seconds of a product, and their cause: arithmetic or bandwidth."""

    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Roofline:
    """The limits of a number of threads together.

    `gops` by instruction set, in 10^9 operations per second (a multiply-add counts as two); `read`
    in GB/s, by the MiB that are read again and again.
    """

    threads: int
    gops: dict[str, float]
    read: dict[float, float]

    def best_of(self, other: Roofline | None) -> Roofline:
        """The larger of each two values: disturbances and clocks can only lower a peak."""
        if other is None:
            return self
        return Roofline(
            self.threads,
            {name: max(value, other.gops.get(name, 0)) for name, value in self.gops.items()},
            {size: max(value, other.read.get(size, 0)) for size, value in self.read.items()},
        )

    def bandwidth(self, size: int) -> float | None:
        """GB/s at the measured size nearest to `size` bytes; None if no size was measured."""
        if not self.read:
            return None
        mebibytes = max(size, 1) / MEBIBYTE
        nearest = min(self.read, key=lambda measured: abs(math.log(measured / mebibytes)))
        return self.read[nearest] or None

    def limit(
        self, operations: int, weight_bytes: int, isa: str, cycle_bytes: int | None = None
    ) -> Limit | None:
        """The least time of any int8 product: of its arithmetic, or of reading its weights.

        Quantization, the traffic of activations and result and the call itself come on top. None
        where the instruction set or the bandwidth was not measured.

        Args:
            operations: multiplications and additions, counted separately.
            weight_bytes: what a call reads.
            isa: the instruction set, as `gops` names it.
            cycle_bytes: what is read before the same bytes are read again; `weight_bytes` if None.
        """
        bandwidth = self.bandwidth(cycle_bytes or weight_bytes)
        if isa not in self.gops or bandwidth is None:
            return None
        arithmetic = operations / self.gops[isa] / 1e9
        memory = weight_bytes / bandwidth / 1e9
        return Limit(max(arithmetic, memory), ARITHMETIC if arithmetic > memory else BANDWIDTH)

    def limit_of(self, case: Case, isa: str) -> Limit | None:
        """The limit of a case."""
        return self.limit(case.operations, case.limit_bytes, isa, case.cycle_bytes)

    def vpdpbusd(self) -> float | None:
        """The peak of `vpdpbusd` with the widest registers of this CPU."""
        return next((self.gops[name] for name in VPDPBUSD if name in self.gops), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, rounded to the precision of the measurement."""
        data = asdict(self)
        data["gops"] = {name: round(value, 1) for name, value in self.gops.items()}
        data["read"] = {str(size): round(value, 1) for size, value in self.read.items()}
        return data


def measured_mebibytes(sizes: Iterable[int]) -> list[float]:
    """The buffer sizes in MiB at which to measure the bandwidth for layers of these bytes.

    Layers of nearly the same size share one.

    >>> measured_mebibytes([2**20, 2**20 + 1000, 11008 * 4096])
    [1.0, 43.0]
    """
    wanted = set()
    for size in sizes:
        mebibytes = size / MEBIBYTE
        if mebibytes < EXACT_MEBIBYTES:
            mebibytes = max(2**-8, 2 ** (round(2 * math.log2(mebibytes)) / 2))
        wanted.add(round(mebibytes, 4))
    return sorted(wanted)


def measure_roofline(
    threads: int, sizes: Iterable[int] = (), seconds: float = 0.1, names: Iterable[str] = ()
) -> Roofline:
    """Measure for `seconds` each: the arithmetic peaks, and the bandwidth at `sizes` bytes.

    Args:
        names: of the peaks, as `_C.peak_names()` lists them; all of these without.
    """
    library = load()
    gops = {
        name: library.measure_peak(name, threads, seconds)
        for name in list(names) or library.peak_names()
    }
    read = {
        size: library.measure_bandwidth(round(size * MEBIBYTE), threads, seconds)
        for size in measured_mebibytes(sizes)
    }
    return Roofline(threads, gops, {size: value for size, value in read.items() if value > 0})
