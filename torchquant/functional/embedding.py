"""Embeddings whose table has 2 to 8 bits: rows of it, and sums of rows.

A value is the float that its integer represents, in one rounding; a sum is in float32 and in the
order of the indices::

    row[k] = fl(float(w[n,k] - zw[n,g]) * sw[n,g])          for the group g of input k
    t      = fl(t + row), or fl(t + fl(weight * row))       for each row of a bag, from t = 0
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    dtype_name,
    require_device,
    require_dtype,
)
from torchquant.functional.intx import check_intx

INDEX_DTYPES = (torch.int64, torch.int32)
BAG_MODES = ("sum", "mean", "max")


def embedding_intx(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a quantized table as floats: ``dequantize(weight)[input]``.

    Args:
        input: int64 or int32 indices of any shape.
        weight: int8 ``[num_embeddings, embedding_dim]``, integers of ``bits`` bits.
        weight_scale: fp32 ``[num_embeddings]``; with ``group_size``
            ``[num_embeddings, ceil(embedding_dim / group_size)]``.
        weight_zero_point: int8 of weight_scale's shape, integers of ``bits`` bits; or None.
        bits: 2 to 8.
        group_size: values of a row that share a scale; None: one scale per row.
        output_dtype: float32, bfloat16 or float16; values are rounded to it once.

    Returns:
        ``[*input.shape, embedding_dim]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or a number is wrong.
        IndexError: an index is not a row of the table.

    Example:
        >>> w = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> embedding_intx(torch.tensor([1, 0]), w, torch.tensor([0.5, 2.0]), bits=4)
        tensor([[ 6.0000,  8.0000],
                [ 0.5000, -1.0000]])
    """
    who = "embedding_intx"
    rows = _rows(who, input, weight, weight_scale, weight_zero_point, bits, group_size)
    return rows.to(_float_dtype(who, output_dtype))


