"""What a verb did to a model: one row per layer, printed as a table."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Action = Literal["quantized", "prepared", "converted", "restored", "skipped"]
FusionKind = Literal["activation", "projections"]
FusionAction = Literal["fused", "not fused"]

_NUMBER = re.compile(r"(?<![\w])\d+(?![\w])")  # a block's number in a layer's name
_TABLE_WIDTH = 72  # a table of five columns is hard to read below


@dataclass(frozen=True)
class LayerReport:
    """One layer: what was done to it and why.

    ``shape`` is the weight's, outputs first.
    ``bytes_before`` and ``bytes_after`` count the layer's parameters and buffers as they lie in
    memory (packed, padded), each layer for itself, also where a weight was shared.
    """

    name: str
    kind: str
    action: Action
    reason: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class FusionReport:
    """Layers that could be computed together with something, and whether they are.

    ``layers`` are the layers that a verb changed, ``what`` is what became part of them, where that
    is a module of its own: its name and what it computes.
    """

    kind: FusionKind
    layers: tuple[str, ...]
    what: str
    action: FusionAction
    reason: str

    def __str__(self) -> str:
        into = f" with {self.what}" if self.what else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.action}: {', '.join(self.layers)}{into}{why}"


@dataclass(frozen=True)
class QuantizationReport:
    """What a verb did to a model; ``print`` it, or give it to a rich console.

    ``action`` is what the verb does to a layer: "quantized" by :func:`torchquant.quantize_`,
    "prepared" by :func:`torchquant.prepare_qat_`, "converted" by :func:`torchquant.convert_`,
    "restored" by :func:`torchquant.to_float_`.
    ``bytes_before`` and ``bytes_after`` are of the whole model, shared tensors counted once.
    ``fusions`` has a line for everything that was fused or could not be; in print, lines that
    differ in numbers only, as those of a model's blocks do, are one.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())
    fusions: tuple[FusionReport, ...] = field(default=())
    action: Action = "quantized"

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were quantized."""
        return tuple(layer for layer in self.layers if layer.action == "quantized")

    @property
    def changed(self) -> tuple[LayerReport, ...]:
        """The layers that the verb changed, whichever verb it was."""
        return tuple(layer for layer in self.layers if layer.action != "skipped")

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stayed as they were; ``reason`` says why."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _TABLE_WIDTH:
            yield from self._lines()
        elif self.layers:
            yield self._table()
        # All as Text: a name may hold what looks like rich's markup ("[red]") or an emoji's name.
        yield from (Text(line) for line in (self.summary(), *self._fusions(), *self.notes))

    def _fusions(self) -> Iterator[str]:
        alike: dict[str, list[str]] = {}
        for fusion in self.fusions:
            line = str(fusion)
            alike.setdefault(_NUMBER.sub("*", line), []).append(line)
        for pattern, lines in alike.items():
            yield lines[0] if len(lines) == 1 else f"{pattern} ({len(lines)} times)"

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("weight", justify="right", no_wrap=True)
        table.add_column("before", justify="right", no_wrap=True)
        table.add_column("after", justify="right", no_wrap=True)
        table.add_column("result", overflow="fold")
        for layer in self.layers:
            table.add_row(*map(Text, _cells(layer)), style=_style(layer))
        return table

    def _lines(self) -> Iterator[Text]:
        """For consoles too narrow for a table: two lines a layer."""
        for layer in self.layers:
            name, size, before, after, result = _cells(layer)
            text = f"{name}\n  {size}, {before} -> {after}, {result}"
            yield Text(text, style=_style(layer), overflow="fold")

    def summary(self) -> str:
        """One line: counts and bytes."""
        line = (
            f"{len(self.changed)} {self.action}, {len(self.skipped)} skipped; model "
            f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        )
        if self.action not in ("quantized", "converted"):
            return line
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        return f"{line} ({ratio:.2f}x smaller)"

    def __str__(self) -> str:
        """The table, as wide as the terminal; 110 columns where there is none."""
        file = io.StringIO()
        width = shutil.get_terminal_size((110, 0)).columns
        Console(file=file, width=width, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _cells(layer: LayerReport) -> tuple[str, str, str, str, str]:
    size = " x ".join(map(str, layer.shape))
    result = f"{layer.action}: {layer.reason}" if layer.reason else layer.action
    return layer.name, size, human_bytes(layer.bytes_before), human_bytes(layer.bytes_after), result


def _style(layer: LayerReport) -> str:
    return "dim" if layer.action == "skipped" else ""


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
