"""What a verb did to a model: one row per layer, printed as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.table import Table

Action = Literal["quantized", "skipped"]


@dataclass(frozen=True)
class LayerReport:
    """One layer: what was done to it and why.

    ``bytes_before`` and ``bytes_after`` count the layer's parameters and buffers as they lie in memory
    (packed, padded), each layer for itself, also where a weight was shared.
    """

    name: str
    kind: str
    action: Action
    reason: str
    out_features: int
    in_features: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """Result of :func:`torchquant.quantize_`; ``print`` it.

    ``bytes_before`` and ``bytes_after`` are of the whole model, shared tensors counted once.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were quantized."""
        return tuple(layer for layer in self.layers if layer.action == "quantized")

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stayed as they were; ``reason`` says why."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    def __rich__(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("out x in", justify="right", no_wrap=True)
        table.add_column("action", no_wrap=True)
        table.add_column("why", overflow="fold")
        table.add_column("before", justify="right", no_wrap=True)
        table.add_column("after", justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(
                layer.name,
                f"{layer.out_features} x {layer.in_features}" if layer.out_features else layer.kind,
                layer.action,
                layer.reason,
                human_bytes(layer.bytes_before),
                human_bytes(layer.bytes_after),
                style=None if layer.action == "quantized" else "dim",
            )
        return Group(table, self.summary(), *self.notes)

    def summary(self) -> str:
        """One line: counts and bytes."""
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        return (
            f"{len(self.quantized)} quantized, {len(self.skipped)} skipped; model "
            f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)} ({ratio:.2f}x smaller)"
        )

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self)
        output = console.file
        assert isinstance(output, io.StringIO)
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def human_bytes(count: int) -> str:
    """A size for people, in powers of 1024.

    Example:
        >>> human_bytes(700), human_bytes(2_400_000)
        ('700 B', '2.29 MiB')
    """
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.2f} {unit}"
