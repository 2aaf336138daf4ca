"""Observers: modules that watch the range of what passes through them.

This is the public face of :mod:`torchquant.training.observers`.
"""

from torchquant.training.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    range_to_qparams,
    report_nonfinite,
)

__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "range_to_qparams",
    "report_nonfinite",
]
