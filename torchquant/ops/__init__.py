"""One Python wrapper per C++ operator, followed by its fake kernel, in a file per family.

A wrapper adds names, defaults and documentation to ``torch.ops.torchquant.<name>``; the checks and
the arithmetic are in C++. A fake kernel computes shape and dtype only. `torch.compile` and
`torch.export` trace through it, so the operators stay opaque and keep their bits. The arithmetic
that every operator promises is written in plain torch in :mod:`torchquant.functional`, in a
function with the operator's name and arguments.

A new operator needs, in Python: wrapper and fake kernel in its family's file here, its
specification in the file of the same name in torchquant/functional, and its calls in
tests/cases.py. Tests fail for what is missing.
"""

from __future__ import annotations

from torchquant.ops import _flops  # noqa: F401  (FLOPs of the operators)
from torchquant.ops.activations import activation, gated_activation
from torchquant.ops.affine import dequantize, quantize, quantize_per_token
from torchquant.ops.attention import attention
from torchquant.ops.conv import (
    conv_dynamic,
    conv_static,
    pack_conv_weight,
    unpack_conv_weight,
)
from torchquant.ops.fake_quantize import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_learned_backward,
    fake_quantize_mask,
    in_range,
    mask_gradient,
    minmax,
    positive,
)
from torchquant.ops.intx import (
    linear_dynamic_intx,
    linear_intx,
    linear_static_intx,
    pack_intx_weight,
    unpack_intx_weight,
)
from torchquant.ops.linear import (
    int8_mm,
    linear_dynamic,
    linear_dynamic_split,
    linear_static,
    pack_weight,
    unpack_weight,
)
from torchquant.ops.norms import layer_norm, rms_norm
from torchquant.ops.qat import mm_fake_quantized, qat_linear, quantize_pack, quantize_rows
from torchquant.ops.qat_intx import qat_linear_intx, quantize_pack_intx
from torchquant.ops.quantized_linear import PackedWeight, quantized_linear

__all__ = [
    "PackedWeight",
    "activation",
    "attention",
    "conv_dynamic",
    "conv_static",
    "dequantize",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_learned_backward",
    "fake_quantize_mask",
    "gated_activation",
    "in_range",
    "int8_mm",
    "layer_norm",
    "linear_dynamic",
    "linear_dynamic_intx",
    "linear_dynamic_split",
    "linear_intx",
    "linear_static",
    "linear_static_intx",
    "mask_gradient",
    "minmax",
    "mm_fake_quantized",
    "pack_conv_weight",
    "pack_intx_weight",
    "pack_weight",
    "positive",
    "qat_linear",
    "qat_linear_intx",
    "quantize",
    "quantize_pack",
    "quantize_pack_intx",
    "quantize_per_token",
    "quantize_rows",
    "quantized_linear",
    "rms_norm",
    "unpack_conv_weight",
    "unpack_intx_weight",
    "unpack_weight",
]
