"""What a call of a tiny quantized layer costs in addition to its kernel, piece by piece.

Each row adds one piece to the one above it: the kernel alone, called from C++ on buffers that are
there already; the whole operator from C++ (dispatcher, checks, allocating the result); the same
from Python; the module's `forward`; the module. Outside inference mode autograd's part comes on
top. The results are minima over batches, which exclude most disturbances by the machine.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

import torchquant
from torchquant._extension import load
from torchquant.bench import machine

SHAPES = ((1, 32, 128), (1, 64, 64), (1, 100, 100), (4, 128, 128))
INFERENCE_MOST, OUTSIDE_MOST = 3.0, 5.0  # allowed microseconds of a call above its kernel
BIAS_TRAINS = "grad, bias trains"  # autograd then records the call
GRAD_MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad, nothing trains": nullcontext,
    BIAS_TRAINS: nullcontext,
}


@dataclass
class CallCost:
    """Microseconds of one layer. `parts`: in order, each includes the parts before it."""

    shape: tuple[int, int, int]  # M, N, K
    mode: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def above_kernel(self) -> float:
        """The time of the module's call beyond the kernel's own time."""
        return self.parts["nn.Module call"] - self.parts["kernel"]

    @property
    def most(self) -> float:
        """The most that it may be."""
        return INFERENCE_MOST if self.mode == "inference mode" else OUTSIDE_MOST

    def to_dict(self) -> dict[str, Any]:
        """The costs as JSON-ready data."""
        parts = {name: round(value, 3) for name, value in self.parts.items()}
        return {
            **asdict(self),
            "parts": parts,
            "above_kernel": round(self.above_kernel, 3),
            "most": self.most,
        }


def measure_call(shape: tuple[int, int, int], mode: str, seconds: float = 0.1) -> CallCost:
    """Measure the parts of a call of a `QuantizedLinear` (M, N, K) in one of `GRAD_MODES`."""
    library = load()
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(k, n).requires_grad_(mode == BIAS_TRAINS)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
    layer = torchquant.nn.QuantizedLinear.from_float(linear)
    x = torch.randn(m, k, generator=generator)
    assert layer.bias is not None
    tensors = (x, layer.packed, layer.weight_scale, layer.bias)
    cost = CallCost(shape, mode)
    with GRAD_MODES[mode]():
        for name, part in {
            "kernel": "kernel",
            "operator, from C++": "operator",
        }.items():
            cost.parts[name] = 1e6 * library.part_seconds(part, *tensors, n, seconds)
        names = {
            "call": library.linear_dynamic,
            "arguments": (
                x,
                layer.packed,
                layer.weight_scale,
                None,
                layer.bias,
                n,
                True,
                "none",
                8,
            ),
            "layer": layer,
            "forward": layer.forward,
            "x": x,
        }
        cost.parts["operator, from Python"] = _microseconds("call(*arguments)", names, seconds)
        cost.parts["forward()"] = _microseconds("forward(x)", names, seconds)
        cost.parts["nn.Module call"] = _microseconds("layer(x)", names, seconds)
        cost.parts["(allocation alone)"] = 1e6 * library.part_seconds(
            "allocation", *tensors, n, seconds
        )
    return cost


def _microseconds(statement: str, names: dict[str, Any], seconds: float) -> float:
    """The minimum over batches, without the loop around the statement."""
    number, repeats = 200, max(3, round(seconds / 200 / 5e-6))
    with_loop = min(timeit.repeat(statement, globals=names, number=number, repeat=repeats))
    loop = min(timeit.repeat("pass", globals=names, number=number, repeat=repeats))
    return 1e6 * (with_loop - loop) / number


def run_overhead(seconds: float = 0.1) -> dict[str, Any]:
    """Measure all shapes in all modes on one thread. JSON-ready; `costs`: from `CallCost.to_dict`.

    >>> run_overhead(0.001)["costs"][0]["mode"]
    'inference mode'
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [measure_call(shape, mode, seconds) for shape in SHAPES for mode in GRAD_MODES]
    finally:
        torch.set_num_threads(threads)
    return {
        "kind": "overhead",
        **machine.describe(),
        "isa": torchquant.cpu.active_isa(),
        "costs": [cost.to_dict() for cost in costs],
    }


def overhead_table(result: dict[str, Any]) -> Table:
    """Microseconds, one row per layer and mode."""
    costs = result["costs"]
    parts = list(costs[0]["parts"])
    title = f"microseconds of a call, {result['isa']}, {result['cpu']}; parts include those before"
    table = Table(title=title, title_justify="left")
    for name in ("M x N x K", "mode"):
        table.add_column(name, no_wrap=True)
    for name in (*parts, "above the kernel", "may be"):
        table.add_column(name, justify="right")
    for index, cost in enumerate(costs):
        table.add_row(
            "x".join(map(str, cost["shape"])),
            cost["mode"],
            *(f"{cost['parts'][name]:.2f}" for name in parts),
            f"{cost['above_kernel']:.2f}",
            f"{cost['most']:.0f}",
            style="red" if cost["above_kernel"] > cost["most"] else None,
            end_section=(index + 1) % len(GRAD_MODES) == 0,
        )
    return table