def embedding_bag_intx(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sums, means or maxima of rows of a quantized table, as ``torch.nn.functional.embedding_bag``.

    A bag without rows is 0. Where a row holds NaN, the result of its bag does.

    Args:
        input: int64 or int32 indices: ``[bags, N]``, or ``[N]`` with offsets.
        weight, weight_scale, weight_zero_point, bits, group_size: as for :func:`embedding_intx`.
        offsets: int64 or int32 ``[bags]``: where each bag begins in input, ascending from 0; None
            if each row of input is a bag.
        per_sample_weights: fp32, bf16 or fp16 of input's shape, multiplied with the rows; only with
            mode "sum".
        mode: sum, mean (the sum, divided by the number of rows) or max.
        padding_idx: indices of this row do not count; negative: from the end of the table.
        include_last_offset: offsets has one element more, the end of the last bag.
        output_dtype: float32, bfloat16 or float16; results are rounded to it once.

    Returns:
        ``[bags, embedding_dim]`` of ``output_dtype``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a number, the offsets or the mode is wrong.
        IndexError: an index is not a row of the table.

    Example:
        >>> w = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> bags = torch.tensor([[0, 1], [1, 1]])
        >>> embedding_bag_intx(bags, w, torch.tensor([0.5, 2.0]), bits=4, mode="sum")
        tensor([[ 6.5000,  7.0000],
                [12.0000, 16.0000]])
    """
    who = "embedding_bag_intx"
    if mode not in BAG_MODES:
        raise ValueError(f"{who}: mode must be one of {', '.join(BAG_MODES)}, got {mode!r}")
    bounds = _bounds(who, input, offsets, include_last_offset)
    rows = _rows(who, input, weight, weight_scale, weight_zero_point, bits, group_size)
    dtype = _float_dtype(who, output_dtype)
    if per_sample_weights is not None:
        _check_sample_weights(who, per_sample_weights, input, mode)
        rows = rows * per_sample_weights.to(torch.float32).unsqueeze(-1)
    counts = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counts = input != _padding_row(who, padding_idx, weight.shape[0])
    rows, counts = rows.reshape(-1, weight.shape[1]), counts.reshape(-1)
    bags = [_bag(rows[first:last][counts[first:last]], mode) for first, last in pairwise(bounds)]
    empty = torch.zeros(0, weight.shape[1], device=input.device)
    return torch.stack(bags).to(dtype) if bags else empty.to(dtype)


def _bag(rows: Tensor, mode: str) -> Tensor:
    t = torch.zeros(rows.shape[1], device=rows.device)
    for i, row in enumerate(rows):
        largest = row if i == 0 else torch.maximum(t, row)
        t = largest if mode == "max" else t + row
    return t / len(rows) if mode == "mean" and len(rows) else t


def _rows(
    who: str,
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bits: int,
    group_size: int | None,
) -> Tensor:
    """The rows at the indices, fp32 ``[*input.shape, K]``."""
    require_dtype(who, "input", input, INDEX_DTYPES)
    require_dtype(who, "weight", weight, (torch.int8,))
    require_device(who, "weight", weight, input.device)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"{who}: weight must be int8 [num_embeddings, embedding_dim] with at least one value, "
            f"got {describe(weight)}"
        )
    check_intx(who, weight, weight_scale, weight_zero_point, bits, group_size)
    count, size = weight.shape
    for index in input.reshape(-1).tolist():
        if not 0 <= index < count:
            raise IndexError(
                f"{who}: input must hold indices from 0 to {count - 1} (num_embeddings = {count}), "
                f"got {index}"
            )
    group = torch.arange(size, device=input.device) // (group_size or size)

    def of_inputs(values: Tensor) -> Tensor:
        return values.reshape(count, -1)[input][..., group]

    integers = weight[input].to(torch.float32)  # exact, and so are differences of integers
    if weight_zero_point is not None:
        integers = integers - of_inputs(weight_zero_point).to(torch.float32)
    return integers * of_inputs(weight_scale)


def _bounds(
    who: str, input: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> list[int]:
    """Where each bag begins among the flat indices, and the end of the last one."""
    if offsets is None:
        if input.dim() != 2:
            raise ValueError(
                f"{who}: input must be [bags, N], or [N] with offsets, got {describe(input)}"
            )
        if include_last_offset:
            raise ValueError(f"{who}: include_last_offset must come with offsets, got none")
        return [b * input.shape[1] for b in range(input.shape[0] + 1)]
    if input.dim() != 1:
        raise ValueError(
            f"{who}: input must be [N] where offsets are given, got {describe(input)}; each row of "
            "a matrix is a bag without offsets"
        )
    require_dtype(who, "offsets", offsets, INDEX_DTYPES)
    require_device(who, "offsets", offsets, input.device)
    if offsets.dim() != 1 or offsets.numel() < include_last_offset:
        end = " and the end of the last bag" if include_last_offset else ""
        raise ValueError(f"{who}: offsets must be [bags]{end}, got {describe(offsets)}")
    bounds: list[int] = offsets.tolist()
    if not include_last_offset:
        bounds.append(input.numel())
    if len(bounds) > 1 and bounds[0] != 0:
        raise ValueError(f"{who}: offsets must begin with 0, got {bounds[0]}")
    for first, last in pairwise(bounds):
        if not first <= last <= input.numel():
            raise ValueError(
                f"{who}: offsets must ascend to at most {input.numel()}, the number of indices, "
                f"got {first} and {last}"
            )
    return bounds


def _check_sample_weights(who: str, weights: Tensor, input: Tensor, mode: str) -> None:
    require_dtype(who, "per_sample_weights", weights, FLOAT_DTYPES)
    require_device(who, "per_sample_weights", weights, input.device)
    if weights.shape != input.shape:
        raise ValueError(
            f"{who}: per_sample_weights must have input's shape {list(input.shape)}, "
            f"got {describe(weights)}"
        )
    if mode != "sum":
        raise ValueError(f"{who}: per_sample_weights must come with mode = 'sum', got {mode!r}")


def _padding_row(who: str, padding_idx: int, rows: int) -> int:
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"{who}: padding_idx must be from {-rows} to {rows - 1} (num_embeddings = {rows}), "
            f"got {padding_idx}"
        )
    return padding_idx % rows


def _float_dtype(who: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{who}: output_dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        )
    return dtype
