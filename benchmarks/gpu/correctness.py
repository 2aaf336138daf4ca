"""Every operator on random inputs, on each path: the same bits as the CPU kernels."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torchquant
from gpu.run import Run


def bits(tensor: Tensor) -> Tensor:
    """A float tensor's bits as integers, with one pattern for every NaN."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor)
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def poison(device: torch.device) -> None:
    """Fill the memory that the next results will use with other bytes."""
    if device.type == "cuda":
        held = [
            torch.full((size,), 0xA5, dtype=torch.uint8, device=device)
            for size in (512, 4096, 1 << 16, 1 << 19, 3 << 20, 12 << 20, 64 << 20)
            for _ in range(4)
        ]
        del held


def random_input(m: int, k: int, dtype: torch.dtype, special: bool) -> Tensor:
    """Rows of different magnitude; with `special`, some rows have NaN and infinities."""
    x = torch.randn(m, k) * 2.0 ** torch.randint(-20, 20, (m, 1)).float()
    if special and m > 2:
        x[0, 0], x[1, -1] = math.nan, -math.inf
        x[2] = 0.0
    return x.to(dtype)


@dataclass
class Layer:
    """A layer's tensors, not packed, because each device has its own layout."""

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
    """Calls of operators: each takes a namespace of operators and the device for its inputs."""
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

    activations = tuple(torchquant.functional.ACTIVATIONS)
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
    """M, N, K: ones, odd numbers, tile edges, a few real layers.

    One shape of each kind comes first, because time can run out.
    """
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
    """The paths that operators can take on this device."""
    return list(torchquant.cuda.available_paths()) if run.on_gpu else ["aten"]


@contextmanager
def on_path(run: Run, name: str) -> Iterator[Any]:
    """The namespace whose operators take that path."""
    if not run.on_gpu:
        yield torch.ops.torchquant_aten
        return
    with ExitStack() as stack:
        stack.enter_context(torchquant.cuda.use_path(name))
        if name == "triton":  # default configurations: tuning would compile eight per shape
            from torchquant.triton.tuning import choose as tuning

            stack.enter_context(tuning.paused())
        yield torch.ops.torchquant


def correctness(run: Run) -> bool:
    """Compare every operator with the CPU, and print the differences. True if there is none."""
    torch.manual_seed(0)
    cpu, wrong, compared, values = torch.device("cpu"), [], 0, 0
    shapes, end = shapes_to_check(run.smoke), time.monotonic() + 0.3 * run.left()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for index, (m, n, k) in enumerate(shapes):
        if time.monotonic() > end:  # compiling takes seconds per kind of epilogue
            # Some calls of the previous shape can be missing, too.
            left_out = ", ".join(f"{m}x{n}x{k}" for m, n, k in shapes[index:])
            run.console.print(f"correctness: out of time, left out: {left_out}", style="yellow")
            break
        for name, case in cases(m, n, k, dtypes[index % 3], special=index % 2 == 1):
            expected = case(torch.ops.torchquant, cpu)
            if time.monotonic() > end:
                break  # the next shape prints what is left out
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
    """An operator's results as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
