"""Quantization-aware training: prepare a model, train it in stages, convert it.

This is the public face of :mod:`torchquant.convert.qat`, :mod:`torchquant.convert.convert` and
:mod:`torchquant.convert.stages`.
"""

from torchquant.convert.convert import convert_
from torchquant.convert.qat import prepare_qat_
from torchquant.convert.stages import (
    QATSchedule,
    freeze_,
    freeze_statistics_,
    observe_,
    train_,
)
from torchquant.convert.to_float import to_float_

__all__ = [
    "QATSchedule",
    "convert_",
    "freeze_",
    "freeze_statistics_",
    "observe_",
    "prepare_qat_",
    "to_float_",
    "train_",
]
