"""What the guard of a call costs, and what computing layers together with their neighbours gains.

    python benchmarks/bench_guard.py                   blocks of a sentence encoder and a decoder
    python benchmarks/bench_guard.py --rows 1 --widths 576

A quantized layer looks at its caller before it applies the activation after it, or computes the
outputs of other layers (`torchquant/nn/call_guard.py`). One line is one block of layers on one
input under `inference_mode`, three times: `apart` without fusion; `refused` with the guard, which
finds a reason to compute apart (a hook on the activation, or a changed weight of a member of the
group); `fused`. `guard` is the time of `refused` above `apart`, and its share of `fused`. Medians
of alternating blocks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant.bench.timing import medians, seconds_per_call
from torchquant.bench.workers import in_turns


class Activated(nn.Module):
    """A layer and the activation after it, as in an encoder's feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(width, 4 * width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        h = self.act(h)
        return h

    def refuse(self) -> None:
        """Keep the layer from applying the activation."""
        self.act.register_forward_pre_hook(lambda module, args: None)


class Projections(nn.Module):
    """Query, key and value of one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def refuse(self) -> None:
        """Keep the layers from being computed together: a weight is no longer the group's."""
        with torch.inference_mode(False), torch.no_grad():
            scale = self.k.qweight_scale  # type: ignore[union-attr]
            self.k.qweight_scale = scale.clone()  # type: ignore[union-attr,operator]


KINDS: dict[str, Callable[[int], nn.Module]] = {"activation": Activated, "q, k, v": Projections}
APART = torchquant.Fusion(activations=False, projections=False)


def blocks(make: Callable[[int], nn.Module], width: int) -> dict[str, nn.Module]:
    """The block without fusion, with a guard that refuses, and fused."""
    floating = make(width).eval()
    made = {name: copy.deepcopy(floating) for name in ("apart", "refused", "fused")}
    for name, block in made.items():
        fusion = APART if name == "apart" else torchquant.Fusion()
        torchquant.quantize_(block, filter_fn=lambda module, name: True, fusion=fusion)
    if "act" in floating._modules:  # both use the same operator
        made["apart"].act = copy.deepcopy(made["fused"].act)
    made["refused"].refuse()  # type: ignore[operator]
    return made


def measure(made: dict[str, nn.Module], x: Tensor, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds per call of each block, in alternating blocks of time."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for name in in_turns(list(made), rounds):
        times[name].append(seconds_per_call(lambda block=made[name]: block(x), seconds))
    return medians(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 576])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each call (default 7)")
    parser.add_argument("--block", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.widths, arguments.rows = [64], [1]
        arguments.rounds, arguments.block = 1, 0.0005

    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    console.print(
        f"{torchquant.cpu.cpu_name()}, {arguments.threads} threads, instruction set "
        f"{torchquant.cpu.active_isa()}, torch {torch.__version__}"
    )
    table = Table(title="microseconds of a call; guard: refused - apart, and its share of fused")
    for heading in ("", "rows x width", "apart", "refused", "fused", "guard", "share", "gain"):
        table.add_column(heading, justify="right" if heading else "left")
    with torch.inference_mode():
        for kind, make in KINDS.items():
            for width in arguments.widths:
                made = blocks(make, width)
                for rows in arguments.rows:
                    x = torch.randn(rows, width)
                    found = measure(made, x, arguments.rounds, arguments.block)
                    guard = found["refused"] - found["apart"]
                    table.add_row(
                        kind,
                        f"{rows} x {width}",
                        *(f"{1e6 * found[name]:.1f}" for name in ("apart", "refused", "fused")),
                        f"{1e6 * guard:.1f}",
                        f"{guard / found['fused']:.1%}",
                        f"{found['apart'] / found['fused']:.2f}x",
                    )
    console.print(table)


if __name__ == "__main__":
    main()
