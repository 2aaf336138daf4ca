"""Everything on an NVIDIA GPU: first the bits, against this machine's CPU, then the speed.

    python benchmarks/bench_cuda.py --save          all of it, under 8 minutes
    python benchmarks/bench_cuda.py --parts linear --minutes 3
    python benchmarks/bench_cuda.py --smoke         tiny sizes; without a GPU on the CPU, untimed

Correctness comes first and decides the exit code: every operator on random inputs, odd sizes and
non-finite values, on each path (Triton, ATen), into memory that was filled with other bytes before;
its result has to equal the CPU kernel's in every bit.

Times are of CUDA graphs, replayed, by events; models and peers take turns in rounds, every other
round backwards; medians. Up to 16 rows the weights of a graph's calls are as many copies as exceed
the L2 cache twice. Ceilings are measured in the same run: a bf16 and an int8 product of 8192^3, a
copy and a read of 2 GiB. TOPS counts a multiplication and an addition as two.

Peers: `bf16` is `nn.functional.linear`; `_int_mm` is torch's integer product and then scales and
bias, `eager` or through `torch.compile` (where M, K or N forbid it, it is left out); `torchao` is
`Int8DynamicActivationInt8WeightConfig` through `torch.compile`, where installed and time allows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant import QATConfig, TrainingConfig
from torchquant.bench import machine
from torchquant.nn import QATLinear, QuantizedLinear

RESULTS = Path(__file__).parent / "results"
PARTS = ("correctness", "ceilings", "linear", "fake_quantize", "qat", "block")
PEERS = {"bf16", "bf16 compiled", "bf16 autocast", "float32", "_int_mm", "_int_mm compiled"}
PEERS |= {"torch", "compiled", "torchao compiled", "int8", "copy", "read"}
SMALL_ROWS = 16
PEAK_INT8_TOPS, PEAK_BANDWIDTH = 1979.0, 4.8e12  # NVIDIA's data sheet of the H200, dense
Call = Callable[[], Any]


@dataclass
class Run:
    """What every part needs."""

    device: torch.device
    smoke: bool
    deadline: float
    console: Console
    file: Path | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    failed: bool = False  # something of ours did not run

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def keep(self, kind: str, **facts: Any) -> None:
        """A line of the results file, written at once: who is cut off has what was measured."""
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"kind": kind, **facts}) + "\n")


# ---------------------------------------------------------------- correctness


def bits(tensor: Tensor) -> Tensor:
    """A float tensor as integers, every NaN the same one."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def poison(device: torch.device) -> None:
    """Leave other bytes in the memory that the next results will get."""
    if device.type == "cuda":
        held = [
            torch.full((size,), 0xA5, dtype=torch.uint8, device=device)
            for size in (512, 4096, 1 << 16, 1 << 19, 3 << 20, 12 << 20, 64 << 20)
            for _ in range(4)
        ]
        del held


def random_input(m: int, k: int, dtype: torch.dtype, special: bool) -> Tensor:
    """Rows of different magnitude; with `special` ones that hold NaN and infinities."""
    x = torch.randn(m, k) * 2.0 ** torch.randint(-20, 20, (m, 1)).float()
    if special and m > 2:
        x[0, 0], x[1, -1] = math.nan, -math.inf
        x[2] = 0.0
    return x.to(dtype)


