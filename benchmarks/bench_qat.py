"""A training step with quantization: torchquant against float32 and other libraries.

    python benchmarks/bench_qat.py                 all peers, 2 threads
    python benchmarks/bench_qat.py --threads 1 --batch 128 --save

The model is Linear(1024, 2048) ReLU Linear(2048, 2048) ReLU Linear(2048, 1024) on a batch of 512. A
step is forward and backward of a mean square loss; `+ SGD` adds the optimizer and clearing the
gradients. Each model runs in a process of its own; they take turns, step by step, in every other
round backwards; the results are medians. Saved: bytes of the tensors that autograd keeps between
forward and backward, each storage once, without the parameters.

Peers: `torch.ao` is `prepare_qat` with its default settings (moving averages per tensor, weights
per channel); `torchao` is FakeQuantizedLinear with per-token activations and per-channel weights,
both int8; `composite` is the formula of the same fake quantization in plain torch with a
straight-through estimator, eager and through `torch.compile`. Peers that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchquant
from torchquant import QATConfig, TrainingConfig
from torchquant.bench import machine
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.workers import Answer, Worker, WorkerError, in_turns, serve
from torchquant.nn import QATLinear

COMPILED = "composite compiled"
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
    """The same model with each ReLU fused into the linear layer before it."""
    linears = [layer for layer in float_model(sizes) if isinstance(layer, nn.Linear)]
    activations = ["relu"] * (len(linears) - 1) + ["none"]
    return nn.Sequential(
        *(
            QATLinear.from_float(linear, config, activation)
            for linear, activation in zip(linears, activations, strict=True)
        )
    )


def torch_ao_model(sizes: list[int]) -> nn.Module:
    """torch.ao's ``prepare_qat`` with the settings for x86."""
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), *float_model(sizes), quantization.DeQuantStub())
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model.train())


def torchao_model(sizes: list[int]) -> nn.Module:
    """torchao's FakeQuantizedLinear instead of every Linear."""
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
    """Bytes that autograd keeps of one forward, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # held, so that no storage is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in known)


Sizes = list[int]
MODELS: dict[str, Callable[[Sizes], nn.Module]] = {
    "float32": float_model,
    **{name: partial(our_model, config=config) for name, config in OURS.items()},
    "torch.ao": torch_ao_model,
    "torchao": torchao_model,
    "composite": composite_model,
    COMPILED: lambda sizes: torch.compile(composite_model(sizes)),  # type: ignore[dict-item]
}


class Server:
    """One model with its optimizer, in its process."""

    def __init__(self, peer: str, sizes: Sizes, batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = MODELS[peer](sizes)
        self.x, self.target = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)

    def warm_up(self) -> Answer:
        """Two steps that do not count: ranges, compilation, memory."""
        self.step()
        return self.step()

    def step(self) -> Answer:
        """Seconds of one step, without and with the optimizer."""
        start = time.perf_counter()
        loss = (self.model(self.x) - self.target).square().mean()
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"step": middle - start, "sgd": time.perf_counter() - start}

    def saved(self) -> Answer:
        """Bytes that autograd keeps between forward and backward."""
        return {"bytes": saved_bytes(self.model, self.x)}


def start(peer: str, options: argparse.Namespace) -> Worker:
    """The process of one model."""
    sizes = [str(size) for size in options.sizes]
    rest = ["--threads", str(options.threads), "--batch", str(options.batch), "--sizes", *sizes]
    return Worker([__file__, "--worker", peer, *rest])


def measure(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row per peer."""
    names = [name for name in MODELS if name != COMPILED or not options.no_compile]
    workers = {name: start(name, options) for name in names}
    steps: dict[str, list[Answer]] = {}
    try:
        for name, worker in workers.items():
            try:
                worker.ask("warm_up")
                steps[name] = []
            except WorkerError as error:
                console.print(f"{name} is left out: {error}", style="yellow")
            worker.wait_until_asleep()
        for name in in_turns(list(steps), options.rounds):
            steps[name].append(workers[name].ask("step"))
            workers[name].wait_until_asleep()
        rows = [
            {
                "peer": name,
                "step_ms": 1e3 * statistics.median(answer["step"] for answer in answers),
                "sgd_ms": 1e3 * statistics.median(answer["sgd"] for answer in answers),
                "best_ms": 1e3 * min(answer["step"] for answer in answers),
                "saved_bytes": workers[name].ask("saved")["bytes"],
            }
            for name, answers in steps.items()
        ]
    finally:
        for worker in workers.values():
            worker.close()
    for row in rows:
        row["ratio"] = row["step_ms"] / rows[0]["step_ms"]
        row["sgd_ratio"] = row["sgd_ms"] / rows[0]["sgd_ms"]
        row["saved_ratio"] = row["saved_bytes"] / rows[0]["saved_bytes"]
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The table for the terminal."""
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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 2048, 1024])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each peer (default 15)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.jsonl")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.batch, options.rounds = [16, 32, 16], 4, 1
        options.no_compile = True
    return options


def main() -> None:
    """Measure and print, or serve one model."""
    options = parse()
    if options.worker:
        serve(lambda: Server(options.worker, options.sizes, options.batch, options.threads))
        return
    console = Console(width=100)
    header = {
        "kind": "qat",
        **machine.describe(),
        "threads": options.threads,
        "isa": torchquant.cpu.active_isa(),
        "sizes": options.sizes,
        "batch": options.batch,
    }
    machine.warn_if_busy(console, machine.busy_neighbours())
    rows = measure(options, console)
    console.print(
        f"{header['cpu']}, {options.threads} threads, instruction set {header['isa']}, "
        f"sizes {options.sizes}, batch {options.batch}"
    )
    console.print(table_of(rows))
    if options.save:
        path = results_file("qat", f"{options.threads}threads")
        write_json_lines(path, [header, *rows])
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
