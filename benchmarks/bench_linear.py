"""`torchquant bench linear` from a checkout: `python benchmarks/bench_linear.py --help`."""

import typer

from torchquant.cli.bench import linear_command

if __name__ == "__main__":
    typer.run(linear_command)