@dataclass
class Layer:
    """A layer's tensors; `packed` by the operator of each device, whose layouts differ."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor

    @classmethod
    def random(cls, n: int, k: int) -> Layer:
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        zero = torch.randint(-128, 128, (n,), dtype=torch.int32)
        return cls(weight, torch.rand(n) + 0.01, zero, torch.randn(n) * k)


Case = Callable[[Any, torch.device], Any]


def cases(m: int, n: int, k: int, dtype: torch.dtype, special: bool) -> Iterator[tuple[str, Case]]:
    """Calls of operators: each takes a namespace of operators and a device to put its inputs on."""
    layer, x = Layer.random(n, k), random_input(m, k, dtype, special)
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    sx, zx = torch.rand(m, 1) + 0.01, torch.randint(-128, 128, (m, 1), dtype=torch.int32)
    one, step = torch.tensor([0.037]), torch.rand(k) * 0.1 + 1e-3
    qmin, qmax = -127, 127

    def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(device) for tensor in tensors]

    def dynamic(symmetric: bool, zero: bool, activation: str, out: torch.dtype) -> Case:
        def run(space: Any, device: torch.device) -> Any:
            w, s, z, b, a = on(device, layer.weight, layer.scale, layer.zero_point, layer.bias, x)
            packed = space.pack_weight(w)
            zeros = z if zero else None
            return space.linear_dynamic(a, packed, s, zeros, b, n, symmetric, activation, out)

        return run

    def static(a: Tensor, s: Tensor, z: Tensor | None, out: torch.dtype, to_int: bool) -> Case:
        def run(space: Any, device: torch.device) -> Any:
            w, ws, b, xa, xs = on(device, layer.weight, layer.scale, layer.bias, a, s)
            zero = None if z is None else z.to(device)
            so = torch.tensor([float(k)], device=device) if to_int else None
            packed = space.pack_weight(w)
            return space.linear_static(xa, xs, zero, packed, ws, None, b, n, "relu", out, so, 3)

        return run

    def simple(name: str, *arguments: Any) -> Case:
        def run(space: Any, device: torch.device) -> Any:
            moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
            return getattr(space, name)(*moved)

        return run

    activations = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
    combinations = itertools.product((True, False), (False, True))
    for index, (symmetric, zero) in enumerate(combinations):
        name = f"linear_dynamic symmetric={symmetric} zero={zero}"
        yield name, dynamic(symmetric, zero, activations[(m + index) % 7], dtype)
    yield "linear_static int8", static(q, one, None, torch.float32, False)
    yield "linear_static int8 rows", static(q, sx, zx, torch.bfloat16, False)
    yield "linear_static float", static(x, one, torch.tensor([3]).int(), dtype, False)
    yield "linear_static to int8", static(q, one, None, torch.int8, True)
    if k <= 65_793:

        def product(space: Any, device: torch.device) -> Any:
            w, a = on(device, layer.weight, q)
            return space.int8_mm(a, space.pack_weight(w), n)

        yield "int8_mm", product
    yield "quantize_per_token", simple("quantize_per_token", x, False)
    yield "quantize_rows", simple("quantize_rows", x, None, None, -8, 7, True)
    yield "quantize axis", simple("quantize", x, step, None, -128, 127, 1, None)
    yield "quantize group", simple("quantize", x, sx, zx, -128, 127, None, k)
    yield "fake_quantize", simple("fake_quantize_mask", x, one, None, qmin, qmax)
    yield "fake_quantize axis", simple("fake_quantize_mask", x, step, None, qmin, qmax, 1)
    yield "fake_quantize rows", simple("fake_quantize_mask", x, sx[:, 0], None, qmin, qmax, 0)
    yield "fake_quantize_learned", simple("fake_quantize_learned", x, one, None, qmin, qmax, 1.0)
    yield "minmax", simple("minmax", x)
    yield "minmax axis", simple("minmax", x, 1)
    yield "activation", simple("activation", x, activations[m % 7])
    yield "rms_norm", simple("rms_norm", x, torch.rand(k).to(dtype), 1e-6)
    yield "layer_norm", simple("layer_norm", x, torch.rand(k), torch.rand(k), 1e-5)


def shapes_to_check(smoke: bool) -> list[tuple[int, int, int]]:
    """M, N, K: ones, odd numbers, tile edges, a few of real layers; of each kind one first, for
    time may run out."""
    few = [(17, 40, 64), (1, 1, 1), (3, 1, 5), (1, 7, 33)]
    if smoke:
        return few
    first = [(17, 40, 64), (255, 513, 1023), (1024, 4096, 1024), (1, 4096, 4096), (1, 1, 1)]
    more = [(16, 1000, 4097), (33, 129, 257), (128, 256, 128), (7, 50, 33_030)]
    more += [(2048, 2048, 2048), (300, 9, 70_000)]
    few = [*first, *(shape for shape in few if shape not in first)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        m, n, k = (int(2 ** (torch.rand((), generator=generator) * 10)) for _ in range(3))
        more.append((m, n, k))
    return few + more


def paths(run: Run) -> list[str]:
    """The ways in which operators can run on this device."""
    return list(torchquant.cuda.available_paths()) if run.on_gpu else ["aten"]


@contextmanager
def on_path(run: Run, name: str) -> Iterator[Any]:
    """The namespace whose operators run that way."""
    if not run.on_gpu:
        yield torch.ops.torchquant_aten
        return
    with ExitStack() as stack:
        stack.enter_context(torchquant.cuda.use_path(name))
        if name == "triton":  # default configurations: tuning would compile eight for each shape
            from torchquant.triton.tuning import choose as tuning

            stack.enter_context(tuning.paused())
        yield torch.ops.torchquant


def correctness(run: Run) -> bool:
    """Every operator against the CPU; what differs is printed. True where nothing does."""
    torch.manual_seed(0)
    cpu, wrong, compared, values = torch.device("cpu"), [], 0, 0
    shapes, end = shapes_to_check(run.smoke), time.monotonic() + 0.3 * run.left()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for index, (m, n, k) in enumerate(shapes):
        if time.monotonic() > end:  # compiling takes seconds for each kind of epilogue
            # Of the shape before, some calls may be missing too.
            left_out = ", ".join(f"{m}x{n}x{k}" for m, n, k in shapes[index:])
            run.console.print(f"correctness: out of time, left out: {left_out}", style="yellow")
            break
        for name, case in cases(m, n, k, dtypes[index % 3], special=index % 2 == 1):
            expected = case(torch.ops.torchquant, cpu)
            if time.monotonic() > end:
                break  # and the next shape says so
            for path in paths(run):
                compared += 1
                try:
                    with on_path(run, path) as space:
                        poison(run.device)
                        got = case(space, run.device)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}".partition("\n")[0]
                    wrong.append(f"{name}, {m}x{n}x{k}, {path}: {text[:300]}")
                    continue
                pairs = zip(as_tuple(got), as_tuple(expected), strict=True)
                for a, b in pairs:
                    values += b.numel()
                    if a.dtype != b.dtype or not torch.equal(bits(a), bits(b)):
                        differing = int((bits(a) != bits(b)).sum()) if a.shape == b.shape else -1
                        wrong.append(f"{name}, {m}x{n}x{k}, {path}: {differing} of {b.numel()}")
    for line in wrong[:40]:
        run.console.print(f"differs: {line}", style="bold red", markup=False)
    calls = f"{compared} calls ({', '.join(paths(run))}), {values:,} values"
    verdict = f"{len(wrong)} differ" if wrong else "every bit equals the CPU's"
    run.console.print(f"correctness: {calls}: {verdict}")
    run.keep("correctness", calls=compared, values=values, paths=paths(run), wrong=wrong)
    return not wrong


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    """An operator's results."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# ---------------------------------------------------------------- timing


