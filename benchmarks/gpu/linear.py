"""int8 linear layers against bf16 and the integer products of torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from gpu.run import Call, Run, compare, compiled, share_of
from torchquant.nn import QuantizedLinear

SMALL_ROWS = 16


def scaled(acc: Tensor, sx: Tensor, sw: Tensor, bias: Tensor) -> Tensor:
    """Scales and bias after `_int_mm`, in torch operators."""
    return (acc.to(torch.float32) * sx * sw + bias).to(torch.bfloat16)


def per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per-token quantization in torch operators."""
    wide = x.to(torch.float32)
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def linear_layers(n: int, k: int, copies: int, device: torch.device) -> list[QuantizedLinear]:
    """Copies of one layer in different places in memory."""
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    linear = nn.Linear(k, n, device=device)
    first = QuantizedLinear.from_float(linear, config)
    rest = []
    for _ in range(copies - 1):
        layer = QuantizedLinear(k, n, config=config, device="meta")
        layer.packed, layer.qweight_scale = first.packed.clone(), first.weight_scale
        layer.bias = first.bias
        rest.append(layer)
    return [first, *rest]


def linear_makers(run: Run, m: int, n: int, k: int) -> dict[str, Callable[[], list[Call]]]:
    """torchquant and the peers on one shape: bf16 or int8 in, bf16 out, with bias."""
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


def linear_shapes(smoke: bool) -> list[tuple[int, int, int]]:
    """M, N, K; the shapes of the goals come first."""
    if smoke:
        return [(1, 32, 48), (40, 32, 48)]
    layers = [(4096, 4096), (1024, 1024), (16384, 4096), (4096, 16384), (8192, 8192)]
    rows = (1, 4, 16, 64, 256, 1024, 4096, 8192)
    shapes = [(m, n, k) for n, k in layers for m in rows]
    first = [(8192, 8192, 8192), (1, 16384, 16384), (16, 16384, 16384), (256, 4096, 4096)]
    return first + [shape for shape in shapes if shape not in first]


def linear(run: Run) -> None:
    """Compare int8 linear layers with bf16 and with the integer products of torch."""
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
        with torch.no_grad():  # a layer's bias would require gradients
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
