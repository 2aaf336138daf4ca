"""Results of the low-bit benchmark, and what they say about the formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torchquant.bench.lowbit_shapes import Format, LowbitCase
from torchquant.bench.peers import OURS
from torchquant.bench.results import AnyRun, CaseResult, Extra
from torchquant.bench.roofline import FMA
from torchquant.bench.timing import geometric_mean

LowbitResult = CaseResult[LowbitCase]
INT8 = "torchquant-int8"
# By the names of their peers: whose time is divided by ours.
OTHERS = {
    "onnxruntime": "onnxruntime",
    "llama.cpp": "llama.cpp",
    "torch int4": "torch-int4",
    "our int8 layer": INT8,
    "bf16": "bf16",
    "fp32": "fp32",
}
FEW_ROWS = 16  # up to this, reading the weights is a large part of the time
FLOAT_SUITE = "lowbit-float"


def time_over_ours(result: LowbitResult, peer: str) -> float | None:
    """A peer's time over ours; None if one of both did not run."""
    ours, other = result.seconds(OURS), result.seconds(peer)
    return other / ours if ours and other else None


class LowbitRun(AnyRun[LowbitCase]):
    """A run over linear layers with weights of 2 to 8 bits."""

    @property
    def float_activations(self) -> bool:
        """Whether the products are of floats."""
        return self.suite == FLOAT_SUITE

    @property
    def what(self) -> str:
        """What was measured."""
        activations = "float" if self.float_activations else "dynamic int8"
        return f"linear layers, weights of 2 to 8 bits, {activations} activations"

    @property
    def first_column(self) -> str:
        """The heading over the cases."""
        return "M x N x K, format"

    @property
    def note(self) -> str:
        """What a call is, and what its times are measured in."""
        return (
            "Microseconds per call, fp32 in and out (bf16: bf16; torch-int4: bf16 or fp32). "
            "4g128: 4 bits, 128 inputs share a scale; 4: one scale per output. cold: copies of "
            "the layer take turns, so that the weights are read from memory; otherwise the same "
            "layer is called again and again."
        )

    @property
    def peak_name(self) -> str | None:
        """The peak that bounds the arithmetic: of integers, or of fp32 multiply-adds."""
        if not self.float_activations:
            return self.isa
        wide = self.isa.startswith(("avx512", "amx"))
        return next((name for name in FMA if wide or "512" not in name), None)

    @property
    def peak_gops(self) -> float | None:
        """The measured peak in this run."""
        return self.roofline.gops.get(self.peak_name or "")

    def take_limits(self) -> None:
        """Bound each result by the peak of its own arithmetic."""
        for result in self.results:
            result.limit = self.roofline.limit_of(result.shape, self.peak_name or "")

    def gigabytes(self, result: LowbitResult) -> float | None:
        """GB/s at which a call reads the weight; None for many rows."""
        seconds = result.seconds(OURS)
        if not seconds or result.shape.shape.m > FEW_ROWS:
            return None
        return result.shape.weight_bytes / seconds / 1e9

    def bandwidth_share(self, result: LowbitResult) -> float | None:
        """The same over the measured read bandwidth of a buffer of this size."""
        read = self.gigabytes(result)
        bandwidth = self.roofline.bandwidth(result.shape.cycle_bytes)
        return read / bandwidth if read and bandwidth else None

    def extras(self) -> list[Extra]:
        """Bytes per second, and every library's time over ours."""
        ran = [name for name, peer in OTHERS.items() if peer in self.columns()]
        lines = [[self.first_column, "MB", "GB/s", "of bandwidth", *ran]]
        for result in self.results:
            share = self.bandwidth_share(result)
            lines.append(
                [
                    str(result.shape),
                    f"{result.shape.weight_bytes / 1e6:.2f}",
                    _text(self.gigabytes(result), ".1f"),
                    _text(share, ".0%"),
                    *(_times(time_over_ours(result, OTHERS[name])) for name in ran),
                ]
            )
        return [
            Extra(
                "Weights and scales: megabytes, how fast torchquant reads them, and the share of "
                "the bandwidth measured on a buffer of the size that is read before the same bytes "
                "are read again. Then each library's time over torchquant's.",
                lines,
            )
        ]

    def summary(self) -> dict[str, Any]:
        """Ratios to every library, and what the formats cost."""
        ratios = {name: self._spread(self.results, _over_peer(p)) for name, p in OTHERS.items()}
        return {
            "kind": "summary",
            "suite": self.suite,
            "threads": self.threads,
            "isa": self.isa,
            "cases": len(self.results),
            "time_over_ours": {name: found for name, found in ratios.items() if found},
            "answers": self.answers(),
        }

    def answers(self) -> dict[str, dict[str, Any]]:
        """What the benchmark is asked: each a figure over its cases, with the least one."""
        one = [r for r in self.results if r.shape.shape.m == 1]
        warm, cold = ([r for r in one if r.shape.cold is state] for state in (False, True))
        many = [r for r in self.results if r.shape.shape.m >= 128]
        asked: dict[str, tuple[Iterable[LowbitResult], Callable[[LowbitResult], float | None]]] = {
            "one row, the int8 layer's time over ours": (warm, _over_peer(INT8)),
            "one row, cold, the int8 layer's time over ours": (cold, _over_peer(INT8)),
            "one row, cold, share of the read bandwidth": (cold, self.bandwidth_share),
            "128 rows and more, the int8 layer's time over ours": (many, _over_peer(INT8)),
            "time in groups of 128 over the time in groups of 32": (
                self.results,
                self._other_format(lambda f: Format(f.bits, 128) if f.group_size == 32 else None),
            ),
            "one row, cold, 4 bits' time over that of 2 bits": (
                cold,
                self._other_format(lambda f: Format(4, f.group_size) if f.bits == 2 else None),
            ),
            "one row, 8 bits' time over that of fewer bits": (
                one,
                self._other_format(lambda f: Format(8, f.group_size) if f.bits < 8 else None),
            ),
        }
        found = {words: self._spread(results, value) for words, (results, value) in asked.items()}
        return {words: spread for words, spread in found.items() if spread}

    def lines(self) -> list[str]:
        """The summary as text."""
        summary = self.summary()
        if not summary["time_over_ours"]:
            return [f"{len(self.results)} cases; no ratio, because {OURS} or every peer is missing"]
        lines = [
            f"{name}'s time over ours, geometric mean over {found['cases']} cases: "
            f"{found['geometric_mean']:.2f}x; {found['least']:.2f}x (at {found['least_at']}) to "
            f"{found['most']:.2f}x"
            for name, found in summary["time_over_ours"].items()
        ]
        return lines + [
            f"{words}: {found['least']:.2f} (at {found['least_at']}) to {found['most']:.2f}, "
            f"geometric mean {found['geometric_mean']:.2f}"
            for words, found in summary["answers"].items()
        ]

    def _other_format(
        self, other: Callable[[Format], Format | None]
    ) -> Callable[[LowbitResult], float | None]:
        """The time of the same layer in another format over the time of a result."""
        times = {r.shape: r.seconds(OURS) for r in self.results}

        def value(result: LowbitResult) -> float | None:
            case, wanted = result.shape, other(result.shape.format)
            ours = result.seconds(OURS)
            if wanted is None or not ours:
                return None
            seconds = times.get(LowbitCase(case.shape, wanted, case.cold))
            return seconds / ours if seconds else None

        return value

    @staticmethod
    def _spread(
        results: Iterable[LowbitResult], value: Callable[[LowbitResult], float | None]
    ) -> dict[str, Any] | None:
        found = {str(r.shape): figure for r in results if (figure := value(r))}
        if not found:
            return None
        least = min(found, key=lambda case: found[case])
        return {
            "cases": len(found),
            "geometric_mean": round(geometric_mean(found.values()), 3),
            "least": round(found[least], 3),
            "least_at": least,
            "most": round(max(found.values()), 3),
        }


def _over_peer(peer: str) -> Callable[[LowbitResult], float | None]:
    return lambda result: time_over_ours(result, peer)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
