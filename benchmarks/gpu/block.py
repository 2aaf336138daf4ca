"""A transformer block in bf16, quantized by torchquant and by torchao."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from gpu.run import Call, Run, compare, out_of_time


class Block(nn.Module):
    """Attention and a gated feed-forward network, each after a norm, as in Llama."""

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
    """Measure a transformer block in bf16, quantized by torchquant and by torchao."""
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
