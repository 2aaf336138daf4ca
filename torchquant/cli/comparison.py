"""What the comparisons with other libraries have in common: options, files, the exit code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from torchquant.bench.peers import OURS
from torchquant.bench.results import AnyRun
from torchquant.cli.bench_files import Files
from torchquant.cli.options import (
    BlockOption,
    FigureOption,
    IsaOption,
    JsonOption,
    MarkdownOption,
    MinutesOption,
    OutputOption,
    ProgressOption,
    RoundsOption,
    SaveOption,
    SmokeOption,
    ThreadsOption,
    parse_threads,
)
from torchquant.cli.output import error_console, progress_bar


@dataclass(frozen=True)
class Comparison:
    """The values of the common options, in the order of ``--help``."""

    threads: ThreadsOption = None
    isa: IsaOption = None
    rounds: RoundsOption = 5
    block: BlockOption = 0.04
    minutes: MinutesOption = None
    output: OutputOption = None
    markdown: MarkdownOption = None
    figure: FigureOption = None
    save: SaveOption = False
    as_json: JsonOption = False
    progress: ProgressOption = True
    smoke: SmokeOption = False

    def amounts(self, *, smoke_block: float, threads: str | None = None) -> dict[str, Any]:
        """How much to measure, as arguments of a comparison's options.

        Args:
            smoke_block: the seconds of a block with ``--smoke``.
            threads: numbers of threads if none are given; None is 2, then 1.
        """
        given = self.threads or ([threads] if threads else None)
        return {
            "threads": (1,) if self.smoke and not self.threads else parse_threads(given),
            "isa": self.isa,
            "rounds": 1 if self.smoke else self.rounds,
            "block": smoke_block if self.smoke else self.block,
            "minutes": self.minutes,
            "smoke": self.smoke,
        }

    def run(
        self,
        kind: str,
        measure: Callable[..., Sequence[AnyRun[Any]]],
        options: Any,
        draw: Callable[[Path, Any], None],
    ) -> Sequence[AnyRun[Any]]:
        """Measure, print, and write the files; ``kind`` begins the names of saved files."""
        errors = error_console()
        files = (self.output, self.markdown, self.figure, self.save)
        written = Files(kind, draw, *files, self.isa, errors)
        with progress_bar(errors, shown=self.progress) as on_step:
            runs = measure(options, errors, on_step, on_run=written.write)
        written.finish(runs, as_json=self.as_json, smoke=self.smoke)
        return runs


def with_common_options(*, block: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the common options; its parameter ``common`` takes their values.

    Args:
        block: the default of ``--block``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        common = inspect.signature(Comparison, eval_str=True).parameters
        parameters = [p for name, p in own.parameters.items() if name != "common"]
        parameters += [
            p.replace(default=block) if name == "block" else p for name, p in common.items()
        ]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            shared = {f.name: values.pop(f.name) for f in fields(Comparison) if f.name in values}
            command(**values, common=Comparison(**{"block": block, **shared}))

        with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return with_options

    return decorate


def fail_without_ours(runs: Sequence[AnyRun[Any]], peers: tuple[str, ...]) -> None:
    """End with status 1 if torchquant was requested and a run has no time of it."""
    measured = all(any(OURS in result.blocks for result in run.results) for run in runs)
    if (not peers or OURS in peers) and not measured:
        raise typer.Exit(1)
