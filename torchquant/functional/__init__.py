"""The specification: every operator in plain torch, on any device, exact to the bit.

Readable before fast. The kernels must produce the bits that these functions produce; the tests
compare with ``torch.equal``. What each function promises stands in its module:

* :mod:`~torchquant.functional.affine`: quantize, dequantize, fake-quantize, per-token rows
* :mod:`~torchquant.functional.fake_quantize`: what training adds: masks, learned steps, ranges
* :mod:`~torchquant.functional.qparams`: choosing scale and zero point
* :mod:`~torchquant.functional.linear`: the integer linear layer
* :mod:`~torchquant.functional.activations`: relu, gelu, gelu_tanh, silu, tanh, sigmoid as
  fixed fp32 sequences
* :mod:`~torchquant.functional.norms`: rms_norm, layer_norm with sums in one fixed order
* :mod:`~torchquant.functional.qat`: the linear layer in training, forward and backward
* :mod:`~torchquant.functional._arithmetic`: ``fmaf``, exact in plain torch
"""

from torchquant.functional._arithmetic import fmaf
from torchquant.functional.activations import (
    ACTIVATIONS,
    gelu,
    gelu_tanh,
    relu,
    sigmoid,
    silu,
    tanh,
)
from torchquant.functional.affine import dequantize, quantize, quantize_per_token
from torchquant.functional.fake_quantize import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_learned_backward,
    in_range,
    learned_zero_point,
    mask_gradient,
    minmax,
    pack_bits,
    unpack_bits,
)
from torchquant.functional.linear import (
    dynamic_linear,
    quantize_bias,
    quantized_linear,
    shift_bias,
    static_linear,
)
from torchquant.functional.norms import layer_norm, rms_norm
from torchquant.functional.qat import (
    qat_linear,
    qat_linear_backward,
    quantize_channels,
    quantize_rows,
)
from torchquant.functional.qparams import choose_qparams, qparams_from_range

__all__ = [
    "ACTIVATIONS",
    "choose_qparams",
    "dequantize",
    "dynamic_linear",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_learned_backward",
    "fmaf",
    "gelu",
    "gelu_tanh",
    "in_range",
    "layer_norm",
    "learned_zero_point",
    "mask_gradient",
    "minmax",
    "pack_bits",
    "qat_linear",
    "qat_linear_backward",
    "qparams_from_range",
    "quantize",
    "quantize_bias",
    "quantize_channels",
    "quantize_per_token",
    "quantize_rows",
    "quantized_linear",
    "relu",
    "rms_norm",
    "shift_bias",
    "sigmoid",
    "silu",
    "static_linear",
    "tanh",
    "unpack_bits",
]
