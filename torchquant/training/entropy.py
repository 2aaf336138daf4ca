"""The threshold whose levels lose the least information about the distribution of |x|.

The candidates are ``i = levels .. bins`` bins of a histogram of the magnitudes. Candidate i clips
the values beyond its bins:

- P is the histogram of the clipped values: ``counts[:i]``, with all counts beyond added to the last
  bin;
- Q is what the levels represent: ``counts[:i]`` without the counts beyond, in which bin j belongs
  to level ``j * levels // i``, and the count of a level is spread evenly over its bins in which P
  is not 0;
- both are normalised, and the divergence of P from Q decides: ``sum P log(P / Q)``.

Decisions: where P is not 0 but Q is (only clipped values in the last level), the divergence is
infinite; the last candidate clips nothing, so a finite one exists. Divergences that differ by less
than 1e-9 are tied, and the least threshold of them wins. Bin 0 holds the zeros that a ReLU makes;
every threshold represents them exactly, so bin 0 counts at most as much as bin 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchquant.training.counting_observer import CountingObserver
from torchquant.training.counts import magnitudes, widths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from torchquant.training.observers import ObserverOptions

_TIE = 1e-9
_PART = 1 << 16  # levels of candidates at a time


class EntropyObserver(CountingObserver):
    """The range of least Kullback-Leibler divergence between the values and their levels.

    The histogram of the magnitudes has ``bins`` bins, and each number of bins from ``levels`` to
    ``bins`` is a candidate; see :mod:`torchquant.training.entropy` for the definition. The range is
    that of the winner: its threshold at both ends, within the observed range and 0.

    Args:
        bins: bins of the searched histogram. Its bins are whole numbers of the counted ones, so
            the observed magnitude takes 2/3 of them or more, and all of them at most.
        levels: number of levels on one side of 0; 128 for 8 bits. At most ``bins``.
        bits, signed, symmetric, granularity, narrow_range, shape, process_group, device: see
            :class:`Observer`. Only PerTensor.

    Raises:
        TypeError, ValueError: see :class:`CountingObserver`; ValueError also if levels is not an
            integer from 2 to bins.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.

    Example:
        >>> observer = EntropyObserver()
        >>> values = torch.randn(10000, generator=torch.Generator().manual_seed(0))
        >>> _ = observer(torch.cat([values, torch.tensor([40.0])]))
        >>> bool(observer.calculate_range()[1] < 10)
        True
    """

    def __init__(
        self,
        bins: int = 2048,
        levels: int = 128,
        **options: Unpack[ObserverOptions],
    ) -> None:
        super().__init__(bins, **options)
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= bins:
            raise ValueError(
                f"EntropyObserver: levels must be an integer from 2 to bins = {bins}, got "
                f"{levels!r}; 128 is usual for 8 bits"
            )
        self.levels = levels

    def calculate_range(self) -> tuple[Tensor, Tensor]:
        """The range of the best threshold; without data the range is (+inf, -inf)."""
        counts, group = entropy_counts(magnitudes(self.counts.cpu())[0], self.bins)
        winner = best_candidate(divergences(counts, self.levels))
        if winner is None:
            return self.min_val, self.max_val
        threshold = widths(self.exponent) * float((winner + self.levels) * group)
        low = torch.maximum(self.min_val, -threshold).clamp(max=0.0)
        return low, torch.minimum(self.max_val, threshold).clamp(min=0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"


def entropy_counts(counts: Tensor, bins: int) -> tuple[Tensor, int]:
    """The counts of ``bins`` bins, and how many of the given bins each of them holds.

    They hold as few of the given bins as possible, so that all values are in one of them.

    Example:
        >>> entropy_counts(torch.tensor([1, 2, 3, 4, 5, 0, 0, 0]), 3)
        (tensor([3, 7, 5]), 2)
    """
    used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 1
    group = -(-used // bins)
    whole = counts.new_zeros(bins * group)
    whole[:used] = counts[:used]
    return whole.view(bins, group).sum(1), group


def divergences(counts: Tensor, levels: int) -> Tensor:
    """The divergence of each candidate ``i = levels .. bins``, float64; NaN without values.

    Sums over the bins of a level are differences of running sums, so that all candidates together
    take O(bins * levels) steps.

    Args:
        counts: int64 ``[bins]``, counts of magnitudes; bin 0 counts at most as much as bin 1.
        levels: number of levels.

    Example:
        >>> divergences(torch.tensor([4, 4, 1, 1]), 2)
        tensor([0.0201, 0.0333, 0.0000], dtype=torch.float64)
    """
    counts = counts.clone()
    counts[0] = torch.minimum(counts[0], counts[1])
    values = counts.double()
    sums, filled = _running(values), _running((values > 0).double())
    information, total = _running(_times_log(values)), sums[-1]
    parts = []
    # Parts of this size stay in the cache, and their memory is reused.
    for candidates, edges in _edges(counts.numel(), levels):
        kept = sums[candidates]
        clipped = total - kept
        last = values[candidates - 1]
        # The count of each level, and the number of bins over which it is spread.
        mass, spread = _at(sums, edges).diff(dim=1), _at(filled, edges).diff(dim=1)
        spread[:, -1] += (last == 0) & (clipped > 0)
        hopeless = (mass[:, -1] == 0) & (clipped > 0)
        # A level without values adds 0, whatever its logarithm is; the one of 0 would be slow.
        logarithm = mass.div(spread.clamp_(min=1.0)).clamp_(min=1e-9).log_()
        mass[:, -1] += clipped  # from here on the counts of P
        own = information[candidates] + _times_log(last + clipped) - _times_log(last)
        cross = mass.mul_(logarithm).sum(1)
        result = (own - cross) / total - total.log() + kept.log()
        parts.append(torch.where(hopeless, float("inf"), result))
    return torch.cat(parts)


def best_candidate(divergence: Tensor) -> int | None:
    """The index of the first candidate that no other one beats by 1e-9; None without values.

    Example:
        >>> best_candidate(torch.tensor([3.0, 0.5, 0.5 - 1e-12], dtype=torch.float64))
        1
    """
    least = divergence.nan_to_num(nan=float("inf")).min()
    if not bool(least.isfinite()):
        return None
    return int((divergence <= least + _TIE).nonzero()[0])


@lru_cache(maxsize=4)
def _edges(bins: int, levels: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of the candidates, with the first bin of each of their levels, and the end."""
    candidates = torch.arange(levels, bins + 1, device="cpu")
    level = torch.arange(levels + 1, device="cpu")
    edges = (candidates[:, None] * level + levels - 1) // levels
    size = max(1, _PART // levels)
    return list(zip(candidates.split(size), edges.split(size), strict=True))


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... elements."""
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))


def _at(values: Tensor, places: Tensor) -> Tensor:
    return values.index_select(0, places.view(-1)).view(places.shape)


def _times_log(values: Tensor) -> Tensor:
    result: Tensor = torch.special.xlogy(values, values)
    return result


__all__ = ["EntropyObserver", "best_candidate", "divergences", "entropy_counts"]
