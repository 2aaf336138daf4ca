"""Reports of the verbs that quantize: one row per module with parameters, printed as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torchquant.report.base import NAME, RESULT, Report, RowLine, RowReport
from torchquant.report.folding import Line, fold_items
from torchquant.report.regions import RegionReport
from torchquant.report.table import Column
from torchquant.report.words import human_bytes, percent, size_change

Action = Literal["quantized", "prepared", "converted", "restored", "skipped", "float"]
FusionKind = Literal["activation", "batch norm", "projections"]
FusionAction = Literal["fused", "not fused"]

NORMS = "norms"  # the family of modules that share one line of the table


@dataclass(frozen=True)
class LayerReport(RowReport):
    """What a verb did to one module with parameters, and why.

    Attributes:
        name: the module's first name in the model.
        kind: the name of its class before the verb.
        action: what the verb did; "skipped" for a layer of a kind that torchquant quantizes, which
            the verb left unchanged; "float" for a module of another kind.
        reason: why the module stayed unchanged, or a remark; may be empty.
        shape: shape of the weight, outputs first.
        bytes_before: memory of the module's parameters and buffers before the verb. A shared weight
            counts for each module.
        bytes_after: the same after the verb, including the padding of packed weights.
        parameters: number of parameters (elements) before the verb. A parameter that several
            modules share counts once in the report: for a module in which it stays in float, if
            there is one.
        family: what the module is, in the words of the summary: "linear", "embedding", "experts".
        already: True for a layer that was quantized or prepared before the verb.
        weights: how the integers of the weight are quantized, such as "int4 in groups of 32"; empty
            for a layer that is not quantized.

    Example:
        >>> import torch, torchquant
        >>> row = torchquant.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 128))).layers[0]
        >>> row.name, row.action, row.shape, row.parameters
        ('0', 'quantized', (128, 64), 8320)
    """

    action: Action
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    parameters: int = 0
    family: str = "linear"
    already: bool = False
    weights: str = ""

    @property
    def stays_float(self) -> bool:
        """True if the module's parameters are in float after the verb."""
        return self.action == "float" or (self.action == "skipped" and not self.already)

    def key(self) -> Any:
        shape = () if self.action == "float" else self.shape
        return self.kind, self.action, shape, self.family, self.already, self.weights


