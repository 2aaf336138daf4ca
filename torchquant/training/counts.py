"""Counts of values by bin: a histogram of O(bins) memory whose result no order of batches changes.

The bins of a row are ``2^e`` wide and aligned at 0: bin p of a histogram with N bins per sign
counts the values whose quotient ``x / 2^e``, rounded toward 0, is p, for ``-N < p < N``. Bin 0
therefore holds the values of both signs whose magnitude is below the width. Dividing by a power of
two is exact, and ``trunc(trunc(x) / 2) = trunc(x / 2)``, so a row whose range grows merges pairs of
bins without error: the counts depend only on the values and on the greatest exponent, not on the
order of the batches, nor on how threads and processes divide them.

The state of a histogram consists of two tensors: ``counts`` int64 ``[rows, 2 N - 1]`` and
``exponent`` int64 ``[rows]``, the e of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant._extension import load
from torchquant.training.ranges import update_range
from torchquant.training.state import inside_backward

load()

FINEST = -100  # the least exponent: smaller values than 2^-100 are in bin 0
_BLOCK = 1 << 18  # values counted at a time
_SPLITS = 4  # the least number of bins per bin of the user; see bins_per_sign


def bins_per_sign(bins: int) -> int:
    """N for ``bins`` bins of a user: a power of two, so that half of them are always in use.

    The observed magnitude lies in the upper half of the N bins. With N at least four times
    ``bins``, the range of the data therefore consists of at least ``2 * bins`` bins.

    Example:
        >>> bins_per_sign(2048), bins_per_sign(1000)
        (8192, 4096)
    """
    return 1 << (_SPLITS * bins - 1).bit_length()


@torch.no_grad()
def update_counts(
    input: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    num_batches: Tensor,
    nonfinite: Tensor,
    counts: Tensor,
    exponent: Tensor,
    axis: int | None,
    group_name: str | None,
) -> None:
    """Add the finite values of a batch to a histogram, and update the range of the batches."""
    before = nonfinite.clone()
    state = (min_val, max_val, num_batches, nonfinite)
    update_range(input, *state, axis, None, None, group_name)
    if input.numel() == 0:
        return
    magnitude = torch.maximum(-min_val, max_val).clamp(min=0.0)
    new = torch.maximum(exponent, _needed(magnitude, counts.shape[1]))
    coarsen(counts, new - exponent)
    exponent.copy_(new)
    # Reading a CPU tensor needs no synchronisation.
    all_finite = nonfinite.is_cpu and bool((nonfinite == before).item())
    _add(input.detach(), counts, exponent, axis, all_finite)


@torch.library.custom_op(
    "torchquant_training::update_counts_",
    mutates_args=("min_val", "max_val", "num_batches", "nonfinite", "counts", "exponent"),
)
def update_counts_operator(
    input: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    num_batches: Tensor,
    nonfinite: Tensor,
    counts: Tensor,
    exponent: Tensor,
    axis: int | None,
    group_name: str | None,
) -> None:
    """:func:`update_counts` as one opaque step of a compiled graph; not in a backward pass."""
    if not inside_backward():
        state = (min_val, max_val, num_batches, nonfinite, counts, exponent)
        update_counts(input, *state, axis, group_name)


def coarsen(counts: Tensor, shift: Tensor) -> None:
    """Merge ``2^shift`` bins into one in each row, in place; ``shift`` is int64 ``[rows]``.

    Example:
        >>> counts = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
        >>> coarsen(counts, torch.tensor([1]))
        >>> counts
        tensor([[ 0,  0,  3, 12, 13,  0,  0]])
    """
    if shift.is_cpu and not bool(shift.any()):
        return
    rows, size = counts.shape
    middle = size // 2
    place = torch.arange(-middle, middle + 1, device=counts.device)
    merged = place.sign() * (place.abs() >> shift.clamp(max=62)[:, None])
    merged += middle + size * torch.arange(rows, device=counts.device)[:, None]
    result = torch.zeros_like(counts).view(-1)
    result.index_add_(0, merged.view(-1), counts.reshape(-1))
    counts.copy_(result.view(rows, size))


def merge_counts(counts: Tensor, exponent: Tensor, others: Tensor, other_exponent: Tensor) -> None:
    """Add the values of a second histogram to the first one, in place; exact in every order."""
    new = torch.maximum(exponent, other_exponent)
    others = others.clone()
    coarsen(counts, new - exponent)
    coarsen(others, new - other_exponent)
    counts += others
    exponent.copy_(new)


def magnitudes(counts: Tensor) -> Tensor:
    """Counts ``[rows, N]`` of the values' magnitudes: bin p holds ``p <= |x| / 2^e < p + 1``.

    Example:
        >>> magnitudes(torch.tensor([[4, 2, 1, 3, 5]]))
        tensor([[1, 5, 9]])
    """
    middle = counts.shape[1] // 2
    result = counts[:, middle:].clone()
    result[:, 1:] += counts[:, :middle].flip(1)
    return result


def widths(exponent: Tensor) -> Tensor:
    """The widths ``2^e`` of the bins, float32 and exact.

    Example:
        >>> widths(torch.tensor([-2, 3]))
        tensor([0.2500, 8.0000])
    """
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _needed(magnitude: Tensor, size: int) -> Tensor:
    """The least exponent of bins that reach beyond ``magnitude``, float32 ``[rows]``."""
    # A float32 with the biased exponent b is below 2^(b - 126).
    above = (magnitude.view(torch.int32) >> 23).to(torch.int64) - 126
    return (above - (size // 2).bit_length()).clamp(min=FINEST)


def _add(
    input: Tensor, counts: Tensor, exponent: Tensor, axis: int | None, all_finite: bool
) -> None:
    rows, size = counts.shape
    values = input.reshape(1, -1) if axis is None else input.movedim(axis, 0).reshape(rows, -1)
    factor = widths(-exponent)[:, None]
    flat = counts.view(-1)
    start = size // 2 + size * torch.arange(rows, device=counts.device)[:, None]
    if not all_finite:
        for block in values.split(max(1, _BLOCK // rows), 1):
            block = block.float()
            finite = block.isfinite()
            position = (torch.where(finite, block, 0.0) * factor).to(torch.int64) + start
            flat.index_add_(0, position.reshape(-1), finite.reshape(-1).to(torch.int64))
        return
    # Positions of one row fit into int32, which is faster; so is memory that is used again.
    width = min(values.shape[1], max(1, _BLOCK // rows))
    quotient = torch.empty(rows, width, dtype=torch.float32)
    position = torch.empty(rows, width, dtype=torch.int32 if rows == 1 else torch.int64)
    start = start.to(position.dtype)
    for block in values.split(width, 1):
        used = block.shape[1]
        torch.mul(block, factor, out=quotient[:, :used])
        position[:, :used].copy_(quotient[:, :used]).add_(start)
        found = position[:, :used].reshape(-1)
        flat += torch.bincount(found, minlength=flat.numel())
