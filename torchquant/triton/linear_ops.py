"""The linear operators on Triton's kernels, with the signatures of csrc/ops.cpp.

Each function returns ``NotImplemented`` for what it does not cover, wrong arguments among it: the
ATen fallback then computes it, or raises the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant.triton.gemm.problem import Problem, greatest_k
from torchquant.triton.gemm.run import matmul
from torchquant.triton.quantize import (
    MAX_COLUMNS,
    layout_shape,
    packed_sums,
    padded_k,
    padded_n,
    row_sums,
)
from torchquant.triton.quantize import quantize_pack as pack_rows
from torchquant.triton.quantize import quantize_rows as rows_to_int8

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int8, torch.uint8)
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")


def _rows(x: Tensor) -> Tensor:
    """``x`` as ``[M, K]`` with neighbouring columns side by side; copied where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _covers(input: Tensor, dtypes: Sequence[torch.dtype], *others: Tensor | None) -> bool:
    """Whether the kernels take such an input, with these tensors beside it."""
    if input.dtype not in dtypes or input.dim() == 0 or input.numel() == 0:
        return False
    if input.shape[-1] > MAX_COLUMNS or input.numel() // input.shape[-1] > 2**31 - 2**16:
        return False
    return all(other is None or other.device == input.device for other in others)


def _one(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype == dtype and tensor.numel() == 1 and tensor.dim() <= 1)


def _channels(tensor: Tensor | None, n: int, dtype: torch.dtype, one: bool = True) -> bool:
    """Whether it holds a value per output channel, or (``one``) a single one."""
    if tensor is None:
        return True
    return (tensor.dtype == dtype and tensor.shape == (n,)) or (one and _one(tensor, dtype))


def _per_row(tensor: Tensor | None, input: Tensor, dtype: torch.dtype) -> bool:
    """Whether it holds one value, or one for each row of input, ``[...]`` or ``[..., 1]``."""
    if _one(tensor, dtype):
        return True
    assert tensor is not None
    leading = input.shape[:-1]
    return tensor.dtype == dtype and tensor.shape in (leading, (*leading, 1))


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1).contiguous()


def _is_packed(packed: Tensor, n: int, k: int) -> bool:
    return (
        packed.dtype == torch.int8
        and 1 <= n < 2**31 - 2**16
        and packed.shape == layout_shape(n, k)
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
    )


# ---------------------------------------------------------------- quantization


def quantize_per_token(input: Tensor, symmetric: bool = True) -> Any:
    """See :func:`torchquant.ops.quantize_per_token`."""
    return _per_token(input, -127 if symmetric else -128, 127, symmetric)


