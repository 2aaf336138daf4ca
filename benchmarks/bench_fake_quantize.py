"""Fake quantization, forward and backward, beside torch's, torch.ao's, torchao's and a copy.

    python benchmarks/bench_fake_quantize.py              1024 x 4096, float32, 2 threads
    python benchmarks/bench_fake_quantize.py --shape 4096 11008 --dtype bfloat16 --save

Per case and peer: the time of a call, that time over ours, the bandwidth as a fraction of
`torch.clone`'s (the bytes that must be moved: one read and one write forward, the same again
backward, over the time of as many clones), and the bytes that autograd keeps beside the input.
`composite` is the straight-through formula in torch operators, as most training code has it
(`(x.round() - x).detach() + x`); `compiled` the same through `torch.compile`.

Each peer runs in a process of its own that keeps its freed memory, as in `torchquant bench linear`;
new pages would cost more than the operator. Peers take turns in blocks, each other round backwards;
figures are medians over blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torchquant
from torchquant import FakeQuantize, ops
from torchquant.bench import machine
from torchquant.bench.timing import seconds_per_call
from torchquant.bench.workers import KEEP_FREED_MEMORY
from torchquant.scheme import PerAxis

OURS = "torchquant"
QMIN, QMAX = -128, 127
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).parent / "results"
SETTLE_SECONDS = 0.03  # idle OpenMP threads spin for up to 20 ms and would disturb the next peer

Call = Callable[[Tensor], Tensor]
# What a case measures: is there a backward pass, of what granularity, is the scale learned.
CASES = {
    "per tensor, forward": (False, False, False),
    "per tensor, forward and backward": (True, False, False),
    "per channel, forward and backward": (True, True, False),
    "learned, per tensor": (True, False, True),
    "learned, per channel": (True, True, True),
}


# ---------------------------------------------------------------- peers


def composite(x: Tensor, scale: Tensor, zero_point: Tensor | int, factor: float) -> Tensor:
    """LSQ as it is written in eager torch; without a gradient to scale plain fake quantization."""
    if scale.requires_grad:
        scale = (scale - scale * factor).detach() + scale * factor
    v = torch.clamp(x / scale + zero_point, QMIN, QMAX)
    v = (v.round() - v).detach() + v
    return (v - zero_point) * scale


def ours(scale: Tensor, channels: bool, learned: bool) -> Call:
    if learned:
        kwargs: dict[str, Any] = {"granularity": PerAxis(0)} if channels else {}
        kwargs |= {"qmin": QMIN, "qmax": QMAX, "grad_factor": 1.0}
        return lambda x: ops.fake_quantize_learned(x, scale, **kwargs)
    wide = scale[:, None] if channels else scale
    return lambda x: FakeQuantize.apply(x, wide, None, QMIN, QMAX)


def torch_operator(scale: Tensor, channels: bool, learned: bool) -> Call:
    if learned:
        zero = torch.zeros(scale.shape, requires_grad=True)
        if channels:
            learnable = torch._fake_quantize_learnable_per_channel_affine
            return lambda x: learnable(x, scale, zero, 0, QMIN, QMAX, 1.0)
        learnable = torch._fake_quantize_learnable_per_tensor_affine
        return lambda x: learnable(x, scale, zero, QMIN, QMAX, 1.0)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    if channels:
        return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, 0, QMIN, QMAX)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, QMIN, QMAX)


def torch_ao_module(scale: Tensor, channels: bool, learned: bool) -> Call:
    from torch.ao.quantization import (
        FakeQuantize as Module,
    )
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    if learned:
        raise ValueError("its steps are not learned")
    observer = PerChannelMinMaxObserver if channels else MinMaxObserver
    kwargs = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0} if channels else {}
    module = Module(observer, QMIN, QMAX, dtype=torch.qint8, **kwargs)
    module.disable_observer()
    module.scale, module.zero_point = scale, torch.zeros(scale.shape, dtype=torch.int32)
    return module


def torchao_primitive(scale: Tensor, channels: bool, learned: bool) -> Call:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    if learned:
        raise ValueError("its steps are not learned")
    zero = torch.zeros(scale.shape, dtype=torch.int32)

    def call(x: Tensor) -> Tensor:
        block = (1, x.shape[1]) if channels else x.shape
        result: Tensor = _fake_quantize_affine(x, block, scale, zero, torch.int8, QMIN, QMAX)
        return result

    return call


def composite_eager(scale: Tensor, channels: bool, learned: bool) -> Call:
    wide = scale[:, None] if channels else scale
    return lambda x: composite(x, wide, 0, 1.0)


def composite_compiled(scale: Tensor, channels: bool, learned: bool) -> Call:
    compiled = torch.compile(composite, dynamic=False)
    wide = scale[:, None] if channels else scale
    return lambda x: compiled(x, wide, 0, 1.0)


def clone(scale: Tensor, channels: bool, learned: bool) -> Call:
    return lambda x: x.clone()


PEERS: dict[str, Callable[[Tensor, bool, bool], Call]] = {
    OURS: ours,
    "torch": torch_operator,
    "torch.ao module": torch_ao_module,
    "torchao": torchao_primitive,
    "composite": composite_eager,
    "compiled": composite_compiled,
    "clone": clone,
}


# ---------------------------------------------------------------- a peer's process


def kept_bytes(call: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Memory that autograd keeps for backward, each block once, without what was there before."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for tensor in given:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(found.values())


class Server:
    """One peer: prepares a case, then measures blocks of it."""

    def __init__(self, peer: str, shape: list[int], dtype: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.peer = peer
        self.x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        self.grad = torch.randn(shape, generator=generator).to(DTYPES[dtype])

    def case(self, name: str) -> dict[str, Any]:
        """Build the case's call and run it once; None where the result differs from ours."""
        backward, channels, learned = CASES[name]
        scale = torch.full((self.x.shape[0] if channels else 1,), 0.02)
        scale.requires_grad_(learned)
        make = PEERS[self.peer](scale, channels, learned)
        x = self.x.detach().requires_grad_(backward)
        leaves = [x, scale] if learned else [x]

        def both() -> Tensor:
            if self.peer == "clone":  # as many bytes, nothing computed
                make(self.grad)
                return make(x.detach())
            y = make(x)
            torch.autograd.grad(y, leaves, self.grad)
            return y

        self.call = both if backward else lambda: make(x)
        y = self.call().detach()
        if self.peer != "clone":
            expected = ours(scale.detach(), channels, False)(x.detach())
            wrong = (y.float() - expected.float()).abs().max() / 0.02
            if wrong > 1.01:
                raise ValueError(f"results differ by {wrong:.1f} steps")
        if not backward or self.peer == "clone":
            return {"kept": 0}
        return {"kept": kept_bytes(lambda: make(x), [x, scale])}

    def block(self, seconds: float) -> dict[str, Any]:
        """Median seconds of a call."""
        return {"seconds": seconds_per_call(self.call, seconds)}


