"""Results of a linear benchmark: of a shape, of a run, and their summaries."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic

from torchquant.bench.case import C
from torchquant.bench.peers import EVERY_SUITE, OURS
from torchquant.bench.roofline import Limit, Roofline
from torchquant.bench.shapes import LinearShape
from torchquant.bench.timing import geometric_mean

SMALL_ROWS = 16  # up to this, memory and overhead dominate a call; beyond, arithmetic
FLOAT_PEERS = ("fp32", "bf16")
BEHIND = 0.95  # a ratio below this is not a measuring error
STREAM_BYTES = 32 << 20  # larger weights are read from the outermost cache or from memory


@dataclass
class CaseResult(Generic[C]):
    """Times of one case, and what its peers needed.

    `blocks` holds, by peer and by way of calling it, the median seconds per call of each block;
    `megabytes` the most memory that a peer held while it ran, where its worker says so.
    """

    shape: C
    blocks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limit: Limit | None = None
    uncompared: frozenset[str] = (
        frozenset()
    )  # other ways of using torchquant, which are not compared
    megabytes: dict[str, float] = field(default_factory=dict)

    def add(self, peer: str, seconds: dict[str, float], megabytes: float | None = None) -> None:
        """Add one block's times, by way of calling, and the peer's memory."""
        if megabytes is not None:
            self.megabytes[peer] = max(megabytes, self.megabytes.get(peer, 0.0))
        for variant, value in seconds.items():
            self.blocks.setdefault(peer, {}).setdefault(variant, []).append(value)

    def variant(self, peer: str) -> str:
        """The fastest way of calling the peer."""
        return min(self.blocks[peer], key=lambda name: statistics.median(self.blocks[peer][name]))

    def seconds(self, peer: str) -> float | None:
        """Median over blocks of the peer's fastest way of calling; None if it did not run."""
        if peer not in self.blocks:
            return None
        return statistics.median(self.blocks[peer][self.variant(peer)])

    def shortest_block(self, peer: str) -> float:
        """The shortest of the peer's blocks: an estimate that disturbances do not change."""
        return min(min(values) for values in self.blocks[peer].values())

    def best_peer(self, without: tuple[str, ...] = ()) -> str | None:
        """The fastest of the other peers."""
        others = {
            name: self.seconds(name) or 0.0
            for name in self.blocks
            if name != OURS and name not in self.uncompared and name not in without
        }
        return min(others, key=lambda name: others[name]) if others else None

    def ratio(self, without: tuple[str, ...] = ()) -> float | None:
        """Best peer's time over ours; above 1, torchquant is faster."""
        ours, best = self.seconds(OURS), self.best_peer(without)
        best_seconds = self.seconds(best) if best else None
        return best_seconds / ours if ours and best_seconds else None

    def gops(self, peer: str = OURS) -> float | None:
        """Billions of operations per second."""
        seconds = self.seconds(peer)
        return self.shape.operations / seconds / 1e9 if seconds else None

    def limit_share(self) -> float | None:
        """The least possible time, as measured on this machine, over ours."""
        ours = self.seconds(OURS)
        return self.limit.seconds / ours if self.limit and ours else None

    def record(self) -> dict[str, Any]:
        """The shape's line of the results file."""
        return {
            "kind": "shape",
            **self.shape.fields(),
            "us": {name: _microseconds(self.seconds(name)) for name in self.blocks},
            "variant": {
                name: self.variant(name) for name, ways in self.blocks.items() if len(ways) > 1
            },
            "best_peer": self.best_peer(),
            "ratio": _rounded(self.ratio(), 3),
            "gops": _rounded(self.gops(), 1),
            "limit_us": _microseconds(self.limit.seconds if self.limit else None),
            "bound_by": self.limit.bound_by if self.limit else None,
            "of_limit": _rounded(self.limit_share(), 3),
            "blocks_us": {
                name: {
                    way: [_microseconds(value) for value in values] for way, values in ways.items()
                }
                for name, ways in self.blocks.items()
            },
            **({"megabytes": self.megabytes} if self.megabytes else {}),
            "failures": self.failures,
        }


ShapeResult = CaseResult[LinearShape]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)