@dataclass(frozen=True)
class FusionReport:
    """A fusion that a verb made or rejected.

    Attributes:
        kind: "activation" (a layer and an activation module), "batch norm" (a convolution and the
            batch norm after it) or "projections" (layers that are applied to the same tensor).
        layers: names of the layers.
        what: name and function of the activation module, or name and class of the batch norm; empty
            for projections.
        action: "fused" or "not fused".
        reason: why the fusion was rejected, or a remark; may be empty.

    Example:
        >>> print(FusionReport("activation", ("fc",), "act: relu", "fused", ""))
        fused: fc with act: relu
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


@dataclass(frozen=True, repr=False)
class QuantizationReport(Report):
    """What a verb did to a model. ``print`` the report, or show it in a notebook.

    The printed table has one line for the repeated blocks of a model: ``layers.{0..11}.fc``. Every
    parameter of the model is in one row of ``layers`` or of ``others``.

    Attributes:
        layers: one row per layer of a kind that torchquant quantizes, in the order of the model's
            modules.
        bytes_before: memory of the model's parameters and buffers before the verb; shared tensors
            count once.
        bytes_after: the same after the verb.
        notes: sentences that the user should read.
        fusions: the fusions that were made or rejected. Lines that differ only in the numbers of
            blocks are printed as one line.
        action: what the verb does to a layer: "quantized" by :func:`torchquant.quantize_`,
            "prepared" by :func:`torchquant.prepare_qat_`, "converted" by
            :func:`torchquant.convert_`, "restored" by :func:`torchquant.to_float_`.
        others: one row per module with parameters that belongs to no kind, such as a convolution,
            an embedding, or a module with parameters of its own. The verb leaves them in float.
        regions: the parts of the model in which values stay int8 from layer to layer, and the
            modules in which they cannot.

    Example:
        >>> from torch import nn
        >>> import torchquant
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 200, bias=False))
        >>> report = torchquant.quantize_(model)
        >>> report["1"].action, report["0"].family, report["0"].parameters
        ('quantized', 'embeddings', 6400)
        >>> print(report.summary().rpartition(";")[0])
        1 quantized (67 % of parameters), 0 skipped; 33 % stay in float: embeddings 33 %
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())
    fusions: tuple[FusionReport, ...] = field(default=())
    action: Action = "quantized"
    others: tuple[LayerReport, ...] = field(default=())
    regions: tuple[RegionReport, ...] = field(default=())

    @property
    def rows(self) -> tuple[LayerReport, ...]:  # type: ignore[override]
        """All rows: ``layers`` and ``others``."""
        return self.layers + self.others

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[LayerReport]: ...

        def __getitem__(self, name: str) -> LayerReport: ...

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

    @property
    def foldings(self) -> tuple[FusionReport, ...]:
        """The fusions of layers with the batch norms after them, made or rejected."""
        return tuple(fusion for fusion in self.fusions if fusion.kind == "batch norm")

    @property
    def parameters(self) -> int:
        """Number of the model's parameters (elements); shared parameters count once."""
        return sum(row.parameters for row in self.rows)

    @property
    def float_families(self) -> dict[str, int]:
        """Number of parameters that stay in float, by family, the largest first."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.stays_float and row.parameters:
                counts[f"{row.family} layers" if row.action == "skipped" else row.family] += (
                    row.parameters
                )
        return dict(counts.most_common())

    def summary(self) -> str:
        """One line: numbers of layers, shares of all parameters, and the sizes of the model."""
        counts = f"{len(self.changed)} {self.action}", f"{len(self.skipped)} skipped"
        size = f"model {human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        if self.action in ("quantized", "converted"):
            size += f" ({size_change(self.bytes_before, self.bytes_after)})"
        total = self.parameters
        if not total or self.action == "restored":
            return f"{', '.join(counts)}; {size}"
        changed = sum(row.parameters for row in self.changed)
        already = sum(row.parameters for row in self.skipped if row.already)
        parts = [f"{counts[0]} ({percent(changed, total)} of parameters), {counts[1]}"]
        if already:
            parts.append(f"{percent(already, total)} quantized or prepared before")
        families = self.float_families
        if families:
            shares = [f"{name} {percent(count, total)}" for name, count in families.items()]
            listing = ", ".join(shares[:_MOST_FAMILIES])
            if len(shares) > _MOST_FAMILIES:
                rest = sum(list(families.values())[_MOST_FAMILIES:])
                listing += f", others {percent(rest, total)}"
            parts.append(f"{percent(sum(families.values()), total)} stay in float: {listing}")
        return "; ".join([*parts, size])

    def table_columns(self) -> Sequence[Column]:
        total = self.parameters

        def share(line: RowLine) -> str:
            count = sum(row.parameters for row in _layers(line))
            return percent(count, total) if total else ""

        others = {row.weights for row in self.layers} - {"", _USUAL}
        return (
            replace(NAME, title="layer"),
            Column("weight", _shape, right=True, drops=3),
            *([Column("quantized to", _weights, folds=21, drops=1)] if others else []),
            Column("before", _before, right=True, drops=1),
            Column("after", _after, right=True, joins=" -> "),
            Column("share", share, right=True, drops=2),
            RESULT,
        )

    def lines(self) -> list[RowLine]:
        norms = tuple(row for row in self.others if row.family == NORMS)
        rest = replace(self, others=tuple(row for row in self.others if row.family != NORMS))
        lines = super(QuantizationReport, rest).lines()
        if norms:
            names = norms[0].name if len(norms) == 1 else f"{len(norms)} norms"
            kinds = ", ".join(dict.fromkeys(norm.kind for norm in norms))
            lines.append(Line((names,), (kinds,), norms))
        return lines

    def further_lines(self) -> Iterator[str]:
        for line in fold_items(self.fusions, _fusion_names, lambda row: (row.reason,), _fusion_key):
            *layers, what = line.names
            row = replace(line.items[0], layers=tuple(layers), what=what, reason=line.texts[0])
            yield f"{row} ({len(line.items)} times)" if len(line.items) > 1 else str(row)
        yield from map(str, self.regions)


_USUAL = "int8 per channel"  # a table in which all layers have it does not say so
_MOST_FAMILIES = 4  # in the summary; the table has all


def _layers(line: RowLine) -> Iterator[LayerReport]:
    for row in line.items:
        assert isinstance(row, LayerReport)
        yield row


def _shape(line: RowLine) -> str:
    shapes = {row.shape for row in _layers(line)}
    return " x ".join(map(str, shapes.pop())) if len(shapes) == 1 else ""


def _weights(line: RowLine) -> str:
    return next(_layers(line)).weights


def _before(line: RowLine) -> str:
    return human_bytes(sum(row.bytes_before for row in _layers(line)))


def _after(line: RowLine) -> str:
    return human_bytes(sum(row.bytes_after for row in _layers(line)))


def _fusion_names(row: FusionReport) -> tuple[str, ...]:
    return *row.layers, row.what


def _fusion_key(row: FusionReport) -> Any:
    return row.kind, row.action, len(row.layers)