def serve(pipe: Connection, threads: int, *arguments: Any) -> None:
    """Answer requests until None comes."""
    torch.set_num_threads(threads)
    server = Server(*arguments)
    while (request := pipe.recv()) is not None:
        name, argument = request
        try:
            pipe.send(getattr(server, name)(argument))
        except Exception as error:  # whatever a peer raises is that peer's result
            pipe.send({"failed": f"{type(error).__name__}: {error}".partition("\n")[0]})


class Worker:
    """The parent's end of a peer's process."""

    def __init__(self, peer: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        rest = (arguments.threads, peer, arguments.shape, arguments.dtype)
        self.process = context.Process(target=serve, args=(other, *rest), daemon=True)
        self.process.start()

    def ask(self, name: str, argument: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self.pipe.send((name, argument))
        answer: dict[str, Any] = self.pipe.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


# ---------------------------------------------------------------- measuring and printing


def measure(
    name: str, workers: dict[str, Worker], arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """One case: `ms` and `kept` bytes by peer, and who could not take part."""
    kept, failed = {}, {}
    for peer, worker in workers.items():
        answer = worker.ask("case", name)
        if "failed" in answer:
            failed[peer] = answer["failed"]
        else:
            kept[peer] = answer["kept"]
    blocks: dict[str, list[float]] = {peer: [] for peer in kept}
    for turn in range(arguments.rounds):
        for peer in list(kept) if turn % 2 == 0 else list(reversed(kept)):
            time.sleep(SETTLE_SECONDS)
            blocks[peer].append(workers[peer].ask("block", arguments.block)["seconds"])
    for peer, why in failed.items():
        if "not learned" not in why:
            console.print(f"{name}: {peer} left out: {why}", style="yellow")
    ms = {peer: round(statistics.median(times) * 1e3, 4) for peer, times in blocks.items()}
    spread = {peer: [round(t * 1e3, 4) for t in times] for peer, times in blocks.items()}
    return {"case": name, "ms": ms, "kept": kept, "blocks_ms": spread, "failed": failed}


def table_of(result: dict[str, Any], size: int) -> Table:
    """A line for each peer."""
    table = Table(title=result["case"], title_justify="left")
    for heading in ("", "ms", "time / ours", "of clone's bandwidth", "kept, bytes per element"):
        table.add_column(heading, justify="right" if heading else "left")
    times = result["ms"]
    for peer, ms in times.items():
        table.add_row(
            peer,
            f"{ms:.3f}",
            f"{ms / times[OURS]:.2f}" if OURS in times else "-",
            f"{times['clone'] / ms:.0%}" if "clone" in times else "-",
            f"{result['kept'][peer] / size:.3f}" if CASES[result["case"]][0] else "-",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=2, default=[1024, 4096])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each call (default 7)")
    parser.add_argument("--block", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.jsonl")
    parser.add_argument(
        "--smoke", action="store_true", help="only show that everything runs, but for compiling"
    )
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.shape, arguments.rounds, arguments.block = [5, 70], 1, 0.0005
        arguments.peers = [peer for peer in arguments.peers if peer != "compiled"]

    os.environ.update({k: v for k, v in KEEP_FREED_MEMORY.items() if k not in os.environ})
    console, size = Console(width=100), math.prod(arguments.shape)
    header = {
        "kind": "fake_quantize",
        **machine.describe(),
        "isa": torchquant.cpu.active_isa(),
        "threads": arguments.threads,
        "shape": arguments.shape,
        "dtype": arguments.dtype,
    }
    console.print(
        f"{header['cpu']}, {arguments.threads} threads, instruction set {header['isa']}, "
        f"torch {torch.__version__}, {arguments.dtype} {arguments.shape}"
    )
    busy = machine.busy_neighbours()
    if busy is not None and busy > 10:
        console.print(f"others use {busy:.0f} % of this machine: figures vary", style="yellow")
    workers = {peer: Worker(peer, arguments) for peer in arguments.peers}
    results = []
    for name in CASES:
        results.append(measure(name, workers, arguments, console))
        console.print(table_of(results[-1], size))
    for worker in workers.values():
        worker.close()
    if arguments.save:
        stem = f"fake_quantize-{machine.today()}-{machine.cpu_slug()}-{arguments.threads}threads"
        path = RESULTS / f"{stem}-{arguments.dtype}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [{**header, "busy_before": busy}, *results]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        console.print(f"written: {path.name}")


if __name__ == "__main__":
    main()
