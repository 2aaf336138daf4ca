"""The limits of the GPU, measured with torch's own kernels."""

from __future__ import annotations

import torch
from rich.table import Table

from gpu.run import Run, compare


def ceilings(run: Run) -> None:
    """The rates of torch's own kernels on this GPU: products, a copy, a read."""
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
