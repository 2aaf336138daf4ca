"""The linear operators, on Triton's kernels: quantized rows, then an integer matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant.functional.activations import ACTIVATIONS
from torchquant.triton.gemm.problem import Problem, greatest_k
from torchquant.triton.gemm.run import matmul
from torchquant.triton.kernels.rows import quantize_rows, row_sums
from torchquant.triton.layout import layout_shape, packed_sums, padded_k, padded_n
from torchquant.triton.ops.arguments import (
    FLOATS,
    INTEGERS,
    as_kernel_bias,
    as_rows,
    flat,
    is_per_channel,
    is_per_row,
    is_single,
    supports_rows,
)


def int8_mm(input: Tensor, packed: Tensor, out_features: int) -> Any:
    """See :func:`torchquant.ops.int8_mm`."""
    if not supports_rows(input, INTEGERS, packed):
        return NotImplemented
    n, k = out_features, input.shape[-1]
    if not _is_packed(packed, n, k) or k > greatest_k(input.dtype == torch.uint8, False, False):
        return NotImplemented
    rows = as_rows(input)
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
        single_scale_allowed=True,
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
    """See :func:`torchquant.ops.linear_dynamic_split`: one quantization, one product per layer."""
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
        single_scale_allowed=False,
    )


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
    if not supports_rows(input, (*FLOATS, *INTEGERS), *others, output_scale):
        return NotImplemented
    bias = as_kernel_bias(bias)
    n, k = out_features, input.shape[-1]
    is_float, unsigned = input.dtype in FLOATS, input.dtype == torch.uint8
    if is_float:
        given = is_single(input_scale, torch.float32) and is_single(input_zero_point, torch.int32)
        given = given and -128 <= input_qmin < input_qmax <= 127
    else:
        given = is_per_row(input_scale, input, torch.float32)
        given = given and is_per_row(input_zero_point, input, torch.int32)
    if output_scale is None:
        output = output_dtype in FLOATS
    else:
        limits = {torch.int8: (-128, 127), torch.uint8: (0, 255)}.get(output_dtype, (0, -1))
        output = is_single(output_scale, torch.float32) and output_qmin < output_qmax
        output = output and limits[0] <= output_qmin <= output_zero_point
        output = output and output_zero_point <= output_qmax <= limits[1]
    supported = (
        given
        and output
        and activation in ACTIVATIONS
        and _is_packed(packed, n, k)
        and is_per_channel(weight_scale, n, torch.float32)
        and is_per_channel(weight_zero_point, n, torch.int32)
        and any(is_per_channel(bias, n, kind, False) for kind in (torch.float32, torch.int32))
        and k <= greatest_k(unsigned, input_zero_point is not None, weight_zero_point is not None)
    )
    if not supported:
        return NotImplemented

    rows = as_rows(input)
    x, scale, zero_point = rows, flat(input_scale), flat(input_zero_point)
    sums = None
    if is_float:
        quantized = quantize_rows(
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
            weight_scale=flat(weight_scale),
            weight_zero_point=flat(weight_zero_point),
            bias=None if bias is None else bias.contiguous(),
            activation=activation,
            output_scale=flat(output_scale),
            output_zero_point=output_zero_point,
            output_qmin=output_qmin,
            output_qmax=output_qmax,
        )
    )
    return out.view(*input.shape[:-1], n)


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
    single_scale_allowed: bool,
) -> Any:
    dtype = input.dtype if output_dtype is None else output_dtype
    if not supports_rows(input, FLOATS, packed, weight_scale, weight_zero_point, bias):
        return NotImplemented
    bias = as_kernel_bias(bias)
    k, total = input.shape[-1], sum(out_features)
    layouts = [layout_shape(n, k)[0] if n >= 1 else 0 for n in out_features]
    supported = (
        dtype in FLOATS
        and 2 <= bits <= 8
        and len(activations) == len(out_features) > 0
        and all(name in ACTIVATIONS for name in activations)
        and all(layouts)
        and packed.dim() == 2
        and packed.shape[0] == sum(layouts)
        and is_per_channel(weight_scale, total, torch.float32, single_scale_allowed)
        and is_per_channel(weight_zero_point, total, torch.int32, single_scale_allowed)
        and is_per_channel(bias, total, torch.float32, False)
        and k <= greatest_k(False, not symmetric, weight_zero_point is not None)
    )
    if not supported:
        return NotImplemented
    parts = packed.split(layouts)
    if not all(_is_packed(part, n, k) for part, n in zip(parts, out_features, strict=True)):
        return NotImplemented

    rows = as_rows(input)
    qmax = 2 ** (bits - 1) - 1
    quantized = quantize_rows(
        rows,
        # As wide as the weight: rows are aligned, and columns from K on meet zeros in the weight.
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
    """One layer's values, contiguous; a single value serves all layers."""
    if tensor is None or tensor.numel() == 1:
        return flat(tensor)
    return tensor[first : first + n].contiguous()


def _is_packed(packed: Tensor, n: int, k: int) -> bool:
    return (
        packed.dtype == torch.int8
        and 1 <= n < 2**31 - 2**16
        and packed.shape == layout_shape(n, k)
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
    )
