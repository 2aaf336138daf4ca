"""Standalone activation functions against torch's, and against a copy.

    python benchmarks/bench_activations.py             every function, float32 and bfloat16
    python benchmarks/bench_activations.py --threads 1 --sizes 65536 16777216

One line is one elementwise operator on a tensor under `inference_mode`: the time per element of
torch's operator and of ours, medians of alternating blocks; the bytes per second that ours reads
and writes; and its fraction of `torch.clone` of the same tensor, which moves the same bytes and
computes nothing. `gated` is `activation(gate) * up`, which torch computes in two passes; its limit
is an addition, which also reads two tensors and writes one. All of it is torch, so one process
suffices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import torchquant
from torchquant.bench.timing import medians, seconds_per_call
from torchquant.bench.workers import in_turns

Call = Callable[[], Tensor]
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}
GATED = ("silu", "gelu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """Three calls, each of which reads `inputs` tensors and writes one."""

    name: str
    torch: Call
    ours: Call
    limit: Call
    inputs: int


def cases(size: int, dtype: torch.dtype) -> list[Case]:
    """Every function on one tensor; the gated ones on two."""
    x, up = torch.randn(size).mul(3).to(dtype), torch.randn(size).to(dtype)

    def plain(name: str) -> Case:
        module = torchquant.nn.Activation(name)
        return Case(name, lambda: TORCH[name](x), lambda: module(x), x.clone, 1)

    def gated(name: str) -> Case:
        return Case(
            f"{name} gated",
            lambda: TORCH[name](x) * up,
            lambda: torchquant.ops.gated_activation(x, up, name),
            lambda: x + up,
            2,
        )

    return [*map(plain, TORCH), *map(gated, GATED)]


def measure(case: Case, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds per call of torch, ours and the limit, in alternating blocks."""
    calls = {"torch": case.torch, "ours": case.ours, "limit": case.limit}
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
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 196_608, 1_572_864])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call (default 5)")
    parser.add_argument("--block", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.sizes, arguments.rounds, arguments.block = [1000], 1, 0.0005

    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    console.print(
        f"{torchquant.cpu.cpu_name()}, {arguments.threads} threads, instruction set "
        f"{torchquant.cpu.active_isa()}, torch {torch.__version__}"
    )
    for dtype in arguments.dtypes:
        for size in arguments.sizes:
            table = Table(title=f"{dtype}, {size:,} elements")
            for heading in ("", "torch ns", "ours ns", "ratio", "GB/s", "of copy"):
                table.add_column(heading, justify="right" if heading else "left")
            with torch.inference_mode():
                for case in cases(size, DTYPES[dtype]):
                    found = measure(case, arguments.rounds, arguments.block)
                    ours = found["ours"]
                    moved = (case.inputs + 1) * size * DTYPES[dtype].itemsize
                    table.add_row(
                        case.name,
                        f"{found['torch'] / size * 1e9:.3f}",
                        f"{ours / size * 1e9:.3f}",
                        f"{found['torch'] / ours:.2f}",
                        f"{moved / ours / 1e9:.1f}",
                        f"{found['limit'] / ours:.0%}",
                    )
            console.print(table)


if __name__ == "__main__":
    main()
