"""Rows of a quantized table, and sums of rows: embeddings with weights of 2 to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ops._register import fake

__all__ = ["embedding_bag_intx", "embedding_intx"]


def embedding_intx(
    input: Tensor,
    packed: Tensor,
    *,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Look up rows of a quantized table; only these rows are dequantized.

    Args:
        input: int64 or int32 indices of any shape.
        packed: :func:`pack_intx_weight` of the ``[num_embeddings, embedding_dim]`` table.
        num_embeddings, embedding_dim: the table's shape.
        bits, group_size, has_zero_point: as the table was packed.
        output_dtype: float32, bfloat16 or float16.

    Returns:
        ``[*input.shape, embedding_dim]``; the bits of
        :func:`torchquant.functional.embedding_intx`. No gradients.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: packed was made for other arguments, or on another type of device.
        IndexError: an index is not a row of the table.

    Example:
        >>> from torchquant.ops import pack_intx_weight
        >>> w = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> packed = pack_intx_weight(w, torch.tensor([0.5, 2.0]), bits=4)
        >>> embedding_intx(torch.tensor([1]), packed, num_embeddings=2, embedding_dim=2, bits=4)
        tensor([[6., 8.]])
    """
    return torch.ops.torchquant.embedding_intx.default(  # type: ignore[no-any-return]
        input,
        packed,
        num_embeddings,
        embedding_dim,
        bits,
        group_size,
        has_zero_point,
        output_dtype,
    )


@fake("embedding_intx")
def _(
    input: Tensor,
    packed: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty((*input.shape, embedding_dim), dtype=output_dtype, device=input.device)


def embedding_bag_intx(
    input: Tensor,
    packed: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sums, means or maxima of rows of a quantized table, in float32.

    Args:
        input: int64 or int32 indices: ``[bags, N]``, or ``[N]`` with offsets.
        packed, num_embeddings, embedding_dim, bits, group_size, has_zero_point: as for
            :func:`embedding_intx`.
        offsets: int64 or int32 ``[bags]``: where each bag begins in input, ascending from 0; None
            if each row of input is a bag.
        per_sample_weights: float32, bfloat16 or float16 of input's shape, multiplied with the rows;
            only with mode "sum".
        mode: sum, mean or max.
        padding_idx: indices of this row do not count; negative: from the end of the table.
        include_last_offset: offsets has one element more, the end of the last bag.
        output_dtype: float32, bfloat16 or float16.

    Returns:
        ``[bags, embedding_dim]``; the bits of :func:`torchquant.functional.embedding_bag_intx`.

    Gradients: to ``per_sample_weights``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: an argument is wrong, or packed was made for other arguments.
        IndexError: an index is not a row of the table.

    Example:
        >>> from torchquant.ops import pack_intx_weight
        >>> w = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> table = {"num_embeddings": 2, "embedding_dim": 2, "bits": 4}
        >>> packed = pack_intx_weight(w, torch.tensor([0.5, 2.0]), bits=4)
        >>> embedding_bag_intx(torch.tensor([[0, 1]]), packed, mode="sum", **table)
        tensor([[6.5000, 7.0000]])
    """
    return torch.ops.torchquant.embedding_bag_intx.default(  # type: ignore[no-any-return]
        input,
        packed,
        offsets,
        per_sample_weights,
        num_embeddings,
        embedding_dim,
        bits,
        group_size,
        has_zero_point,
        mode,
        padding_idx,
        include_last_offset,
        output_dtype,
    )


@fake("embedding_bag_intx")
def _(
    input: Tensor,
    packed: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    group_size: int | None = None,
    has_zero_point: bool = False,
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    bags = input.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return torch.empty((bags, embedding_dim), dtype=output_dtype, device=input.device)
