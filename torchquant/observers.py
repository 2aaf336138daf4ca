"""Observers: modules that record the range of the tensors that pass through them.

This is the public face of :mod:`torchquant.training.observers` and
:mod:`torchquant.training.ranges`.
"""

from torchquant.training.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    report_nonfinite,
)
from torchquant.training.ranges import range_to_qparams

__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "range_to_qparams",
    "report_nonfinite",
]
