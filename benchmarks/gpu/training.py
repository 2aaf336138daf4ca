"""Fake quantization, and a training step, against torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from gpu.run import Call, Run, compare, compiled, out_of_time, share_of
from torchquant import QATConfig, TrainingConfig
from torchquant.nn import QATLinear


def composite(x: Tensor, scale: Tensor) -> Tensor:
    """LSQ in eager torch."""
    v = torch.clamp(x / scale, -127, 127)
    v = (v.round() - v).detach() + v
    return v * scale


def fake_quantize(run: Run) -> None:
    """Compare fake quantization, forward and backward, with torch's operators and a copy."""
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


def mlp(size: int, device: torch.device) -> list[nn.Linear]:
    """Three layers with the same parameters every time."""
    torch.manual_seed(0)
    return [nn.Linear(size, size, device=device) for _ in range(3)]


def qat(run: Run) -> None:
    """Measure a training step of three linear layers with ReLU, float and quantization-aware."""
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
