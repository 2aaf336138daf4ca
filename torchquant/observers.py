"""Observers: modules that record the range of the tensors that pass through them.

This is the public face of the observers in :mod:`torchquant.training`:
:class:`MinMaxObserver`, :class:`MovingAverageMinMaxObserver`, :class:`PercentileObserver`,
:class:`HistogramObserver` (least squared error) and :class:`EntropyObserver`.
"""

from torchquant.training.calibration import observer_for, register_observer
from torchquant.training.counting_observer import CountingObserver
from torchquant.training.entropy import EntropyObserver
from torchquant.training.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    report_nonfinite,
)
from torchquant.training.percentile import PercentileObserver
from torchquant.training.ranges import range_to_qparams
from torchquant.training.squared_error import HistogramObserver

__all__ = [
    "CountingObserver",
    "EntropyObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "PercentileObserver",
    "observer_for",
    "range_to_qparams",
    "register_observer",
    "report_nonfinite",
]
