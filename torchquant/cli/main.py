"""The ``torchquant`` command: one function per subcommand, with its options.

Results go to standard output, progress and errors to standard error. Exit code 0: success, 1: the
command found a fault, 2: wrong usage.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

import torchquant
from torchquant.cli import bench_conv, bench_lowbit, info
from torchquant.cli.bench import app as bench_app
from torchquant.cli.options import IsaOption, JsonOption, ProgressOption
from torchquant.cli.output import error_console, print_json, progress_bar
from torchquant.demo import run_demo
from torchquant.demo.tables import describe_failures
from torchquant.demo.tables import render as render_demo

app = typer.Typer(
    name="torchquant",
    help="Quantization for PyTorch with exact integer kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # library errors are readable without a traceback box
)


bench_conv.register(bench_app)
bench_lowbit.register(bench_app)
app.add_typer(bench_app)


def print_version(wanted: bool) -> None:
    """Callback of ``--version``."""
    if wanted:
        typer.echo(f"torchquant {torchquant.__version__}")
        raise typer.Exit


ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of threads (default: torch's setting)."),
]


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Quantization for PyTorch with exact integer kernels."""


@app.command("info")
def info_command(as_json: JsonOption = False) -> None:
    """Show CPU, instruction sets, threads and versions, for a bug report."""
    facts = info.collect()
    if as_json:
        print_json(facts.to_dict())
    else:
        Console(highlight=False).print(info.render(facts))


@app.command("demo")
def demo_command(
    isa: IsaOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    progress: ProgressOption = True,
) -> None:
    """Quantize and fine-tune bundled models; compare accuracy, size, speed and exactness.

    The models are a small transformer, a VGG and a ResNet that classify handwritten digits.
    torchquant contains them and their test images.

    The exit code is 1 if a check of exactness fails.
    """
    errors = error_console()
    with progress_bar(errors, shown=progress) as on_step:
        result = run_demo(isa=isa, threads=threads, on_step=on_step)
    if as_json:
        print_json(result.to_dict())
    else:
        Console(highlight=False).print(render_demo(result))
    if result.failures:
        errors.print(
            "torchquant demo: int8 results are not exact on this machine. Please report it, with "
            "the output of 'torchquant info':\n" + describe_failures(result),
            style="bold red",
            soft_wrap=True,
        )
        raise typer.Exit(1)
