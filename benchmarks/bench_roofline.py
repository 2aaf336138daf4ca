"""`torchquant bench roofline` from a checkout: `python benchmarks/bench_roofline.py --help`."""

import typer

from torchquant.cli.bench import roofline_command

if __name__ == "__main__":
    typer.run(roofline_command)
