"""Table, page and figure of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qat.study import ABLATED, ABLATION, SETTINGS
from torchquant.bench.files import write_json_lines


def summaries(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Means over the seeds: one row per name, of all records of a kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == kind:
            found.setdefault(record["name"], []).append(record)
    rows = []
    for name, runs in found.items():
        keys = ("bits", "over_float", "ptq_bits", "ptq_over_float", "step_ms", "differing_bits")
        means = {key: statistics.fmean(run[key] for run in runs) for key in keys if key in runs[0]}
        spread = [run["over_float"] for run in runs if "over_float" in run]
        if len(spread) > 1:
            means["spread"] = statistics.stdev(spread)
        rows.append({"kind": "mean", "of": kind, "name": name, "seeds": len(runs), **means})
    return rows


HEADINGS = ("model", "PTQ", "over float", "QAT", "over float", "+- seeds", "bound", "bits")
LEGEND = (
    "PTQ, QAT: bits per byte of the converted model. Bits: number of bits in which it differs from "
    "the trained model"
)


def cells(records: list[dict[str, Any]]) -> list[list[str]]:
    """The table's lines: float, the settings, and the ablation of one setting."""
    lines = []
    means = [row for kind in ("float", "setting", "ablation") for row in summaries(records, kind)]
    for row in means:
        bound = SETTINGS[row["name"]].bound if row["of"] == "setting" else None
        name = f"{ABLATED}, {row['name']}" if row["of"] == "ablation" else row["name"]
        values: list[tuple[Any, str]] = [
            (row.get("ptq_bits"), ".4f"),
            (row.get("ptq_over_float"), "+.2%"),
            (row["bits"], ".4f"),
            (row.get("over_float"), "+.2%"),
            (row.get("spread"), ".2%"),
            (bound, ".1%"),
            (row.get("differing_bits"), ".0f"),
        ]
        lines.append([name, *("" if value is None else format(value, f) for value, f in values)])
    return lines


def show_table(console: Console, title: str, lines: list[list[str]]) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print(LEGEND, style="dim")


def markdown(title: str, lines: list[list[str]], header: dict[str, Any]) -> str:
    """The table as a Markdown page."""
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *lines]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"# {title}\n\n{table}\n\n{LEGEND}.\n\n{header['cpu']}, {header['jobs']} runs at a time, "
        f"one thread each, torch {header['versions']['torch']}, {header['minutes']:.0f} minutes; "
        f"`{header['command']}`\n"
    )


def save_figure(path: Path, title: str, records: list[dict[str, Any]]) -> None:
    """Draw the cost of every setting with PTQ and QAT, and the losses of the ablation.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    names = [row["name"] for row in summaries(records, "setting")]
    for key, colour, marker, shift, label in (
        ("ptq_over_float", "#d1495b", "x", -0.12, "PTQ"),
        ("over_float", "#0b5fa5", "o", 0.12, "QAT"),
    ):
        for place, name in enumerate(names):
            values = [100 * r[key] for r in records if r["kind"] == "setting" and r["name"] == name]
            places = [place + shift] * len(values)
            named = label if not place else None
            left.scatter(places, values, s=22, color=colour, marker=marker, label=named)
    for place, name in enumerate(names):
        bound = 100 * SETTINGS[name].bound
        left.hlines(bound, place - 0.35, place + 0.35, color="black", lw=0.8, ls=":")
    left.axhline(0, color="black", lw=0.8)
    left.set_yscale("symlog", linthresh=1.0)
    left.set_xticks(range(len(names)), names)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    left.set_title(
        "bits per byte over float trained as long, by seed (dotted: bound)", fontsize=9, loc="left"
    )
    left.legend(fontsize=8, frameon=False)
    curves = {"float": "float", ABLATED: f"{ABLATED}, AdamW, with g"}
    curves |= {name: f"{ABLATED}, {name}" for name in ABLATION}
    for name, label in curves.items():
        runs = [r["losses"] for r in records if r["name"] == name]
        if runs:
            mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
            right.plot(_smooth(mean), lw=1.2, label=label)
    right.set_xlabel("fine-tuning step", fontsize=9)
    right.set_title(
        "training loss in bits per byte: LSQ with and without its gradient scale g",
        fontsize=9,
        loc="left",
    )
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Exponential moving average."""
    mean, smooth = values[0], []
    for value in values:
        mean += weight * (value - mean)
        smooth.append(mean)
    return smooth


def save(
    stem: Path, title: str, records: list[dict[str, Any]], header: dict[str, Any], console: Console
) -> None:
    """Write table, records and figure to files of one name."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    short = [{k: v for k, v in record.items() if k != "losses"} for record in records]
    means = [row for kind in ("float", "setting", "ablation") for row in summaries(records, kind)]
    write_json_lines(stem.with_suffix(".jsonl"), [header, *short, *means])
    stem.with_suffix(".md").write_text(markdown(title, cells(records), header))
    try:
        save_figure(stem.with_suffix(".png"), title, records)
    except ImportError:
        console.print("no figure: matplotlib is not installed; pip install matplotlib")
    console.print(f"results: {stem}.md, .jsonl, .png", highlight=False)
