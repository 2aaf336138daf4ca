"""Configurations of quantized layers, which consist of parts: one for weights, one for activations.

A configuration can be written in parts, such as
``QuantizationConfig(Weights(bits=4), Dynamic(symmetric=True))``. The functions with the names of
torchao (:func:`Int8DynamicActivationInt8WeightConfig` and others) create the same values. Parts are
frozen dataclasses, and layers decide by the class of a part. A subclass of :class:`Weights` or
:class:`Activations` is a new part, which files can store without further code.
"""

from torchquant.configs.calibration import (
    Calibration,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    calibration_named,
)
from torchquant.configs.fusion import Fusion, check_fusion
from torchquant.configs.layers import (
    Activations,
    Dynamic,
    Float,
    QuantizationConfig,
    Static,
    Weights,
    check_config,
)
from torchquant.configs.names import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
)
from torchquant.configs.part import Part, config_from_dict, config_to_dict

__all__ = [
    "Activations",
    "Calibration",
    "Dynamic",
    "Entropy",
    "Float",
    "Fusion",
    "Histogram",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxActivationIntxWeightConfig",
    "IntxWeightOnlyConfig",
    "MinMax",
    "MovingAverage",
    "Part",
    "Percentile",
    "QuantizationConfig",
    "Static",
    "Weights",
    "calibration_named",
    "check_config",
    "check_fusion",
    "config_from_dict",
    "config_to_dict",
]
