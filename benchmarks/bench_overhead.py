"""`torchquant bench overhead` from a checkout: `python benchmarks/bench_overhead.py --help`."""

import typer

from torchquant.cli.bench import overhead_command

if __name__ == "__main__":
    typer.run(overhead_command)
