"""Reports of the verbs: the base of all, and the report of the verbs that quantize."""

from torchquant.report.base import Report, RowReport
from torchquant.report.folding import fold, fold_items
from torchquant.report.quantization import (
    NORMS,
    FusionReport,
    LayerReport,
    QuantizationReport,
)
from torchquant.report.regions import BreakReport, RegionReport
from torchquant.report.words import human_bytes, percent, size_change

__all__ = [
    "NORMS",
    "BreakReport",
    "FusionReport",
    "LayerReport",
    "QuantizationReport",
    "RegionReport",
    "Report",
    "RowReport",
    "fold",
    "fold_items",
    "human_bytes",
    "percent",
    "size_change",
]
