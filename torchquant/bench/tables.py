"""Tables of runs, for the terminal and for a page, and their records for a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from torchquant.bench.results import AnyRun, CaseResult, Extra
from torchquant.bench.roofline import Roofline

LEFT_ALIGNED = ("best peer", "bound by")


def rows(run: AnyRun[Any]) -> list[list[str]]:
    """The table's cells, heading first."""
    peers = run.columns()
    peak = run.peak_gops
    heading = [run.first_column, *peers, "best peer", "ratio"]
    heading += ["GOPS", "of peak", "of limit", "bound by"]
    lines = [heading]
    for result in run.results:
        gops = result.gops()
        lines.append(
            [
                str(result.shape),
                *(run.time(result.seconds(name)) for name in peers),
                result.best_peer() or "-",
                number(result.ratio(), ".2f"),
                number(gops, ".0f"),
                number(gops / peak if gops and peak else None, ".0%"),
                number(result.limit_share(), ".0%"),
                result.limit.bound_by if result.limit else "-",
            ]
        )
    return lines


def rich_table(run: AnyRun[Any]) -> Table:
    """Microseconds per call, for the terminal: red where a peer is faster."""
    heading, *body = rows(run)
    table = Table(
        title=f"{run.title}\n{run.note} Ratio: best peer's time over ours.",
        title_justify="left",
    )
    for name in heading:
        left = name in (run.first_column, *LEFT_ALIGNED)
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for index, (result, line) in enumerate(zip(run.results, body, strict=True)):
        ratio = result.ratio()
        style = None if ratio is None or ratio >= 1 else "red"
        table.add_row(*line, style=style, end_section=_ends_layer(run.results, index))
    return table


def _ends_layer(results: list[CaseResult[Any]], index: int) -> bool:
    if index + 1 == len(results):
        return True
    layer, following = (result.shape.load_request() for result in results[index : index + 2])
    alone = index == 0 or results[index - 1].shape.load_request() != layer
    return layer != following and not alone  # no line after each random shape


def roofline_tables(before: Roofline, after: Roofline | None = None) -> list[Table]:
    """Arithmetic peaks and bandwidths; with `after`, both measurements next to each other."""
    both = [before] if after is None else [before, after]
    when = [""] if after is None else [" before", " after"]
    threads = f"{before.threads} thread" + ("s" if before.threads > 1 else "")
    peaks = Table(title=f"arithmetic peak, {threads}", title_justify="left")
    peaks.add_column("instructions")
    reads = Table(title=f"read bandwidth, {threads}", title_justify="left")
    reads.add_column("MiB", justify="right")
    for text in when:
        peaks.add_column(f"GOPS{text}", justify="right")
        reads.add_column(f"GB/s{text}", justify="right")
    for name in before.gops:
        peaks.add_row(name, *(number(measured.gops.get(name), ".0f") for measured in both))
    for size in before.read:
        reads.add_row(f"{size:g}", *(number(measured.read.get(size), ".1f") for measured in both))
    return [peaks, reads]


def markdown(runs: Sequence[AnyRun[Any]]) -> str:
    """The tables as a Markdown page, with all facts that are needed to judge them."""
    lines: list[str] = []
    for run in runs:
        lines += _markdown_of(run)
    return "\n".join(lines)


def _markdown_of(run: AnyRun[Any]) -> list[str]:
    header = run.header
    heading, *body = rows(run)
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in run.roofline.gops.items())
    reads = ", ".join(f"{size:g} MiB {value:.0f}" for size, value in run.roofline.read.items())
    missing = ", ".join(f"{name} ({why})" for name, why in header["missing"].items())
    return [
        f"# {run.title}",
        "",
        f"- CPU: {header['cpu']}, {header['cpus']} CPUs, {header['threads']} threads",
        f"- instruction set of torchquant: {run.isa}",
        f"- measured peaks, GOPS: {peaks or 'none'}",
        f"- measured read bandwidth, GB/s: {reads or 'none'}",
        f"- versions: {versions}",
        f"- command: `{header['command']}`",
        f"- other processes used {header['busy_before']} % of the CPUs before the run and "
        f"{header['busy_during']} % during it; the hypervisor took away {header['steal']} %; "
        f"load {header['load']} at the start; {header['seconds']} s",
        *([f"- without: {missing}"] if missing else []),
        *(f"- {name}, {count} shapes: {why}" for name, why, count in grouped_failures(run)),
        *(f"- {line}" for line in run.lines()),
        "",
        f"{run.note} Ratio: best peer's time over ours. Of peak: GOPS over the measured peak of "
        f"the instruction set. Of limit: the least possible time, from that peak and from the "
        f"bandwidth measured on a buffer of the size of {run.limit_words}, over ours; then which "
        "of the two it is.",
        "",
        "| " + " | ".join(heading) + " |",
        "|---" * len(heading) + "|",
        *("| " + " | ".join(line) + " |" for line in body),
        "",
        *(line for extra in run.extras() for line in _extra_markdown(extra)),
    ]


def _extra_markdown(extra: Extra) -> list[str]:
    heading, *body = extra.rows
    return [
        extra.title,
        "",
        "| " + " | ".join(heading) + " |",
        "|---" * len(heading) + "|",
        *("| " + " | ".join(line) + " |" for line in body),
        "",
    ]


def extra_tables(run: AnyRun[Any]) -> list[Table]:
    """The run's other tables, for the terminal."""
    tables = []
    for extra in run.extras():
        table = Table(title=extra.title, title_justify="left")
        heading, *body = extra.rows
        for index, name in enumerate(heading):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for line in body:
            table.add_row(*line)
        tables.append(table)
    return tables


def grouped_failures(run: AnyRun[Any]) -> list[tuple[str, str, int]]:
    """(peer, reason, number of shapes), so that one reason is one line."""
    counts: dict[tuple[str, str], int] = {}
    for result in run.results:
        for name, reason in result.failures.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return [(name, reason, count) for (name, reason), count in counts.items()]


def records(run: AnyRun[Any]) -> list[dict[str, Any]]:
    """The header, one record per case, what else was measured, the summary."""
    cases = [result.record() for result in run.results]
    return [run.header, *cases, *run.extra_records(), run.summary()]


def number(value: float | None, form: str) -> str:
    """The formatted number, or a dash for None."""
    return "-" if value is None else format(value, form)
