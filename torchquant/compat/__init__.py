"""Functions of earlier quantization libraries, reproduced for comparison under their own names.

The functions keep the order of operations of those libraries: they divide by the scale instead of
multiplying by ``1/scale``, add the zero point before rounding, compute scales in float64, and so
on. Ties and last bits can therefore differ from :mod:`torchquant.functional`. The functions have no
kernels. Use them for teaching, comparison and migration, and ``torchquant.functional`` otherwise.

* textbook affine round trip: :func:`quantize_func`, :func:`dequantize_func`
* int4 for arrays: :func:`quantize_to_int4`, :func:`dequantize_from_int4`,
  :func:`pack_int4_to_int8`, :func:`unpack_int8_to_int4`, :func:`example`
* real-valued zero point: :func:`quantize_midpoint`, :func:`quantize_minimum`,
  :func:`dequantize_real`
* linear quantization building blocks: :func:`get_quantized_range`, :func:`linear_quantize`,
  :func:`linear_dequantize`, :func:`scale_and_zero_point`, ... The layer built from them is
  ``torchquant.quantized_linear``, which runs on the kernels.
* GPTQ and AWQ of a single layer: :func:`collect_hessian`, :func:`quantize_layer`,
  :func:`activation_importance`, :func:`search_alpha`, :func:`quantize_scaled`
"""

from torchquant.compat.affine import dequantize_func, quantize_func
from torchquant.compat.int4 import (
    Int4Result,
    dequantize_from_int4,
    example,
    pack_int4_to_int8,
    quantize_to_int4,
    unpack_int8_to_int4,
)
from torchquant.compat.linear import (
    get_quantized_range,
    linear_dequantize,
    linear_quantize,
    linear_quantize_bias,
    linear_quantize_weight_per_channel,
    scale_and_zero_point,
    shift_quantized_linear_bias,
)
from torchquant.compat.real import (
    QuantizedReal,
    dequantize_real,
    quantize_midpoint,
    quantize_minimum,
)
from torchquant.compat.single_layer import (
    activation_importance,
    collect_hessian,
    quantize_layer,
    quantize_scaled,
    search_alpha,
)

__all__ = [
    "Int4Result",
    "QuantizedReal",
    "activation_importance",
    "collect_hessian",
    "dequantize_from_int4",
    "dequantize_func",
    "dequantize_real",
    "example",
    "get_quantized_range",
    "linear_dequantize",
    "linear_quantize",
    "linear_quantize_bias",
    "linear_quantize_weight_per_channel",
    "pack_int4_to_int8",
    "quantize_func",
    "quantize_layer",
    "quantize_midpoint",
    "quantize_minimum",
    "quantize_scaled",
    "quantize_to_int4",
    "scale_and_zero_point",
    "search_alpha",
    "shift_quantized_linear_bias",
    "unpack_int8_to_int4",
]