def summarise(results: list[ShapeResult]) -> dict[str, Any]:
    """A few numbers about all shapes. Ratios are best peer's time over ours."""
    ratios = {result.shape: ratio for result in results if (ratio := result.ratio())}
    if not ratios:
        return {"kind": "summary", "shapes": len(results)}
    small = [ratio for shape, ratio in ratios.items() if shape.m <= SMALL_ROWS]
    large = [ratio for shape, ratio in ratios.items() if shape.m > SMALL_ROWS]
    lowest = min(ratios, key=lambda shape: ratios[shape])
    int8 = {result.shape: ratio for result in results if (ratio := result.ratio(FLOAT_PEERS))}
    int8_small = [ratio for shape, ratio in int8.items() if shape.m <= SMALL_ROWS]
    int8_lowest = min(int8, key=lambda shape: int8[shape]) if int8 else None
    against_int8 = {
        "geometric_mean": round(geometric_mean(int8.values()), 3) if int8 else None,
        "geometric_mean_few_rows": round(geometric_mean(int8_small), 3) if int8_small else None,
        "lowest": round(int8[int8_lowest], 3) if int8_lowest else None,
        "lowest_shape": str(int8_lowest),
        "below_0.95": [str(shape) for shape, ratio in int8.items() if ratio < BEHIND],
    }
    return {
        "kind": "summary",
        "shapes": len(results),
        "geometric_mean": round(geometric_mean(ratios.values()), 3),
        "geometric_mean_few_rows": round(geometric_mean(small), 3) if small else None,
        "geometric_mean_many_rows": round(geometric_mean(large), 3) if large else None,
        "lowest": round(ratios[lowest], 3),
        "lowest_shape": str(lowest),
        "slower_than_best_peer": sum(ratio < 1 for ratio in ratios.values()),
        "below_0.95": [str(shape) for shape, ratio in ratios.items() if ratio < BEHIND],
        "against_int8_peers": against_int8,
        "best_peer_counts": _counts(result.best_peer() for result in results),
    }


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        if name:
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary as text."""
    if "lowest" not in summary:
        return [f"{summary['shapes']} shapes; no ratio, because {OURS} or every peer is missing"]

    def times(name: str) -> str:
        return "-" if summary[name] is None else f"{summary[name]:.2f}x"

    int8 = summary["against_int8_peers"]
    against_int8 = "no int8 peer"
    if int8["lowest"] is not None:
        few = int8["geometric_mean_few_rows"]
        against_int8 = (
            f"int8 peers alone (without fp32 and bf16): geometric mean "
            f"{int8['geometric_mean']:.2f}x, M <= {SMALL_ROWS} "
            f"{'-' if few is None else f'{few:.2f}x'}; lowest {int8['lowest']:.2f}x at "
            f"{int8['lowest_shape']}; under {BEHIND}x on {len(int8['below_0.95'])}"
            f"{': ' if int8['below_0.95'] else ''}{', '.join(int8['below_0.95'])}"
        )
    counts = ", ".join(f"{name} {count}" for name, count in summary["best_peer_counts"].items())
    return [
        f"geometric mean of best peer's time / ours over {summary['shapes']} shapes: "
        f"{times('geometric_mean')}; M <= {SMALL_ROWS}: {times('geometric_mean_few_rows')}, "
        f"M > {SMALL_ROWS}: {times('geometric_mean_many_rows')}",
        f"lowest: {times('lowest')} at {summary['lowest_shape']}; slower than the best peer on "
        f"{summary['slower_than_best_peer']} shapes, under {BEHIND}x on "
        f"{len(summary['below_0.95'])}{': ' if summary['below_0.95'] else ''}"
        f"{', '.join(summary['below_0.95'])}",
        against_int8,
        f"best peer, number of shapes: {counts}",
    ]


@dataclass(frozen=True)
class Extra:
    """A table of texts, heading first."""

    title: str
    rows: list[list[str]]


@dataclass
class AnyRun(Generic[C]):
    """One suite on one number of threads: header, cases, and the limits measured in the run."""

    suite: str
    threads: int
    isa: str
    header: dict[str, Any]
    results: list[CaseResult[C]]
    roofline: Roofline

    @property
    def peak_gops(self) -> float | None:
        """The measured peak of torchquant's instruction set in this run."""
        return self.roofline.gops.get(self.isa)

    @property
    def title(self) -> str:
        """Suite, machine and date on one line."""
        return (
            f"{self.what}, {self.header['cpu']}, {_threads(self.threads)}, "
            f"{self.isa}, {self.header['date']}"
        )

    @property
    def what(self) -> str:
        """What was measured."""
        return f"int8 {self.suite}"

    @property
    def first_column(self) -> str:
        """The heading over the cases."""
        return "M x N x K"

    @property
    def note(self) -> str:
        """What a call is, and what its times are measured in."""
        return ""

    def time(self, seconds: float | None) -> str:
        """A time as text, in the table's unit: microseconds."""
        if seconds is None:
            return "-"
        value = seconds * 1e6
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"

    @property
    def limit_words(self) -> str:
        """What `Case.limit_bytes` counts."""
        return "the weights"

    def extras(self) -> list[Extra]:
        """Tables beside the one of the cases."""
        return []

    def extra_records(self) -> list[dict[str, Any]]:
        """What else belongs into a results file."""
        return []

    def summary(self) -> dict[str, Any]:
        """A few numbers about all cases."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The summary as text."""
        raise NotImplementedError

    def columns(self) -> list[str]:
        """The peers that ran, in the suite's order."""
        ran = {name for result in self.results for name in result.blocks}
        return [name for name in EVERY_SUITE[self.suite] if name in ran]


