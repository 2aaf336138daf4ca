"""Options that several commands have, and their checks."""

from __future__ import annotations

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
