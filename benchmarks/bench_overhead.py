"""`torchquant bench overhead` from a checkout: `python benchmarks/bench_overhead.py --help`."""

import typer

from torchquant.bench.cli import overhead_command

if __name__ == "__main__":
    typer.run(overhead_command)
