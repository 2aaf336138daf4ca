"""Reports of the verbs: the base of all, and those of the verbs that quantize and calibrate."""

from torchquant.report.base import Report, RowReport
from torchquant.report.calibration import CalibrationReport, RangeReport
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
    "CalibrationReport",
    "FusionReport",
    "LayerReport",
    "QuantizationReport",
    "RangeReport",
    "RegionReport",
    "Report",
    "RowReport",
    "fold",
    "fold_items",
    "human_bytes",
    "percent",
    "size_change",
]
