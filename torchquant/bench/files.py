"""Results files: JSON lines, of which the first describes the machine and the command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchquant.bench import machine

FOLDER = Path("benchmarks") / "results"  # of a checkout


def results_file(kind: str, *parts: str | None, suffix: str = ".jsonl") -> Path:
    """A path named by kind, date, CPU and ``parts``.

    The folder is ``benchmarks/results`` if the current folder has it, else the current folder.
    """
    folder = FOLDER if FOLDER.is_dir() else Path()
    stem = "-".join([kind, machine.today(), machine.cpu_slug(), *filter(None, parts)])
    return folder / f"{stem}{suffix}"


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one record per line, floats with six significant digits."""
    path.write_text("".join(json.dumps(_rounded(record)) + "\n" for record in records))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