class Timed:
    """Calls that are run one after the other, as a CUDA graph on a GPU."""

    def __init__(self, run: Run, calls: list[Call], graph: bool = True) -> None:
        self.run, self.calls, self.graph = run, calls, None
        for call in calls[:1] * 3 + calls:  # compile, tune, allocate
            call()
        if not run.on_gpu:
            return
        torch.cuda.synchronize()
        if graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.kept = [call() for call in calls]
        self.repeats = max(1, round(0.01 / max(self.seconds(1) * len(calls), 1e-6)))

    def seconds(self, repeats: int | None = None) -> float:
        """Of one call, the mean over `repeats` rounds of all."""
        repeats = repeats or getattr(self, "repeats", 1)
        if not self.run.on_gpu:
            start = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - start) / len(self.calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            if self.graph is not None:
                self.graph.replay()
            else:
                for call in self.calls:
                    call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / repeats / len(self.calls)


def compare(
    run: Run, makers: dict[str, Callable[[], list[Call]]], rounds: int = 5, graph: bool = True
) -> dict[str, float]:
    """Median seconds of a call by name, in turns. A peer that cannot run is named and left out;

    one of ours that cannot run makes the benchmark fail.
    """
    timed: dict[str, Timed] = {}
    for name, make in makers.items():
        stream = torch.cuda.current_stream() if run.on_gpu else None
        try:
            timed[name] = Timed(run, make(), graph)
        except Exception as error:  # a peer's may be of any kind
            ours = name not in PEERS
            run.failed |= ours
            text = f"{name} {'FAILED' if ours else 'left out'}: {error}".partition("\n")[0]
            run.console.print(text[:200], style="bold red" if ours else "yellow", markup=False)
            if stream is not None:  # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(stream)
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(1 if run.smoke else rounds):
        for name in list(timed) if turn % 2 == 0 else list(reversed(timed)):
            samples[name].append(timed[name].seconds())
    return {name: statistics.median(times) for name, times in samples.items()}


# ---------------------------------------------------------------- ceilings


def ceilings(run: Run) -> None:
    """What this GPU reaches with torch's own kernels: products, a copy, a read."""
    size = 64 if run.smoke else 8192
    a, b = (torch.randn(size, size, device=run.device).bfloat16() for _ in range(2))
    qa, qb = (
        torch.randint(-128, 128, (size, size), dtype=torch.int8, device=run.device)
        for _ in range(2)
    )
    elements = 1 << 12 if run.smoke else 1 << 29
    x = torch.zeros(elements, dtype=torch.int32, device=run.device)
    y = torch.empty_like(x)
    seconds = compare(
        run,
        {
            "bf16": lambda: [lambda: a @ b.t()],
            "int8": lambda: [lambda: torch._int_mm(qa, qb.t())],
            "copy": lambda: [lambda: y.copy_(x)],
            "read": lambda: [lambda: x.view(torch.float32).amax()],
        },
    )
    products = 2 * size**3
    run.ceilings = {
        "bf16_tops": products / seconds["bf16"] / 1e12,
        "int8_tops": products / seconds["int8"] / 1e12,
        "copy_tb": 8 * elements / seconds["copy"] / 1e12,
        "read_tb": 4 * elements / seconds["read"] / 1e12,
    }
    run.keep("ceilings", **run.ceilings)
    table = Table(title="ceilings, measured", title_justify="left")
    for name in run.ceilings:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3g}" for value in run.ceilings.values()))
    run.console.print(table)


