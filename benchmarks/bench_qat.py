"""A training step with quantization: ours beside float32 and the other libraries.

    python benchmarks/bench_qat.py                 all peers, 2 threads
    python benchmarks/bench_qat.py --threads 1 --batch 128 --save

The model is Linear(1024, 2048) ReLU Linear(2048, 2048) ReLU Linear(2048, 1024) on a batch of 512. A
step is forward and backward of a mean square loss; `+ SGD` adds the optimizer and clearing the
gradients. All models live in one process and take turns, step by step, every other round backwards;
medians. Saved: bytes of the tensors that autograd keeps between forward and backward, storages
counted once, parameters left out.

Peers: `torch.ao` is `prepare_qat` with its default settings (moving averages per tensor, weights
per channel); `torchao` is FakeQuantizedLinear with per-token activations and per-channel weights,
both int8; `composite` is the formula of the same fake quantization in plain torch with a
straight-through estimator, eager and through `torch.compile`. Peers that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant import QATConfig, TrainingConfig
from torchquant.bench import machine
from torchquant.nn import QATLinear

RESULTS = Path(__file__).parent / "results"
OURS = {
    "torchquant dynamic": QATConfig(),
    "torchquant static": QATConfig(activations="static"),
    "torchquant LSQ": QATConfig(
        activations="static", learned_weights=True, learned_activations=True
    ),
}


def float_model(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def our_model(sizes: list[int], config: TrainingConfig) -> nn.Sequential:
    """The same with the ReLU absorbed."""
    linears = [layer for layer in float_model(sizes) if isinstance(layer, nn.Linear)]
    activations = ["relu"] * (len(linears) - 1) + ["none"]
    return nn.Sequential(
        *(
            QATLinear.from_float(linear, config, activation)
            for linear, activation in zip(linears, activations, strict=True)
        )
    )


def torch_ao_model(sizes: list[int]) -> nn.Module:
    """``prepare_qat`` of torch itself, on the quantized engine of this CPU."""
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), *float_model(sizes), quantization.DeQuantStub())
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model.train())


def torchao_model(sizes: list[int]) -> nn.Module:
    """torchao's FakeQuantizedLinear in place of every Linear."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    channels = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    return nn.Sequential(
        *(
            FakeQuantizedLinear.from_linear(layer, tokens, channels)
            if isinstance(layer, nn.Linear)
            else layer
            for layer in float_model(sizes)
        )
    )


class CompositeLinear(nn.Linear):
    """Per-token activations and per-channel weights fake-quantized with torch's own operators."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            least = input.amin(-1, keepdim=True).clamp(max=0)
            greatest = input.amax(-1, keepdim=True).clamp(min=0)
            scale = ((greatest - least) / 255).clamp(min=1e-12)
            zero = (-128 - least / scale).round().clamp(-128, 127)
            channel = (self.weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        rounded = ((input / scale).round() + zero).clamp(-128, 127)
        x = input + ((rounded - zero) * scale - input).detach()
        stepped = (self.weight / channel).round().clamp(-127, 127) * channel
        return nn.functional.linear(x, self.weight + (stepped - self.weight).detach(), self.bias)


def composite_model(sizes: list[int]) -> nn.Module:
    """The float model with :class:`CompositeLinear` layers."""
    model = float_model(sizes)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.__class__ = CompositeLinear
    return model


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of one forward, beside parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # held, so that no storage is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in known)


def make_models(sizes: list[int], compiled: bool) -> dict[str, nn.Module]:
    """Every peer that is installed, by name."""
    makers: dict[str, Callable[[], nn.Module]] = {"float32": lambda: float_model(sizes)}
    for name, config in OURS.items():
        makers[name] = lambda config=config: our_model(sizes, config)
    makers["torch.ao"] = lambda: torch_ao_model(sizes)
    makers["torchao"] = lambda: torchao_model(sizes)
    makers["composite"] = lambda: composite_model(sizes)
    if compiled:
        makers["composite compiled"] = lambda: torch.compile(composite_model(sizes))  # type: ignore
    models = {}
    for name, make in makers.items():
        try:
            models[name] = make()
        except (ImportError, AttributeError) as error:  # torch may drop torch.ao and its dtypes
            print(f"{name} is left out: {error}")
    return models


class Peer:
    """A model with its optimizer, one step at a time."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target = model, x, target
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        self.steps: list[float] = []
        self.with_sgd: list[float] = []
        for _ in range(2):  # ranges, compilation, memory
            self.step()
        self.steps.clear()
        self.with_sgd.clear()

    def step(self) -> None:
        """Time one step."""
        start = time.perf_counter()
        loss = (self.model(self.x) - self.target).square().mean()
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps.append(middle - start)
        self.with_sgd.append(time.perf_counter() - start)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each peer."""
    torch.set_num_threads(arguments.threads)
    models = make_models(arguments.sizes, not arguments.no_compile)
    x = torch.randn(arguments.batch, arguments.sizes[0])
    target = torch.randn(arguments.batch, arguments.sizes[-1])
    peers = {name: Peer(model, x, target) for name, model in models.items()}
    for turn in range(arguments.rounds):
        order = list(peers.values())
        for peer in order if turn % 2 == 0 else reversed(order):
            peer.step()
    rows = []
    for name, peer in peers.items():
        rows.append(
            {
                "peer": name,
                "step_ms": statistics.median(peer.steps) * 1e3,
                "sgd_ms": statistics.median(peer.with_sgd) * 1e3,
                "best_ms": min(peer.steps) * 1e3,
                "saved_bytes": saved_bytes(peer.model, x),
            }
        )
    for row in rows:
        row["ratio"] = row["step_ms"] / rows[0]["step_ms"]
        row["sgd_ratio"] = row["sgd_ms"] / rows[0]["sgd_ms"]
        row["saved_ratio"] = row["saved_bytes"] / rows[0]["saved_bytes"]
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """What is printed."""
    table = Table()
    headings = ("", "ms", "of float", "ms + SGD", "of float", "saved MiB", "of float")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["peer"],
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['sgd_ms']:.1f}",
            f"{row['sgd_ratio']:.2f}",
            f"{row['saved_bytes'] / 2**20:.2f}",
            f"{row['saved_ratio']:.2f}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 2048, 1024])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each peer (default 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--save", action="store_true", help="write JSON lines to results/")
    parser.add_argument("--smoke", action="store_true", help="only show that everything runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.sizes, arguments.batch, arguments.rounds = [16, 32, 16], 4, 1
        arguments.no_compile = True

    console = Console(width=100)
    busy = machine.busy_neighbours()
    if busy is not None and busy > 10:
        console.print(f"others use {busy:.0f} % of this machine: figures vary", style="yellow")
    rows = measure(arguments)
    run = {
        "threads": arguments.threads,
        "isa": torchquant.cpu.active_isa(),
        "sizes": arguments.sizes,
        "batch": arguments.batch,
    }
    console.print(", ".join(f"{key} {value}" for key, value in run.items()))
    console.print(table_of(rows))
    if arguments.save:
        stem = f"qat-{machine.today()}-{machine.cpu_slug()}-{arguments.threads}threads"
        path = RESULTS / f"{stem}.jsonl"
        lines = [{**machine.describe(), **run}, *rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        console.print(f"written to {path.name}")


if __name__ == "__main__":
    main()
