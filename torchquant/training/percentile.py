"""PercentileObserver: the range that holds a given share of the values."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from torchquant.training.counting_observer import CountingObserver
from torchquant.training.counts import magnitudes, widths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from torchquant.training.observers import ObserverOptions


class PercentileObserver(CountingObserver):
    """The least range beyond which at most ``100 - percentile`` percent of the values lie.

    The share counts at each end on its own; for symmetric ranges it counts the magnitudes. Of n
    values, ``floor(n * (100 - percentile) / 100)`` may lie outside, computed exactly. An end of the
    range is the outer edge of the bin that holds the first value that must not lie outside, or the
    observed end if that is nearer to 0. So the range is at most one bin wider than that of the
    sorted values, and never wider than the observed one.

    Args:
        percentile: above 50 and at most 100; 100 gives the observed range.
        bins: see :class:`CountingObserver`.
        bits, signed, symmetric, granularity, narrow_range, shape, process_group, device: see
            :class:`Observer`. PerAxis keeps a histogram for each channel.

    Raises:
        TypeError, ValueError: see :class:`CountingObserver`; ValueError also if percentile is not a
            number above 50 and at most 100.

    Example:
        >>> observer = PercentileObserver(99.9)
        >>> _ = observer(torch.cat([torch.linspace(0, 1, 1000), torch.tensor([5.0])]))
        >>> [round(end.item(), 2) for end in observer.calculate_range()]
        [0.0, 1.0]
    """

    per_channel: ClassVar[bool] = True

    def __init__(
        self,
        percentile: float = 99.99,
        bins: int = 2048,
        **options: Unpack[ObserverOptions],
    ) -> None:
        super().__init__(bins, **options)
        number = isinstance(percentile, (int, float)) and not isinstance(percentile, bool)
        if not number or not 50 < percentile <= 100:
            raise ValueError(
                "PercentileObserver: percentile must be a number above 50 and at most 100, got "
                f"{percentile!r}; 99.99 leaves one value in 10000 outside"
            )
        self.percentile = float(percentile)

    def calculate_range(self) -> tuple[Tensor, Tensor]:
        """The range that holds the share; scales without data have the range (+inf, -inf)."""
        if self.counts.numel() == 0:
            return self.min_val, self.max_val
        counts, width = self.counts.cpu(), widths(self.exponent.cpu())
        least, greatest = self.min_val.cpu(), self.max_val.cpu()
        outside = torch.tensor(
            [_outside(count, self.percentile) for count in counts.sum(1).tolist()]
        )
        if self.symmetric:
            end = _upper(magnitudes(counts), outside, 0) * width
            low, high = torch.maximum(least, -end), torch.minimum(greatest, end)
        else:
            middle = counts.shape[1] // 2
            low = torch.maximum(least, -_upper(counts.flip(1), outside, middle) * width)
            high = torch.minimum(greatest, _upper(counts, outside, middle) * width)
        empty = least > greatest
        low, high = torch.where(empty, least, low), torch.where(empty, greatest, high)
        return low.to(self.min_val.device), high.to(self.min_val.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, percentile={self.percentile}"


def _outside(count: int, percentile: float) -> int:
    """How many of ``count`` values may lie outside; the decimals of percentile count exactly."""
    return int(count * (100 - Fraction(repr(percentile))) // 100)


def _upper(counts: Tensor, outside: Tensor, middle: int) -> Tensor:
    """The upper edge, in bins, of the last bin with at most ``outside`` values above it."""
    above = counts.flip(1).cumsum(1).flip(1) - counts
    place = (above > outside[:, None]).sum(1) - middle
    return (place + (place >= 0).long()).float()


__all__ = ["PercentileObserver"]
