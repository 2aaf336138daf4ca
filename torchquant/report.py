"""Reports of the verbs: one row per layer, printed as a table."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Action = Literal["quantized", "prepared", "converted", "restored", "skipped"]
FusionKind = Literal["activation", "projections"]
FusionAction = Literal["fused", "not fused"]

_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")  # the number of a block in the name of a module
_TABLE_WIDTH = 72  # minimum width of the table; narrower consoles get two lines per layer


@dataclass(frozen=True)
class LayerReport:
    """What a verb did to one layer, and why.

    Attributes:
        name: the layer's first name in the model.
        kind: the name of its class before the verb.
        action: what the verb did, or "skipped".
        reason: why the layer was skipped, or a remark; may be empty.
        shape: shape of the weight, outputs first.
        bytes_before: memory of the layer's parameters and buffers before the verb. A shared weight
            counts for each layer.
        bytes_after: the same after the verb, including the padding of packed weights.
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
    """A fusion that a verb made or rejected.

    Attributes:
        kind: "activation" (a layer and an activation module) or "projections" (layers that are
            applied to the same tensor).
        layers: names of the layers.
        what: name and function of the activation module; empty for projections.
        action: "fused" or "not fused".
        reason: why the fusion was rejected, or a remark; may be empty.
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
    """What a verb did to a model; ``print`` the report, or pass it to a rich console.

    Attributes:
        layers: one row per layer of a kind that torchquant quantizes, in the order of the model's
            modules. Modules of other kinds are not listed.
        bytes_before: memory of the model's parameters and buffers before the verb; shared tensors
            count once.
        bytes_after: the same after the verb.
        notes: sentences that the user should read.
        fusions: the fusions that were made or rejected. Lines that differ only in numbers, such as
            those of a model's blocks, are printed as one line.
        action: what the verb does to a layer: "quantized" by :func:`torchquant.quantize_`,
            "prepared" by :func:`torchquant.prepare_qat_`, "converted" by
            :func:`torchquant.convert_`, "restored" by :func:`torchquant.to_float_`.
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
        """The layers that the verb changed."""
        return tuple(layer for layer in self.layers if layer.action != "skipped")

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stayed unchanged; their ``reason`` gives the cause."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _TABLE_WIDTH:
            yield from self._lines()
        elif self.layers:
            yield self._table()
        # Text objects, because a name may look like rich's markup ("[red]") or an emoji.
        yield from (
            Text(line) for line in (self.summary(), *fold(map(str, self.fusions)), *self.notes)
        )

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
        """Two lines per layer, for consoles that are too narrow for a table."""
        for layer in self.layers:
            name, size, before, after, result = _cells(layer)
            text = f"{name}\n  {size}, {before} -> {after}, {result}"
            yield Text(text, style=_style(layer), overflow="fold")

    def summary(self) -> str:
        """One line with the numbers of layers and the sizes of the model."""
        line = (
            f"{len(self.changed)} {self.action}, {len(self.skipped)} skipped; model "
            f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        )
        if self.action not in ("quantized", "converted"):
            return line
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        return f"{line} ({ratio:.2f}x smaller)"

    def __str__(self) -> str:
        """The table, as wide as the terminal, or 110 columns wide without a terminal."""
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


def fold(lines: Iterable[str]) -> Iterator[str]:
    """Merge lines that differ only in numbers, such as those of a model's blocks.

    Example:
        >>> list(fold(["fused: blocks.0.up", "fused: blocks.1.up", "fused: head"]))
        ['fused: blocks.*.up (2 times)', 'fused: head']
    """
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(_NUMBER.sub("*", line), []).append(line)
    for pattern, same in alike.items():
        yield same[0] if len(same) == 1 else f"{pattern} ({len(same)} times)"


def human_bytes(count: int) -> str:
    """Format a number of bytes with units that are powers of 1024.

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
