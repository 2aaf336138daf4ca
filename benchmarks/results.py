"""A linear benchmark's results: what is kept of a shape, and the tables and files made from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import LINEAR_PEERS, OURS
from rich.table import Table
from shapes import LinearShape
from timing import geometric_mean

SMALL_ROWS = 16  # up to here a call is memory and overhead, beyond it arithmetic


@dataclass
class ShapeResult:
    """Times of one shape.

    `blocks` holds, by peer and by way of calling it, the median seconds per call of each block.
    """

    shape: LinearShape
    blocks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limit_seconds: float | None = None

    def add(self, peer: str, seconds: dict[str, float]) -> None:
        """Take one block's figures, by way of calling."""
        for variant, value in seconds.items():
            self.blocks.setdefault(peer, {}).setdefault(variant, []).append(value)

    def variant(self, peer: str) -> str:
        """The peer's fastest way of being called here."""
        return min(self.blocks[peer], key=lambda name: statistics.median(self.blocks[peer][name]))

    def seconds(self, peer: str) -> float | None:
        """Median over blocks of the peer's fastest way; None if it did not run."""
        if peer not in self.blocks:
            return None
        return statistics.median(self.blocks[peer][self.variant(peer)])

    def shortest_block(self, peer: str) -> float:
        """The least of the peer's blocks: a first guess that a disturbance does not spoil."""
        return min(min(values) for values in self.blocks[peer].values())

    def best_peer(self) -> str | None:
        """The fastest of the others."""
        others = {name: self.seconds(name) or 0.0 for name in self.blocks if name != OURS}
        return min(others, key=lambda name: others[name]) if others else None

    def ratio(self) -> float | None:
        """Best peer's time over ours: above 1, ours is faster."""
        ours, best = self.seconds(OURS), self.best_peer()
        best_seconds = self.seconds(best) if best else None
        return best_seconds / ours if ours and best_seconds else None

    def gops(self, peer: str = OURS) -> float | None:
        """Billions of operations per second."""
        seconds = self.seconds(peer)
        return self.shape.operations / seconds / 1e9 if seconds else None

    def limit_share(self) -> float | None:
        """The least possible time, as measured on this machine, over ours."""
        ours = self.seconds(OURS)
        return self.limit_seconds / ours if self.limit_seconds and ours else None

    def record(self) -> dict[str, Any]:
        """The shape's line of the results file."""
        return {
            "kind": "shape",
            **asdict(self.shape),
            "us": {name: _microseconds(self.seconds(name)) for name in self.blocks},
            "variant": {
                name: self.variant(name) for name, ways in self.blocks.items() if len(ways) > 1
            },
            "best_peer": self.best_peer(),
            "ratio": _rounded(self.ratio(), 3),
            "gops": _rounded(self.gops(), 1),
            "limit_us": _microseconds(self.limit_seconds),
            "blocks_us": {
                name: {
                    way: [_microseconds(value) for value in values] for way, values in ways.items()
                }
                for name, ways in self.blocks.items()
            },
            "failures": self.failures,
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)


