"""`torchquant bench isa` from a checkout: `python benchmarks/bench_isa.py --help`."""

import typer

from torchquant.cli.bench import isa_command

if __name__ == "__main__":
    typer.run(isa_command)
