"""Accuracy without training: algorithms on a model, each a pure function and a verb.

Verbs on the float model, before ``quantize_`` or ``prepare_``; they keep what the model computes:

- :func:`rotate_`: rotate residual streams, so that no channel is much larger than the others
- :func:`smoothquant_`: move the ranges of input channels into the weights that read them

Verbs that quantize a float model in place of ``quantize_``:

- :func:`gptq_`: integers with a small error of each layer's outputs, layer by layer
- :func:`hqq_`: scales and zero points without data
- :func:`awq_`: scales of input channels and ranges by the error of the outputs

The pure functions of integers are in :mod:`torchquant.algorithms.gptq_rounding` (``gptq``),
:mod:`torchquant.algorithms.half_quadratic` (``hqq``), :mod:`torchquant.algorithms.awq_scaling` and
:mod:`torchquant.algorithms.least_error` (``clip_search``).

Verbs between ``prepare_`` and ``convert_``, in this order; each can be left out:

1. ``prepare_(model, config)``
2. :func:`equalize_`: balance the ranges of consecutive layers
3. ``calibrate(model, loader)``
4. :func:`adaround_`: learn whether to round each weight down or up; or :func:`gptq_`
5. :func:`correct_bias_`: take the mean error of each layer out of its bias
6. ``convert_(model)``
"""

from torchquant.algorithms.adaround import AdaRoundReport, RoundedLayer, adaround_
from torchquant.algorithms.awq import awq_
from torchquant.algorithms.awq_report import AWQLayer, AWQReport
from torchquant.algorithms.awq_scaling import AWQScales, awq_scales, scaled_rounding, search_scales
from torchquant.algorithms.bias_correction import (
    BiasCorrectionReport,
    CorrectedLayer,
    correct_bias_,
    mean_output_error,
)
from torchquant.algorithms.compression_report import CompressedLayer, CompressionReport
from torchquant.algorithms.equalize import EqualizationReport, EqualizedLayer, equalize_
from torchquant.algorithms.fold import FoldUndo, ScalingGroup, fold
from torchquant.algorithms.gptq import gptq_
from torchquant.algorithms.gptq_rounding import GPTQResult
from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.hqq import HQQLayer, HQQReport, hqq_
from torchquant.algorithms.integer_weight import IntegerWeight, nearest
from torchquant.algorithms.least_error import clip_search
from torchquant.algorithms.orthogonal import hadamard, rotation_matrix
from torchquant.algorithms.rotate import RotatedModule, RotationReport, rotate_
from torchquant.algorithms.rounding import (
    Moments,
    adaptive_rounding,
    least_error_scale,
    rounding_error,
)
from torchquant.algorithms.scaling import (
    channel_ranges,
    equalization_factors,
    range_spread,
    scale_channels,
)
from torchquant.algorithms.scaling_groups import (
    ScalingGroups,
    find_scaling_groups,
    output_difference,
)
from torchquant.algorithms.smoothing import smoothing_error, smoothing_factors
from torchquant.algorithms.smoothquant import SmoothedLayer, SmoothQuantReport, smoothquant_
from torchquant.algorithms.streams import Gain, Stream, Streams, find_streams

__all__ = [
    "AWQLayer",
    "AWQReport",
    "AWQScales",
    "AdaRoundReport",
    "BiasCorrectionReport",
    "CompressedLayer",
    "CompressionReport",
    "CorrectedLayer",
    "EqualizationReport",
    "EqualizedLayer",
    "FoldUndo",
    "GPTQResult",
    "Gain",
    "HQQLayer",
    "HQQReport",
    "Hessian",
    "IntegerWeight",
    "Moments",
    "RotatedModule",
    "RotationReport",
    "RoundedLayer",
    "ScalingGroup",
    "ScalingGroups",
    "SmoothQuantReport",
    "SmoothedLayer",
    "Stream",
    "Streams",
    "adaptive_rounding",
    "adaround_",
    "awq_",
    "awq_scales",
    "channel_ranges",
    "clip_search",
    "correct_bias_",
    "equalization_factors",
    "equalize_",
    "find_scaling_groups",
    "find_streams",
    "fold",
    "gptq_",
    "hadamard",
    "hqq_",
    "least_error_scale",
    "mean_output_error",
    "nearest",
    "output_difference",
    "range_spread",
    "rotate_",
    "rotation_matrix",
    "rounding_error",
    "scale_channels",
    "scaled_rounding",
    "search_scales",
    "smoothing_error",
    "smoothing_factors",
    "smoothquant_",
]