class Run(AnyRun[LinearShape]):
    """A run over linear layers."""

    @property
    def what(self) -> str:
        """What was measured."""
        return f"{self.suite} int8 linear"

    @property
    def note(self) -> str:
        """What a call is, and what its times are measured in."""
        return f"Microseconds per call, {INPUTS[self.suite]}, weights cache-warm."

    def summary(self) -> dict[str, Any]:
        """Ratios to the best peer, and fractions of the machine's limits."""
        return {
            **summarise(self.results),
            "suite": self.suite,
            "threads": self.threads,
            "isa": self.isa,
            "limits": self.limit_summary(),
        }

    def limit_summary(self) -> dict[str, Any]:
        """Fractions of the limits: of arithmetic for large shapes, of bandwidth for few rows.

        `of_vpdpbusd` divides by the peak of vpdpbusd for every instruction set, so that a matrix
        unit has more than 1.
        """
        large = [r for r in self.results if r.shape.is_large and r.gops()]
        streamed = [r for r in self.results if r.shape.weight_bytes >= STREAM_BYTES and r.gops()]
        one = [r for r in streamed if r.shape.m == 1]
        few = [r for r in streamed if 1 < r.shape.m <= SMALL_ROWS]
        vpdpbusd = self.roofline.vpdpbusd()
        found: dict[str, Any] = {
            "large_of_peak": _spread(large, lambda r: _over(r.gops(), self.peak_gops)),
            "large_of_vpdpbusd": _spread(large, lambda r: _over(r.gops(), vpdpbusd)),
            "one_row_of_bandwidth": _spread(one, self._bandwidth_share),
            "few_rows_of_limit": _spread(few, lambda r: r.limit_share()),
        }
        for name in ("torchquant-fp32-in", "torchquant-bf16-in"):
            ran = [r for r in large if name in r.blocks]
            found[f"{name}_large_of_vpdpbusd"] = _spread(ran, partial(_peer_share, name, vpdpbusd))
        both = [r for r in large if {"torchquant-fp32-in", "torchquant-bf16-in"} <= set(r.blocks)]
        found["fp32_time_over_bf16_time"] = _spread(
            both, lambda r: _over(r.seconds("torchquant-fp32-in"), r.seconds("torchquant-bf16-in"))
        )
        return {name: spread for name, spread in found.items() if spread}

    def _bandwidth_share(self, result: ShapeResult) -> float | None:
        bandwidth = self.roofline.bandwidth(result.shape.weight_bytes)
        seconds = result.seconds(OURS)
        if bandwidth is None or seconds is None:
            return None
        return result.shape.weight_bytes / bandwidth / 1e9 / seconds

    def lines(self) -> list[str]:
        """Summary and limits as text."""
        lines = summary_lines(summarise(self.results))
        limits = self.limit_summary()
        for name, words in LIMIT_WORDS.items():
            if name in limits:
                spread = limits[name]
                lines.append(
                    f"{words.format(isa=self.isa)}: {spread['least']:.2f} to {spread['most']:.2f}, "
                    f"least at {spread['least_shape']}"
                )
        return lines


INPUTS = {
    "dynamic": "fp32 in and out (bf16: bf16 in and out)",
    "prequantized": "int8 or uint8 in, fp32 out (torch.ao: uint8 out; columns *-in: that type in)",
}
LIMIT_WORDS = {
    "large_of_peak": "all dimensions >= 1024, fraction of the measured {isa} peak",
    "large_of_vpdpbusd": "all dimensions >= 1024, fraction of the measured vpdpbusd peak",
    "torchquant-fp32-in_large_of_vpdpbusd": "the same from fp32 input (dynamic)",
    "torchquant-bf16-in_large_of_vpdpbusd": "the same from bf16 input (dynamic)",
    "fp32_time_over_bf16_time": "time with fp32 input over time with bf16 input",
    "one_row_of_bandwidth": "one row, weights >= 32 MiB, fraction of the read bandwidth",
    "few_rows_of_limit": "2 to 16 rows, weights >= 32 MiB, fraction of the limit that binds",
}


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _peer_share(name: str, peak: float | None, result: ShapeResult) -> float | None:
    return _over(result.gops(name), peak)


def _spread(
    results: list[ShapeResult], value: Callable[[ShapeResult], float | None]
) -> dict[str, Any] | None:
    """Least and most of a figure over shapes, and where the least is; None without figures."""
    figures = {str(result.shape): found for result in results if (found := value(result))}
    if not figures:
        return None
    least = min(figures, key=lambda shape: figures[shape])
    return {
        "least": round(figures[least], 3),
        "most": round(max(figures.values()), 3),
        "least_shape": least,
    }
