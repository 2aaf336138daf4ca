"""What a run leaves behind: a table on the terminal and, if asked for, lines of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

PACKAGES = ("torchquant", "torch", "transformers", "torchao", "onnxruntime", "onnx")
Row = dict[str, Any]


def machine(threads: int) -> dict[str, Any]:
    """Where, when and with what: the first line of a results file."""
    return {
        "kind": "header",
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "versions": {"python": platform.python_version(), **_versions()},
        # Absolute paths cut to their last part: they say nothing to others.
        "command": " ".join(["python", *(re.sub(r"^/\S*/", "", word) for word in sys.argv)]),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def show(
    console: Console,
    title: str,
    rows: list[Row],
    columns: dict[str, tuple[str, str]],
    descriptions: dict[str, str],
) -> None:
    """Print one line per row, and below it what each engine is.

    Args:
        console: where to.
        title: above the table.
        rows: dicts with the key `engine`; a missing or None value prints as "-".
        columns: heading and format of each key that is shown.
        descriptions: by engine.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    for heading, _ in columns.values():
        longest_word = max(len(word) for word in heading.split())
        table.add_column(heading, justify="right", min_width=longest_word)
    for row in rows:
        cells = [_cell(row.get(key), form) for key, (_, form) in columns.items()]
        table.add_row(row["engine"], *cells)
    console.print(table)
    for row in rows:
        console.print(f"{row['engine']}: {descriptions[row['engine']]}", style="dim")


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One record per line, floats rounded to six digits."""
    path.write_text("".join(json.dumps(_rounded(record)) + "\n" for record in records))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