def quantize_rows(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> Any:
    """See :func:`torchquant.ops.quantize_rows`."""
    given = _one(scale, torch.float32) and _one(zero_point, torch.int32)
    if not given or (scale is None and zero_point is not None):
        return NotImplemented
    if not _is_range(qmin, qmax, symmetric and scale is None):
        return NotImplemented
    return _per_token(input, qmin, qmax, symmetric, scale, zero_point)


def _is_range(qmin: int, qmax: int, own_symmetric: bool) -> bool:
    return -128 <= qmin <= 0 < qmax <= 127 and (qmin <= -qmax or not own_symmetric)


def _per_token(
    input: Tensor,
    qmin: int,
    qmax: int,
    symmetric: bool,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Any:
    if not _covers(input, _FLOATS, scale, zero_point):
        return NotImplemented
    rows = _rows(input)
    q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    quantized = rows_to_int8(
        rows,
        q,
        qmin=qmin,
        qmax=qmax,
        symmetric=symmetric,
        scale=_flat(scale),
        zero_point=_flat(zero_point),
    )
    token = (*input.shape[:-1], 1)
    return (
        q.view(input.shape),
        quantized.scale.view(token),
        quantized.zero_point.view(token),
    )


def quantize_pack(
    weight: Tensor, scale: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> Any:
    """See :func:`torchquant.ops.quantize_pack`."""
    covered = _covers(weight, _FLOATS, scale) and weight.dim() == 2
    if not covered or not _is_range(qmin, qmax, symmetric and scale is None):
        return NotImplemented
    if not _channels(scale, weight.shape[0], torch.float32):
        return NotImplemented
    return pack_rows(_rows(weight), _flat(scale), qmin=qmin, qmax=qmax, symmetric=symmetric)


# ---------------------------------------------------------------- products


def int8_mm(input: Tensor, packed: Tensor, out_features: int) -> Any:
    """See :func:`torchquant.ops.int8_mm`."""
    if not _covers(input, _INTEGERS, packed):
        return NotImplemented
    n, k = out_features, input.shape[-1]
    if not _is_packed(packed, n, k) or k > greatest_k(input.dtype == torch.uint8, False, False):
        return NotImplemented
    rows = _rows(input)
    out = torch.empty((rows.shape[0], n), dtype=torch.int32, device=input.device)
    matmul(Problem(rows, packed[: padded_n(n)], packed_sums(packed, n), out, k))
    return out.view(*input.shape[:-1], n)


def linear_dynamic(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    symmetric: bool = True,
    activation: str = "none",
    output_dtype: torch.dtype | None = None,
    activation_bits: int = 8,
) -> Any:
    """See :func:`torchquant.ops.linear_dynamic`."""
    outputs = _dynamic(
        input,
        packed,
        weight_scale,
        weight_zero_point,
        bias,
        [out_features],
        symmetric,
        [activation],
        output_dtype,
        activation_bits,
        one_scale=True,
    )
    return outputs if outputs is NotImplemented else outputs[0]


def linear_dynamic_split(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: Sequence[int],
    symmetric: bool,
    activations: Sequence[str],
    output_dtype: torch.dtype | None = None,
) -> Any:
    """See :func:`torchquant.ops.linear_dynamic_split`: quantized once, a product for each layer."""
    return _dynamic(
        input,
        packed,
        weight_scale,
        weight_zero_point,
        bias,
        out_features,
        symmetric,
        activations or ["none"] * len(out_features),
        output_dtype,
        8,
        one_scale=False,
    )


def _dynamic(
    input: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: Sequence[int],
    symmetric: bool,
    activations: Sequence[str],
    output_dtype: torch.dtype | None,
    bits: int,
    one_scale: bool,
) -> Any:
    dtype = input.dtype if output_dtype is None else output_dtype
    if not _covers(input, _FLOATS, packed, weight_scale, weight_zero_point, bias):
        return NotImplemented
    k, total = input.shape[-1], sum(out_features)
    layouts = [layout_shape(n, k)[0] if n >= 1 else 0 for n in out_features]
    covered = (
        dtype in _FLOATS
        and 2 <= bits <= 8
        and len(activations) == len(out_features) > 0
        and all(name in _ACTIVATIONS for name in activations)
        and all(layouts)
        and packed.dim() == 2
        and packed.shape[0] == sum(layouts)
        and _channels(weight_scale, total, torch.float32, one_scale)
        and _channels(weight_zero_point, total, torch.int32, one_scale)
        and _channels(bias, total, torch.float32, False)
        and k <= greatest_k(False, not symmetric, weight_zero_point is not None)
    )
    if not covered:
        return NotImplemented
    parts = packed.split(layouts)
    if not all(_is_packed(part, n, k) for part, n in zip(parts, out_features, strict=True)):
        return NotImplemented

    rows = _rows(input)
    qmax = 2 ** (bits - 1) - 1
    quantized = rows_to_int8(
        rows,
        # As wide as the weight: aligned rows, and what is behind K meets zeros.
        torch.empty((rows.shape[0], padded_k(k)), dtype=torch.int8, device=input.device),
        qmin=-qmax if symmetric and bits == 8 else -qmax - 1,
        qmax=qmax,
        symmetric=symmetric,
        with_sums=weight_zero_point is not None,
    )
    outputs, first = [], 0
    for part, n, activation in zip(parts, out_features, activations, strict=True):
        out = torch.empty((rows.shape[0], n), dtype=dtype, device=input.device)
        matmul(
            Problem(
                x=quantized.q,
                weight=part[: padded_n(n)],
                sums=packed_sums(part, n),
                out=out,
                k=k,
                scale=quantized.scale,
                zero_point=None if symmetric else quantized.zero_point,
                row_sums=quantized.sums,
                weight_scale=_part(weight_scale, first, n),
                weight_zero_point=_part(weight_zero_point, first, n),
                bias=_part(bias, first, n),
                activation=activation,
            )
        )
        outputs.append(out.view(*input.shape[:-1], n))
        first += n
    return outputs


def _part(tensor: Tensor | None, first: int, n: int) -> Tensor | None:
    """Of one layer, contiguous; a single value serves all."""
    if tensor is None or tensor.numel() == 1:
        return _flat(tensor)
    return tensor[first : first + n].contiguous()


def linear_static(
    input: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    output_dtype: torch.dtype = torch.float32,
    output_scale: Tensor | None = None,
    output_zero_point: int = 0,
    output_qmin: int = -128,
    output_qmax: int = 127,
    input_qmin: int = -128,
    input_qmax: int = 127,
) -> Any:
    """See :func:`torchquant.ops.linear_static`."""
    others = (input_scale, input_zero_point, packed, weight_scale, weight_zero_point, bias)
    if not _covers(input, (*_FLOATS, *_INTEGERS), *others, output_scale):
        return NotImplemented
    n, k = out_features, input.shape[-1]
    is_float, unsigned = input.dtype in _FLOATS, input.dtype == torch.uint8
    if is_float:
        given = _one(input_scale, torch.float32) and _one(input_zero_point, torch.int32)
        given = given and -128 <= input_qmin < input_qmax <= 127
    else:
        given = _per_row(input_scale, input, torch.float32)
        given = given and _per_row(input_zero_point, input, torch.int32)
    if output_scale is None:
        output = output_dtype in _FLOATS
    else:
        limits = {torch.int8: (-128, 127), torch.uint8: (0, 255)}.get(output_dtype, (0, -1))
        output = _one(output_scale, torch.float32) and output_qmin < output_qmax
        output = output and limits[0] <= output_qmin <= output_zero_point
        output = output and output_zero_point <= output_qmax <= limits[1]
    covered = (
        given
        and output
        and activation in _ACTIVATIONS
        and _is_packed(packed, n, k)
        and _channels(weight_scale, n, torch.float32)
        and _channels(weight_zero_point, n, torch.int32)
        and (_channels(bias, n, torch.float32, False) or _channels(bias, n, torch.int32, False))
        and k <= greatest_k(unsigned, input_zero_point is not None, weight_zero_point is not None)
    )
    if not covered:
        return NotImplemented

    rows = _rows(input)
    x, scale, zero_point = rows, _flat(input_scale), _flat(input_zero_point)
    sums = None
    if is_float:
        quantized = rows_to_int8(
            rows,
            torch.empty((rows.shape[0], padded_k(k)), dtype=torch.int8, device=input.device),
            qmin=input_qmin,
            qmax=input_qmax,
            scale=scale,
            zero_point=zero_point,
            with_sums=weight_zero_point is not None,
        )
        x, scale, sums = quantized.q, quantized.scale, quantized.sums
    elif weight_zero_point is not None:
        sums = row_sums(rows)
    out = torch.empty((rows.shape[0], n), dtype=output_dtype, device=input.device)
    matmul(
        Problem(
            x=x,
            weight=packed[: padded_n(n)],
            sums=packed_sums(packed, n),
            out=out,
            k=k,
            scale=scale,
            zero_point=zero_point,
            row_sums=sums,
            weight_scale=_flat(weight_scale),
            weight_zero_point=_flat(weight_zero_point),
            bias=None if bias is None else bias.contiguous(),
            activation=activation,
            output_scale=_flat(output_scale),
            output_zero_point=output_zero_point,
            output_qmin=output_qmin,
            output_qmax=output_qmax,
        )
    )
    return out.view(*input.shape[:-1], n)


OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize_per_token": quantize_per_token,
    "quantize_rows": quantize_rows,
    "quantize_pack": quantize_pack,
    "int8_mm": int8_mm,
    "linear_dynamic": linear_dynamic,
    "linear_dynamic_split": linear_dynamic_split,
    "linear_static": linear_static,
}