# ---------------------------------------------------------------- int8 linear


def scaled(acc: Tensor, sx: Tensor, sw: Tensor, bias: Tensor) -> Tensor:
    """The epilogue of `_int_mm` in torch operators."""
    return (acc.to(torch.float32) * sx * sw + bias).to(torch.bfloat16)


def per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per-token quantization in torch operators."""
    wide = x.to(torch.float32)
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def linear_layers(n: int, k: int, copies: int, device: torch.device) -> list[QuantizedLinear]:
    """The same layer in several places in memory."""
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    linear = nn.Linear(k, n, device=device)
    first = QuantizedLinear.from_float(linear, config)
    rest = []
    for _ in range(copies - 1):
        layer = QuantizedLinear(k, n, config=config, device="meta")
        layer.packed, layer.weight_scale = first.packed.clone(), first.weight_scale
        layer.bias = first.bias
        rest.append(layer)
    return [first, *rest]


def linear_makers(run: Run, m: int, n: int, k: int) -> dict[str, Callable[[], list[Call]]]:
    """Ours and the peers on one shape, bf16 or int8 in, bf16 out, with bias."""
    cached = m > SMALL_ROWS or not run.on_gpu
    l2 = 0 if cached else torch.cuda.get_device_properties(run.device).L2_cache_size
    copies = 1 if cached else max(2, -(-2 * l2 // (n * k)))
    device = run.device
    x = torch.randn(m, k, device=device).bfloat16()
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
    one, bias = torch.full((1,), 0.02, device=device), torch.randn(n, device=device)
    scale = torch.full((n,), 0.01, device=device)

    def static() -> list[Call]:
        def call(layer: QuantizedLinear) -> Call:
            arguments = (q, one, None, layer.packed, layer.weight_scale, None, layer.bias, n)
            return lambda: torch.ops.torchquant.linear_static(*arguments, "none", torch.bfloat16)

        return [call(layer) for layer in linear_layers(n, k, copies, device)]

    def dynamic() -> list[Call]:
        return [lambda layer=layer: layer(x) for layer in linear_layers(n, k, copies, device)]

    def half() -> list[Call]:
        weights = torch.randn(max(1, -(-copies // 2)), n, k, device=device).bfloat16()
        b = bias.bfloat16()
        return [lambda w=w: F.linear(x, w, b) for w in weights]

    def int_mm(epilogue: Callable[..., Tensor], quantize: bool) -> Callable[[], list[Call]]:
        def make() -> list[Call]:
            weights = torch.randint(-128, 128, (copies, n, k), dtype=torch.int8, device=device)
            sx = torch.full((m, 1), 0.02, device=device)

            def call(w: Tensor) -> Tensor:
                a, s = per_row(x) if quantize else (q, sx)
                return epilogue(torch._int_mm(a, w.t()), s, scale, bias)

            return [lambda w=w: call(w) for w in weights]

        return make

    makers: dict[str, Callable[[], list[Call]]] = {
        "int8 in": static,
        "bf16 in": dynamic,
        "bf16": half,
        "_int_mm": int_mm(scaled, False),
    }
    if not run.smoke:
        makers["_int_mm compiled"] = int_mm(compiled(scaled), False)
    return makers


_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Through `torch.compile`, once for all shapes."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=True)
    return _compiled[function]


def linear_shapes(smoke: bool) -> list[tuple[int, int, int]]:
    """M, N, K; the ones that the goals name first."""
    if smoke:
        return [(1, 32, 48), (40, 32, 48)]
    layers = [(4096, 4096), (1024, 1024), (16384, 4096), (4096, 16384), (8192, 8192)]
    rows = (1, 4, 16, 64, 256, 1024, 4096, 8192)
    shapes = [(m, n, k) for n, k in layers for m in rows]
    first = [(8192, 8192, 8192), (1, 16384, 16384), (16, 16384, 16384), (256, 4096, 4096)]
    return first + [shape for shape in shapes if shape not in first]


def linear(run: Run) -> None:
    """int8 linear layers beside bf16 and the parts torch has."""
    names = ("int8 in", "bf16 in", "bf16", "_int_mm", "_int_mm compiled")
    table = Table(title="linear, bf16 out, microseconds", title_justify="left")
    for heading in ("M x N x K", *names, "of best peer", "rate", "of ceiling"):
        table.add_column(heading, justify="right")
    share = run.left() * 0.55
    end = time.monotonic() + share
    for m, n, k in linear_shapes(run.smoke):
        if time.monotonic() > end and not run.smoke:
            run.console.print("linear: out of time, shapes left out", style="yellow")
            break
        with torch.no_grad():  # a layer's bias would ask for gradients
            us = {a: 1e6 * s for a, s in compare(run, linear_makers(run, m, n, k)).items()}
        if "int8 in" not in us:
            continue
        ours, peers = us["int8 in"], [us[name] for name in us if name not in ("int8 in", "bf16 in")]
        tops, tb = 2 * m * n * k / ours / 1e6, (n * k + m * k + 2 * m * n) / ours / 1e6
        small = m <= SMALL_ROWS
        reached = share_of(run, "read_tb" if small else "int8_tops", tb if small else tops)
        best = min(peers, default=math.nan) / ours
        rate = f"{tb:.2f} TB/s" if small else f"{tops:.0f} TOPS"
        cells = [f"{us[name]:.1f}" if name in us else "-" for name in names]
        table.add_row(f"{m}x{n}x{k}", *cells, f"{best:.2f}", rate, reached)
        run.keep("linear", m=m, n=n, k=k, us=us, ratio=best, tops=tops, tb=tb)
    run.console.print(table)


def out_of_time(run: Run, part: str, needed: float) -> bool:
    """Whether less than so many seconds are left; says what that cuts short."""
    if run.smoke or run.left() >= needed:
        return False
    run.console.print(f"{part}: out of time, the rest is left out", style="yellow")
    return True


def share_of(run: Run, ceiling: str, value: float) -> str:
    """In percent of a measured ceiling."""
    return f"{value / run.ceilings[ceiling]:.0%}" if ceiling in run.ceilings else "-"


# ---------------------------------------------------------------- fake quantization


def composite(x: Tensor, scale: Tensor) -> Tensor:
    """LSQ as it is written in eager torch."""
    v = torch.clamp(x / scale, -127, 127)
    v = (v.round() - v).detach() + v
    return v * scale


def fake_quantize(run: Run) -> None:
    """Forward and backward of fake quantization beside torch's operators, in copy bandwidth."""
    shape = (5, 70) if run.smoke else (8192, 8192)
    device = run.device
    table = Table(title=f"fake quantize {shape}, forward and backward", title_justify="left")
    for heading in ("case", "ours, us", "torch, us", "composite compiled, us", "of copy bandwidth"):
        table.add_column(heading, justify="right")
    wanted = itertools.product((False, True), (False, True), (torch.float32, torch.bfloat16))
    for learned, channels, dtype in wanted:
        if out_of_time(run, "fake quantize", 60):
            break
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        grad = torch.randn(shape, device=device).to(dtype)
        count = shape[0] if channels else 1
        scale = torch.full((count,), 0.02, device=device, requires_grad=learned)
        zero = torch.zeros(count, dtype=torch.float32 if learned else torch.int32, device=device)
        axis = 0 if channels else None
        leaves = [x, scale] if learned else [x]

        def ours(x: Tensor = x, s: Tensor = scale, learns: bool = learned, a: Any = axis) -> Tensor:
            if learns:
                return torch.ops.torchquant.fake_quantize_learned(x, s, None, -127, 127, 1.0, a)
            return torch.ops.torchquant.fake_quantize(x, s, None, -127, 127, a)

        def theirs(
            x: Tensor = x,
            s: Tensor = scale,
            z: Tensor = zero,
            learns: bool = learned,
            a: Any = axis,
        ) -> Tensor:
            if learns and a is None:
                return torch._fake_quantize_learnable_per_tensor_affine(x, s, z, -127, 127, 1.0)
            if learns:
                learnable = torch._fake_quantize_learnable_per_channel_affine
                return learnable(x, s, z, 0, -127, 127, 1.0)
            if a is None:
                return torch.fake_quantize_per_tensor_affine(x, s, z, -127, 127)
            return torch.fake_quantize_per_channel_affine(x, s, z, 0, -127, 127)

        def composed(x: Tensor = x, s: Tensor = scale, c: bool = channels) -> Tensor:
            return compiled(composite)(x, s[:, None] if c else s)

        def both(forward: Call, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> Call:
            return lambda: torch.autograd.grad(forward(), leaves, grad)

        makers = {"ours": lambda f=ours, b=both: [b(f)], "torch": lambda f=theirs, b=both: [b(f)]}
        if not run.smoke:
            makers["compiled"] = lambda f=composed, b=both: [b(f)]
        us = {a: 1e6 * s for a, s in compare(run, makers, graph=False).items()}
        if "ours" not in us:
            continue
        moved = 4 * x.numel() * x.element_size()
        rate = moved / us["ours"] / 1e6
        case = f"{'learned' if learned else 'fixed'}, per {'channel' if channels else 'tensor'}"
        cells = [f"{us[name]:.1f}" if name in us else "-" for name in ("ours", "torch", "compiled")]
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"{case}, {name}", *cells, share_of(run, "copy_tb", rate))
        run.keep("fake_quantize", case=case, dtype=name, us=us, tb=rate)
    run.console.print(table)


