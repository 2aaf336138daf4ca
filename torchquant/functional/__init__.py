"""The specification: every operator in plain torch, on any device, exact to the bit.

These functions are written to be read. The kernels must produce the same bits; the tests compare
them with ``torch.equal``. Each module describes what its functions promise:

* :mod:`~torchquant.functional.affine`: quantize, dequantize, fake-quantize, per-token rows
* :mod:`~torchquant.functional.fake_quantize`: masks, learned steps and ranges for training
* :mod:`~torchquant.functional.qparams`: choosing scale and zero point
* :mod:`~torchquant.functional.linear`: linear layers on float or integer input
* :mod:`~torchquant.functional.quantized_linear`: the integer linear layer that they share
* :mod:`~torchquant.functional.intx`: weights of 2 to 8 bits, per channel and in groups
* :mod:`~torchquant.functional.embedding`: rows of quantized tables, and sums of rows
* :mod:`~torchquant.functional.kv_cache`: key/value caches of 8 and 4 bits, attention to them
* :mod:`~torchquant.functional.conv`: convolutions on float or integer input
* :mod:`~torchquant.functional.bias`: biases as int32
* :mod:`~torchquant.functional.activations`: gelu, gelu_tanh, silu, tanh, sigmoid as fixed fp32
  sequences
* :mod:`~torchquant.functional.hard_activations`: relu, relu6, hardswish, hardsigmoid, leaky_relu
  with torch's bits
* :mod:`~torchquant.functional.images`: sums, products, functions, concatenations of int8 tensors
* :mod:`~torchquant.functional.pools`: pools and upsampling of int8 images
* :mod:`~torchquant.functional.norms`: rms_norm, layer_norm with sums in one fixed order
* :mod:`~torchquant.functional.attention`: bfloat16 products, softmax, in one fixed order
* :mod:`~torchquant.functional.decoder`: rotary embedding, float32 attention in one fixed order
* :mod:`~torchquant.functional.qat`: the linear layer in training, forward and backward
* :mod:`~torchquant.functional.qat_intx`: the same for weights of 2 to 8 bits
* :mod:`~torchquant.functional._arithmetic`: ``fmaf``, exact in plain torch
"""

from torchquant.functional._arithmetic import fmaf
from torchquant.functional.activations import (
    ACTIVATIONS,
    activation,
    gated_activation,
    gelu,
    gelu_tanh,
    sigmoid,
    silu,
    tanh,
)
from torchquant.functional.affine import dequantize, quantize, quantize_per_token
from torchquant.functional.attention import attention
from torchquant.functional.bias import quantize_bias, shift_bias
from torchquant.functional.conv import conv_dynamic, conv_static
from torchquant.functional.embedding import embedding_bag_intx, embedding_intx
from torchquant.functional.fake_quantize import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_learned_backward,
    fake_quantize_mask,
    in_range,
    learned_zero_point,
    mask_gradient,
    minmax,
    pack_bits,
    positive,
    unpack_bits,
)
from torchquant.functional.hard_activations import (
    hardsigmoid,
    hardswish,
    leaky_relu,
    relu,
    relu6,
)
from torchquant.functional.images import (
    channel_affine,
    int8_add,
    int8_concat,
    int8_map,
    int8_mul,
    int8_table,
    norm_as_affine,
)
from torchquant.functional.intx import (
    linear_dynamic_intx,
    linear_intx,
    linear_static_intx,
    pack_integers,
    unpack_integers,
)
from torchquant.functional.kv_cache import (
    attention_cached,
    dequantize_kv,
    kv_row_bytes,
    quantize_kv,
)
from torchquant.functional.linear import (
    int8_mm,
    linear_dynamic,
    linear_dynamic_split,
    linear_static,
)
from torchquant.functional.norms import layer_norm, rms_norm
from torchquant.functional.pools import (
    float_adaptive_avg_pool,
    float_avg_pool,
    int8_adaptive_avg_pool,
    int8_avg_pool,
    int8_max_pool,
    int8_upsample_nearest,
)
from torchquant.functional.qat import (
    mm_fake_quantized,
    qat_linear,
    qat_linear_backward,
    quantize_pack,
    quantize_rows,
)
from torchquant.functional.qat_intx import (
    qat_linear_intx,
    qat_linear_intx_backward,
    quantize_pack_intx,
)
from torchquant.functional.qparams import choose_qparams, qparams_from_range
from torchquant.functional.quantized_linear import quantized_linear

__all__ = [
    "ACTIVATIONS",
    "activation",
    "attention",
    "attention_cached",
    "channel_affine",
    "choose_qparams",
    "conv_dynamic",
    "conv_static",
    "dequantize",
    "dequantize_kv",
    "embedding_bag_intx",
    "embedding_intx",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_learned_backward",
    "fake_quantize_mask",
    "float_adaptive_avg_pool",
    "float_avg_pool",
    "fmaf",
    "gated_activation",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
    "hardswish",
    "in_range",
    "int8_adaptive_avg_pool",
    "int8_add",
    "int8_avg_pool",
    "int8_concat",
    "int8_map",
    "int8_max_pool",
    "int8_mm",
    "int8_mul",
    "int8_table",
    "int8_upsample_nearest",
    "kv_row_bytes",
    "layer_norm",
    "leaky_relu",
    "learned_zero_point",
    "linear_dynamic",
    "linear_dynamic_intx",
    "linear_dynamic_split",
    "linear_intx",
    "linear_static",
    "linear_static_intx",
    "mask_gradient",
    "minmax",
    "mm_fake_quantized",
    "norm_as_affine",
    "pack_bits",
    "pack_integers",
    "positive",
    "qat_linear",
    "qat_linear_backward",
    "qat_linear_intx",
    "qat_linear_intx_backward",
    "qparams_from_range",
    "quantize",
    "quantize_bias",
    "quantize_kv",
    "quantize_pack",
    "quantize_pack_intx",
    "quantize_per_token",
    "quantize_rows",
    "quantized_linear",
    "relu",
    "relu6",
    "rms_norm",
    "shift_bias",
    "sigmoid",
    "silu",
    "tanh",
    "unpack_bits",
    "unpack_integers",
]
