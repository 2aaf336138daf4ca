"""Fake quantization, forward and backward, against torch, torch.ao, torchao and a copy.

    python benchmarks/bench_fake_quantize.py              1024 x 4096, float32, 2 threads
    python benchmarks/bench_fake_quantize.py --shape 4096 11008 --dtype bfloat16 --save

Per case and peer: the time of a call, that time over ours, the bandwidth as a fraction of the
bandwidth of `torch.clone` (one read and one write forward, and the same again backward, over the
time of as many clones), and the bytes that autograd keeps in addition to the input. `composite` is
the straight-through formula in torch operators, as in most training code
(`(x.round() - x).detach() + x`); `compiled` is the same through `torch.compile`.

Each peer runs in a process of its own that keeps its freed memory, as in `torchquant bench linear`,
because new pages would cost more than the operator. Peers take turns in blocks, in every other
round backwards; the results are medians over blocks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torchquant
from torchquant import FakeQuantize, ops
from torchquant.bench import machine
from torchquant.bench.files import results_file, write_json_lines
from torchquant.bench.timing import medians, seconds_per_call
from torchquant.bench.workers import Answer, Worker, WorkerError, measure_blocks, serve
from torchquant.scheme import PerAxis

OURS = "torchquant"
QMIN, QMAX = -128, 127
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Call = Callable[[Tensor], Tensor]
# Of each case: is there a backward pass, is there a scale per channel, is the scale learned.
CASES = {
    "per tensor, forward": (False, False, False),
    "per tensor, forward and backward": (True, False, False),
    "per channel, forward and backward": (True, True, False),
    "learned, per tensor": (True, False, True),
    "learned, per channel": (True, True, True),
}


# ---------------------------------------------------------------- peers


def composite(x: Tensor, scale: Tensor, zero_point: Tensor | int, factor: float) -> Tensor:
    """LSQ in eager torch; plain fake quantization if the scale needs no gradient."""
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
        raise ValueError("this peer does not learn scales")
    observer = PerChannelMinMaxObserver if channels else MinMaxObserver
    kwargs = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0} if channels else {}
    module = Module(observer, QMIN, QMAX, dtype=torch.qint8, **kwargs)
    module.disable_observer()
    module.scale, module.zero_point = scale, torch.zeros(scale.shape, dtype=torch.int32)
    return module


def torchao_primitive(scale: Tensor, channels: bool, learned: bool) -> Call:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    if learned:
        raise ValueError("this peer does not learn scales")
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
    """Memory that autograd keeps for backward, each block once, without the given tensors."""
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
    """One peer in its process: prepares a case, then measures blocks of it."""

    def __init__(self, peer: str, shape: list[int], dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        self.peer = peer
        self.x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        self.grad = torch.randn(shape, generator=generator).to(DTYPES[dtype])

    def case(self, name: str) -> Answer:
        """Prepare the case's call, run it once and compare the result with ours."""
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

    def block(self, seconds: float) -> Answer:
        """Median seconds per call."""
        return {"seconds": seconds_per_call(self.call, seconds)}


def start(peer: str, options: argparse.Namespace) -> Worker:
    """The process of one peer."""
    shape = [str(size) for size in options.shape]
    rest = ["--threads", str(options.threads), "--dtype", options.dtype, "--shape", *shape]
    return Worker([__file__, "--worker", peer, *rest])


# ---------------------------------------------------------------- measuring and printing


def measure(
    name: str, workers: dict[str, Worker], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """One case: `ms` and `kept` bytes by peer, and the reasons of peers that failed."""
    kept, failed = {}, {}
    for peer, worker in workers.items():
        try:
            kept[peer] = worker.ask("case", name=name)["kept"]
        except WorkerError as error:
            failed[peer] = str(error)
    able = {peer: workers[peer] for peer in kept}
    blocks = measure_blocks(able, options.rounds, "block", seconds=options.block)
    for peer, why in failed.items():
        if "does not learn" not in why:
            console.print(f"{name}: {peer} left out: {why}", style="yellow")
    ms = {peer: 1e3 * seconds for peer, seconds in medians(blocks).items()}
    spread = {peer: [1e3 * seconds for seconds in times] for peer, times in blocks.items()}
    return {"case": name, "ms": ms, "kept": kept, "blocks_ms": spread, "failed": failed}


def table_of(result: dict[str, Any], size: int) -> Table:
    """One line per peer."""
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


def parse() -> argparse.Namespace:
    """The command line."""
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
        "--smoke", action="store_true", help="only show that the script works, without compiling"
    )
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.rounds, options.block = [5, 70], 1, 0.0005
        options.peers = [peer for peer in options.peers if peer != "compiled"]
    return options


def main() -> None:
    """Measure and print, or serve one peer."""
    options = parse()
    if options.worker:
        serve(lambda: Server(options.worker, options.shape, options.dtype, options.threads))
        return
    console, size = Console(width=100), math.prod(options.shape)
    busy = machine.busy_neighbours()
    header = {
        "kind": "fake_quantize",
        **machine.describe(),
        "isa": torchquant.cpu.active_isa(),
        "threads": options.threads,
        "shape": options.shape,
        "dtype": options.dtype,
        "busy_before": busy,
    }
    console.print(
        f"{header['cpu']}, {options.threads} threads, instruction set {header['isa']}, "
        f"torch {torch.__version__}, {options.dtype} {options.shape}"
    )
    machine.warn_if_busy(console, busy)
    workers = {peer: start(peer, options) for peer in options.peers}
    results = []
    try:
        for name in CASES:
            results.append(measure(name, workers, options, console))
            console.print(table_of(results[-1], size))
    finally:
        for worker in workers.values():
            worker.close()
    if options.save:
        path = results_file("fake_quantize", f"{options.threads}threads", options.dtype)
        write_json_lines(path, [header, *results])
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