# ---------------------------------------------------------------- training


def mlp(size: int, device: torch.device) -> list[nn.Linear]:
    """Three layers with the same parameters every time."""
    torch.manual_seed(0)
    return [nn.Linear(size, size, device=device) for _ in range(3)]


def qat(run: Run) -> None:
    """A training step of three linear layers with ReLU, float and quantization-aware."""
    size, batch = (32, 8) if run.smoke else (4096, 8192)
    device = run.device
    x, target = (torch.randn(batch, size, device=device) for _ in range(2))
    configs = {
        "dynamic": QATConfig(),
        "static": QATConfig(activations="static"),
        "LSQ": QATConfig(activations="static", learned_weights=True, learned_activations=True),
    }

    def step(model: nn.Module, half: bool) -> Call:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = F.mse_loss(model(x).float(), target)
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

        return call

    def floats(half: bool) -> Callable[[], list[Call]]:
        def make() -> list[Call]:
            a, b, c = mlp(size, device)
            return [step(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c), half)]

        return make

    def trained(config: TrainingConfig, half: bool) -> Callable[[], list[Call]]:
        def make() -> list[Call]:
            names = ("relu", "relu", "none")
            layers = [
                QATLinear.from_float(layer, config, name)
                for layer, name in zip(mlp(size, device), names, strict=True)
            ]
            model = nn.Sequential(*layers).train()
            model(x)
            return [step(model, half)]

        return make

    if out_of_time(run, "qat", 30):
        return
    makers = {"float32": floats(False), "bf16 autocast": floats(True)}
    for name, config in configs.items():
        makers[name] = trained(config, False)
        makers[f"{name}, autocast"] = trained(config, True)
    ms = {a: 1e3 * s for a, s in compare(run, makers, graph=False).items()}
    table = Table(title=f"a step of 3 x Linear({size}), batch {batch}", title_justify="left")
    for heading in ("", "ms", "of float32", "of bf16"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in ms.items():
        ratios = [value / ms[base] for base in ("float32", "bf16 autocast") if base in ms]
        table.add_row(name, f"{value:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
    run.keep("qat", size=size, batch=batch, ms=ms)
    run.console.print(table)


# ---------------------------------------------------------------- a transformer block


class Block(nn.Module):
    """Pre-norm attention and a gated feed-forward part, as in Llama."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (f(y).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def block(run: Run) -> None:
    """A transformer block in bf16, quantized by us and by torchao."""
    width, heads, hidden = (64, 2, 96) if run.smoke else (4096, 32, 14336)
    device = run.device
    table = Table(title=f"transformer block, width {width}", title_justify="left")
    names = ("bf16", "bf16 compiled", "torchquant", "torchquant compiled", "torchao compiled")
    for heading in ("batch x tokens", *(f"{name}, us" for name in names), "bf16 / torchquant"):
        table.add_column(heading, justify="right")

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        with device:
            return Block(width, heads, hidden).bfloat16().eval()

    def quantized() -> nn.Module:
        model = fresh()
        torchquant.quantize_(model)
        return model

    def torchao() -> nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = fresh()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model

    for batch, tokens in ((1, 1), (8, 1024), (16, 1), (1, 2048)):
        if out_of_time(run, "block", 15):
            break
        x = torch.randn(batch, tokens, width, device=device).bfloat16()

        def calls(make: Callable[[], nn.Module], through: bool, x: Tensor = x) -> list[Call]:
            model = make()
            if through:  # all blocks share one code object, whose number of compilations is limited
                torch._dynamo.reset()
                model.compile(dynamic=False)
            return [lambda: model(x)]

        makers = {
            "bf16": lambda c=calls: c(fresh, False),
            "torchquant": lambda c=calls: c(quantized, False),
        }
        if not run.smoke and run.left() > 60:
            makers["bf16 compiled"] = lambda c=calls: c(fresh, True)
            makers["torchquant compiled"] = lambda c=calls: c(quantized, True)
            makers["torchao compiled"] = lambda c=calls: c(torchao, True)
        with torch.inference_mode():
            us = {a: 1e6 * s for a, s in compare(run, makers).items()}
        cells = [f"{us[name]:.0f}" if name in us else "-" for name in names]
        ratio = us.get("bf16", math.nan) / us.get("torchquant", math.nan)
        table.add_row(f"{batch}x{tokens}", *cells, f"{ratio:.2f}")
        run.keep("block", batch=batch, tokens=tokens, width=width, us=us)
    run.console.print(table)


# ---------------------------------------------------------------- the command


def describe(device: torch.device) -> dict[str, Any]:
    """The GPU, for the header."""
    if device.type != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "path": torchquant.cuda.active_path(),
        "peak_int8_tops_data_sheet": PEAK_INT8_TOPS,
        "peak_bytes_per_second_data_sheet": PEAK_BANDWIDTH,
    }


def main() -> int:
    """Compare, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything (default 7)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.jsonl")
    parser.add_argument("--smoke", action="store_true", help="only show that everything runs")
    arguments = parser.parse_args()
    console = Console(width=140)
    if not torch.cuda.is_available() and not arguments.smoke:
        console.print("no CUDA device here; --smoke runs every part in tiny sizes on the CPU")
        return 2
    warnings.filterwarnings("ignore", module=r"torch(\.|$)")  # not torchquant's
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, arguments.smoke, time.monotonic() + 60 * arguments.minutes, console)
    header = {**machine.describe(), **describe(device)}
    if arguments.save and run.on_gpu:
        name = "-".join(str(header["gpu"]).lower().split())
        run.file = RESULTS / f"cuda-{machine.today()}-{name}.jsonl"
        run.file.parent.mkdir(exist_ok=True)
        run.file.write_text("")
    run.keep("cuda", **header)
    console.print(f"{header['gpu'] or header['cpu']}, torch {torch.__version__}")
    started, right = time.monotonic(), True
    for part in PARTS:
        if part not in arguments.parts:
            continue
        try:
            if part == "correctness":
                right = correctness(run)
            else:
                globals()[part](run)
        except Exception:  # the other parts' figures are worth having
            run.failed = True
            console.print_exception()
        console.print(f"{part}: {time.monotonic() - started:.0f} s since the start", style="dim")
    for gpu in torchquant.cuda.gpus():
        run.keep("path", index=gpu.index, path=gpu.path, reason=gpu.reason, left=gpu.left_to_aten)
        for name, why in gpu.left_to_aten.items():  # its figures were ATen's
            run.failed = True
            console.print(f"{name} was left to ATen: {why}", style="bold red", markup=False)
    if run.file is not None:
        console.print(f"written: {run.file.name}")
    return 0 if right and not run.failed else 1


if __name__ == "__main__":
    sys.exit(main())
