"""What the commands of ``torchquant bench`` print about their runs, and the files they write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from torchquant.bench import tables
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.results import AnyRun
from torchquant.cli.output import output_console, print_json, print_table, warn


def save_linear_figure(path: Path, run: Any) -> None:
    """Draw a run over linear layers; needs matplotlib."""
    from torchquant.bench.figures import save_linear_figure as save

    save(path, run)


def save_conv_figure(path: Path, run: Any) -> None:
    """Draw a run over convolutions or whole networks; needs matplotlib."""
    from torchquant.bench.conv_figures import save_figure as save

    save(path, run)


@dataclass(frozen=True)
class Files:
    """What to write, and where.

    ``draw(path, run)`` writes the figure of one run; ``kind`` begins the names of saved files.
    """

    kind: str
    draw: Callable[[Path, Any], None]
    output: Path | None
    markdown: Path | None
    figure: Path | None
    save: bool
    isa: str | None
    errors: Console

    def write(self, runs: Sequence[AnyRun[Any]], drawn: bool = False) -> None:
        """Write all files of the runs; figures only if `drawn`."""
        self._write(runs, self.output, self.markdown, self.figure if drawn else None)
        for threads in {run.threads for run in runs} if self.save else ():
            mine = [run for run in runs if run.threads == threads]
            parts = (self.kind, f"{threads}thread{'s' if threads > 1 else ''}", self.isa)
            lines, page, picture = (
                results_file(*parts, suffix=suffix) for suffix in (".jsonl", ".md", ".png")
            )
            self._write(mine, lines, page, picture if drawn else None)

    def try_all(self, runs: Sequence[AnyRun[Any]]) -> None:
        """Run what writes files, in a folder that goes away."""
        with tempfile.TemporaryDirectory() as name:
            self._write(runs, *(Path(name) / f"a{suffix}" for suffix in (".jsonl", ".md", ".png")))

    def finish(self, runs: Sequence[AnyRun[Any]], *, as_json: bool, smoke: bool) -> None:
        """Print the runs and what failed in them, and write all files."""
        if as_json:
            print_json([record for run in runs for record in tables.records(run)])
        else:
            print_runs(runs)
        for run in runs:
            for name, reason, count in tables.grouped_failures(run):
                warn(self.errors, f"{name}, {run.suite}, {count} cases", reason)
        self.write(runs, drawn=True)
        if smoke:
            self.try_all(runs)

    def _write(
        self,
        runs: Sequence[AnyRun[Any]],
        lines: Path | None,
        page: Path | None,
        figure: Path | None,
    ) -> None:
        if lines:
            write_json_lines(lines, [record for run in runs for record in tables.records(run)])
        if page:
            page.write_text(tables.markdown(runs))
        if not figure:
            return
        if find_spec("matplotlib") is None:
            warn(self.errors, "no figure", "matplotlib is not installed; pip install matplotlib")
            return
        several_suites = len({run.suite for run in runs}) > 1
        several_threads = len({run.threads for run in runs}) > 1
        for run in runs:
            suffix = f"-{run.suite}" if several_suites else ""
            suffix += f"-{run.threads}threads" if several_threads else ""
            self.draw(figure.with_name(f"{figure.stem}{suffix}{figure.suffix}"), run)


def print_runs(runs: Sequence[AnyRun[Any]]) -> None:
    """Print the tables, then all summaries together, where they can be compared."""
    console = output_console()
    for run in runs:
        print_table(console, tables.rich_table(run))
        for table in tables.extra_tables(run):
            print_table(console, table)
    for run in runs:
        console.print(f"\n[bold]{escape(run.title)}[/bold]")
        for line in run.lines():
            console.print(line)
