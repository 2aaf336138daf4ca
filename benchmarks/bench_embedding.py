"""Quantized embeddings against nn.Embedding: lookups of rows of a table.

    python benchmarks/bench_embedding.py
    python benchmarks/bench_embedding.py --threads 1 --rows 49152 --sizes 576 4096 --bits 4 8

One line is one lookup of random indices: the median microseconds of ``nn.Embedding`` in float32 and
of ``QuantizedEmbedding``, in alternating blocks, and their ratio. Each call takes other indices out
of a list that together reads the whole table, so that tables which are larger than the caches come
from memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant.bench.timing import medians, seconds_per_call
from torchquant.bench.workers import in_turns
from torchquant.nn import QuantizedEmbedding


def calls_of(module: nn.Module, indices: list[Tensor]) -> Callable[[], Tensor]:
    """A call of the module with the next indices."""
    turn = cycle(indices)
    return lambda: module(next(turn))


def measure(
    rows: int, size: int, bits: int, count: int, rounds: int, seconds: float
) -> dict[str, float]:
    """Median seconds of a lookup of ``count`` indices."""
    floating = nn.Embedding(rows, size)
    config = torchquant.IntxWeightOnlyConfig(bits, min(128, size))
    ours = QuantizedEmbedding.from_float(floating, config)
    order = torch.randperm(rows)
    indices = list(order[: max(count, rows // count * count)].split(count))
    calls = {"torch": calls_of(floating, indices), "ours": calls_of(ours, indices)}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    for name in in_turns(list(calls), rounds):
        blocks[name].append(seconds_per_call(calls[name], seconds))
    return medians(blocks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32_768, help="rows of the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=[576, 1024, 4096])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call (default 5)")
    parser.add_argument("--block", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.sizes, arguments.rounds = 1024, [64], 1
        arguments.block = 0.0005

    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    console.print(
        f"{torchquant.cpu.cpu_name()}, {arguments.threads} threads, instruction set "
        f"{torchquant.cpu.active_isa()}, torch {torch.__version__}"
    )
    table = Table(title=f"lookups in a table of {arguments.rows:,} rows")
    for heading in ("size", "bits", "indices", "float32 us", "ours us", "ours / float32"):
        table.add_column(heading, justify="right")
    with torch.inference_mode():
        for size in arguments.sizes:
            for bits in arguments.bits:
                for count in arguments.counts:
                    found = measure(
                        *(arguments.rows, size, bits, count), arguments.rounds, arguments.block
                    )
                    table.add_row(
                        *(str(size), str(bits), str(count)),
                        *(f"{found[name] * 1e6:.2f}" for name in ("torch", "ours")),
                        f"{found['ours'] / found['torch']:.2f}",
                    )
    console.print(table)


if __name__ == "__main__":
    main()
