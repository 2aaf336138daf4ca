"""Range of least squared error, found on a histogram.

The integer counts of a histogram add up exactly over processes and need O(bins) memory for a batch
of any size. With running sums over the bins, the error of a candidate range costs O(levels).
Candidates are fractions of the observed minimum and maximum: first on a coarse grid, then on a
finer one around the best point of the coarse grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.training.processes import gather

_BINS = 2048
_COARSE = 16  # candidates per end; the smallest is 1/16 of the observed end
_FINE = 8  # parts of one coarse step, to both sides
_BLOCK = 1 << 20  # numbers held at a time


def least_squares_range(
    rows: Tensor, qmin: int, qmax: int, group_name: str | None = None
) -> tuple[Tensor, Tensor] | None:
    """Scale and integer zero point with the least squared error of each row's values.

    Every range contains 0. NaN and infinities are left out. All processes get the same result: the
    one that a single process would find on all of their data.

    Args:
        rows: float ``[C, n]``.
        qmin, qmax: the integer range.
        group_name: processes to reduce over.

    Returns:
        ``(scale float32 [C], zero_point float32 [C])``, zero points whole numbers in [qmin, qmax];
        None if no value is finite and other than 0. A row without such a value gets the mean of the
        other scales.

    Example:
        >>> scale, zero_point = least_squares_range(torch.linspace(-1, 3, 1001)[None], 0, 15)
        >>> scale, zero_point
        (tensor([0.2594]), tensor([4.]))
    """
    x = rows.detach().double()
    finite = x.isfinite()
    least = torch.where(finite, x, 0.0).amin(1) if x.shape[1] else x.new_zeros(x.shape[0])
    greatest = torch.where(finite, x, 0.0).amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    everyone = gather(torch.cat([least, greatest]), group_name)
    channels = x.shape[0]
    least = everyone[:, :channels].amin(0).clamp(max=0.0)
    greatest = everyone[:, channels:].amax(0).clamp(min=0.0)
    extent = greatest - least
    if not bool((extent > 0).any()):
        return None
    width = torch.where(extent > 0, extent, 1.0) / _BINS
    counts = _histogram(x, finite, least, width, group_name)
    # The rest runs on the CPU: the counts are exact on every device, so all give the same range.
    least, greatest, extent, width, counts = (
        part.cpu() for part in (least, greatest, extent, width, counts)
    )
    centers = least[:, None] + (torch.arange(_BINS, device="cpu") + 0.5) * width[:, None]
    # The errors of all values that round to one level follow from three sums over their bins.
    moments = torch.stack([counts, counts * centers, counts * centers.square()])
    sums = torch.nn.functional.pad(moments.cumsum(2), (1, 0))

    grid = torch.arange(1, _COARSE + 1, dtype=torch.float64, device="cpu") / _COARSE
    low, high = (end.flatten() for end in torch.meshgrid(grid, grid, indexing="ij"))
    low, high = low.expand(channels, -1), high.expand(channels, -1)
    best = _best(sums, least, greatest, width, low, high, qmin, qmax)
    around = torch.arange(1 - _FINE, _FINE, dtype=torch.float64, device="cpu")
    around = around / (_COARSE * _FINE)
    down, up = (end.flatten() for end in torch.meshgrid(around, around, indexing="ij"))
    low = (low.gather(1, best) + down).clamp(max=1.0)
    high = (high.gather(1, best) + up).clamp(max=1.0)
    best = _best(sums, least, greatest, width, low, high, qmin, qmax)
    scale, zero_point = _qparams(
        least * low.gather(1, best)[:, 0], greatest * high.gather(1, best)[:, 0], qmin, qmax
    )
    empty = extent == 0
    scale = torch.where(empty, scale[~empty].mean(), scale)
    return scale.to(x.device), torch.where(empty, 0.0, zero_point).to(x.device)


def _histogram(
    x: Tensor, finite: Tensor, least: Tensor, width: Tensor, group_name: str | None
) -> Tensor:
    """Counts ``[C, bins]`` over all processes, float64 holding whole numbers."""
    index = ((torch.where(finite, x, 0.0) - least[:, None]) / width[:, None]).long()
    index = index.clamp_(0, _BINS - 1)
    index += torch.arange(x.shape[0], device=x.device)[:, None] * _BINS
    counts = torch.bincount(index[finite], minlength=x.shape[0] * _BINS).double()
    return gather(counts, group_name).sum(0).view(-1, _BINS)


def _qparams(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / (qmax - qmin)).float().clamp(min=2.0**-126)
    zero_point = torch.clamp(torch.round(qmin - low.float() / scale), qmin, qmax)
    return scale, zero_point


def _best(
    sums: Tensor,
    least: Tensor,
    greatest: Tensor,
    width: Tensor,
    low: Tensor,
    high: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Index ``[C, 1]`` of the fractions (low, high) ``[C, candidates]`` with the least error."""
    scale, zero_point = _qparams(least[:, None] * low, greatest[:, None] * high, qmin, qmax)
    scale, zero_point = scale.double(), zero_point.double()
    levels = torch.arange(qmin, qmax + 1, dtype=torch.float64, device="cpu")
    step = max(1, _BLOCK // (least.numel() * levels.numel()))
    errors = []
    for s, z in zip(scale.split(step, 1), zero_point.split(step, 1), strict=True):
        values = (levels - z[:, :, None]) * s[:, :, None]
        # Values up to the middle between two levels round to the lower one: the bins below `ends`.
        middle = (values[:, :, 1:] + values[:, :, :-1]) / 2
        ends = (middle - least[:, None, None]) / width[:, None, None]
        ends = (ends + 0.5).floor().clamp(0, _BINS).long().flatten(1)
        shape = (*s.shape, levels.numel() - 1)
        count, total, square = (
            torch.cat(
                [part.new_zeros(*s.shape, 1), inner, part[:, None, -1:].expand(*s.shape, 1)], 2
            ).diff(dim=2)
            for part, inner in ((part, part.gather(1, ends).view(shape)) for part in sums)
        )
        errors.append((square - 2 * values * total + values.square() * count).sum(-1))
    return torch.cat(errors, 1).argmin(1, keepdim=True)
