"""Options that several commands have, their checks, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchquant import cpu


def check_isa(name: str | None) -> str | None:
    """Callback of ``--isa``: refuse a name that cannot run here; the message lists the others."""
    if name is not None:
        try:
            cpu.check_isa("the name", name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return name


def split(values: list[str] | None) -> tuple[str, ...]:
    """The values of an option that can be repeated, or have several values with commas or spaces.

    >>> split(["1x*,4x*", "16x768x768"])
    ('1x*', '4x*', '16x768x768')
    """
    return tuple(part for value in values or [] for part in value.replace(",", " ").split())


def check_names(option: str, names: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """Refuse an unknown name; the message lists the known ones."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"must be one of {', '.join(known)}, got {name!r}", param_hint=option
            )
    return names


def parse_numbers(option: str, values: list[str]) -> tuple[int, ...]:
    """Numbers of at least 1: `["1,8"]` gives (1, 8)."""
    numbers = split(values)
    if not all(number.isdigit() and int(number) >= 1 for number in numbers):
        raise typer.BadParameter(
            f"must be numbers of at least 1, got {' '.join(numbers)!r}", param_hint=option
        )
    return tuple(dict.fromkeys(int(number) for number in numbers))


def parse_threads(values: list[str] | None) -> tuple[int, ...]:
    """The numbers of threads: `["1,2"]` gives (1, 2), None gives (2, 1)."""
    return parse_numbers("--threads", list(split(values) or ("2", "1")))


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
IsaOption = Annotated[
    str | None,
    typer.Option(
        callback=check_isa,
        metavar="NAME",
        help="Instruction set of torchquant's kernels (default: the active one).",
    ),
]
ProgressOption = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Show a progress bar on a terminal.")
]
ThreadsOption = Annotated[
    list[str] | None,
    typer.Option("--threads", metavar="N,...", help="Threads of every peer (default: 2, then 1)."),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Blocks per peer and shape.")]
BlockOption = Annotated[
    float, typer.Option(min=0.0001, metavar="SECONDS", help="Length of a block.")
]
MinutesOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Time budget in minutes: fewer rounds, never fewer shapes."),
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JSON lines to this file.")
]
MarkdownOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables to this file.")
]
FigureOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write a figure to this file; for several runs one file each."
    ),
]
SaveOption = Annotated[
    bool,
    typer.Option(
        "--save",
        help="Write all files, named by date and CPU, to benchmarks/results or the current folder.",
    ),
]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke", help="Measure almost nothing, in seconds: only shows that the command works."
    ),
]