def summarise(results: list[ShapeResult]) -> dict[str, Any]:
    """The few numbers that the shapes come down to. Ratios are best peer's time over ours."""
    ratios = {result.shape: ratio for result in results if (ratio := result.ratio())}
    if not ratios:
        return {"kind": "summary", "shapes": len(results)}
    small = [ratio for shape, ratio in ratios.items() if shape.m <= SMALL_ROWS]
    large = [ratio for shape, ratio in ratios.items() if shape.m > SMALL_ROWS]
    lowest = min(ratios, key=lambda shape: ratios[shape])
    return {
        "kind": "summary",
        "shapes": len(results),
        "geometric_mean": round(geometric_mean(ratios.values()), 3),
        "geometric_mean_few_rows": round(geometric_mean(small), 3) if small else None,
        "geometric_mean_many_rows": round(geometric_mean(large), 3) if large else None,
        "lowest": round(ratios[lowest], 3),
        "lowest_shape": str(lowest),
        "slower_than_best_peer": sum(ratio < 1 for ratio in ratios.values()),
        "best_peer_counts": _counts(result.best_peer() for result in results),
    }


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        if name:
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The summary in words."""
    if "lowest" not in summary:
        return [
            f"{summary['shapes']} shapes; no ratio, since either {OURS} or every peer is missing"
        ]

    def times(name: str) -> str:
        return "-" if summary[name] is None else f"{summary[name]:.2f}x"

    counts = ", ".join(f"{name} {count}" for name, count in summary["best_peer_counts"].items())
    return [
        f"geometric mean of best peer's time / ours over {summary['shapes']} shapes: "
        f"{times('geometric_mean')}; M <= {SMALL_ROWS}: {times('geometric_mean_few_rows')}, "
        f"M > {SMALL_ROWS}: {times('geometric_mean_many_rows')}",
        f"lowest: {times('lowest')} at {summary['lowest_shape']}; slower than the best peer on "
        f"{summary['slower_than_best_peer']} shapes",
        f"best peer, number of shapes: {counts}",
    ]


def _columns(results: list[ShapeResult]) -> list[str]:
    ran = {name for result in results for name in result.blocks}
    return [name for name in LINEAR_PEERS if name in ran]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def rows(results: list[ShapeResult], peak_gops: float | None) -> list[list[str]]:
    """The table's cells, heading first."""
    peers = _columns(results)
    heading = ["M x N x K", *peers, "best peer", "ratio", "GOPS", "of peak", "of limit"]
    lines = [heading]
    for result in results:
        gops = result.gops()
        lines.append(
            [
                str(result.shape),
                *(_short(result.seconds(name)) for name in peers),
                result.best_peer() or "-",
                _number(result.ratio(), ".2f"),
                _number(gops, ".0f"),
                _number(gops / peak_gops if gops and peak_gops else None, ".0%"),
                _number(result.limit_share(), ".0%"),
            ]
        )
    return lines


def rich_table(results: list[ShapeResult], peak_gops: float | None) -> Table:
    """Microseconds per call, for the terminal: red where a peer is faster."""
    heading, *body = rows(results, peak_gops)
    table = Table(
        title="microseconds per call; ratio = best peer's time / ours", title_justify="left"
    )
    for name in heading:
        left = name in ("M x N x K", "best peer")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for index, (result, line) in enumerate(zip(results, body, strict=True)):
        ratio = result.ratio()
        style = None if ratio is None or ratio >= 1 else "red"
        last = index + 1 == len(results) or results[index + 1].shape.layer != result.shape.layer
        table.add_row(*line, style=style, end_section=last)
    return table


def markdown(header: dict[str, Any], results: list[ShapeResult], peak_gops: float | None) -> str:
    """The same table with everything a reader needs to judge it."""
    heading, *body = rows(results, peak_gops)
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    measured = header["peaks"] or {}
    peaks = ", ".join(
        f"{name} {value:.0f} GOPS" for name, value in measured.get("gops", {}).items()
    )
    lines = [
        f"# Dynamic int8 linear, {header['date']}",
        "",
        f"- CPU: {header['cpu']}, {header['cpus']} CPUs, {header['threads']} threads",
        f"- instruction set of torchquant: {header['isa']}; measured peaks: {peaks or 'none'}",
        f"- versions: {versions}",
        f"- command: `{header['command']}`",
        f"- others on the machine used {header['busy_before']} % of its CPUs before the run and "
        f"{header['busy_during']} % during it; the hypervisor gave away {header['steal']} %",
        *(f"- {line}" for line in summary_lines(summarise(results))),
        "",
        "Microseconds per call, fp32 in and out (bf16: bf16 in and out), weights cache-warm. "
        "Ratio: best peer's time over ours. Of peak: GOPS over the measured peak of the "
        "instruction set. Of limit: the least possible time, from that peak and from the "
        "bandwidth measured on a buffer of the weights' size, over ours.",
        "",
        "| " + " | ".join(heading) + " |",
        "|---" * len(heading) + "|",
        *("| " + " | ".join(line) + " |" for line in body),
        "",
    ]
    return "\n".join(lines)


def write_json_lines(path: Path, header: dict[str, Any], results: list[ShapeResult]) -> None:
    """The header, one line per shape, the summary."""
    records = [header, *(result.record() for result in results), summarise(results)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
