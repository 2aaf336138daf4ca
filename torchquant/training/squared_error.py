"""HistogramObserver: the range of least squared error of quantization, found on the counts.

The error of a candidate is the sum over all bins of ``count * (x - dequantize(quantize(x)))^2``,
with x the middle of the bin, and 0 for bin 0. Running sums over the bins give it in O(levels)
steps. The candidates are fractions of the observed ends: first a grid of powers of 1/2, then finer
grids around the best candidate. The observed range itself is a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional.qparams import qparams_from_range
from torchquant.training.counting_observer import CountingObserver
from torchquant.training.counts import widths

_HALVINGS = 10  # candidates per end in the first grid; each is half of the one before
# The finer grids: the part of a halving between candidates, and how many to both sides.
_FINER = ((1 / 4, 3), (1 / 32, 4))
_PART = 1 << 15  # levels of candidates at a time


class HistogramObserver(CountingObserver):
    """The range of least squared error of quantization; the default of calibration.

    See :mod:`torchquant.training.squared_error` for the search. The error is the one of the scale
    and the integer zero point that :meth:`calculate_qparams` gives, values outside saturated.

    Arguments, state and errors are those of :class:`CountingObserver`. Only PerTensor.

    Example:
        >>> values = torch.randn(10000, generator=torch.Generator().manual_seed(0))
        >>> observer = HistogramObserver(bits=4)
        >>> _ = observer(torch.cat([values, torch.tensor([40.0])]))
        >>> bool(observer.calculate_range()[1] < 10)
        True
    """

    def calculate_range(self) -> tuple[Tensor, Tensor]:
        """The range of least error; without data the range is (+inf, -inf)."""
        least, greatest = self.min_val.cpu(), self.max_val.cpu()
        if not bool(least <= greatest) or bool(least == greatest):
            return self.min_val, self.max_val
        search = ErrorSearch(
            self.counts[0].cpu(),
            float(widths(self.exponent.cpu())),
            self.qmin,
            self.qmax,
            self.symmetric,
        )
        low, high = search.best(float(least), float(greatest))
        device = self.min_val.device
        return torch.tensor([low], device=device), torch.tensor([high], device=device)


class ErrorSearch:
    """The squared errors of ranges on a histogram.

    Args:
        counts: int64 ``[2 N - 1]``, as :mod:`torchquant.training.counts` describes them.
        width: the width of a bin.
        qmin, qmax, symmetric: see :func:`torchquant.functional.qparams_from_range`.

    Example:
        >>> search = ErrorSearch(torch.tensor([0, 0, 1, 1, 1]), 0.5, 0, 3, False)
        >>> search.errors(torch.tensor([0.0]), torch.tensor([1.5]))
        tensor([0.1250], dtype=torch.float64)
    """

    def __init__(self, counts: Tensor, width: float, qmin: int, qmax: int, symmetric: bool) -> None:
        self.qmin, self.qmax, self.symmetric = qmin, qmax, symmetric
        self.width, self.middle = width, counts.numel() // 2
        place = torch.arange(-self.middle, self.middle + 1, dtype=torch.float64, device="cpu")
        centers = (place + place.sign() / 2) * width
        values = counts.double()
        self.square = (values * centers.square()).sum()
        # The number and the sum of the values in the first 0, 1, ... bins.
        self.count = torch.nn.functional.pad(values.cumsum(0), (1, 0))
        self.total = torch.nn.functional.pad((values * centers).cumsum(0), (1, 0))
        steps = torch.arange(qmin, qmax, dtype=torch.float64, device="cpu")
        self.steps = steps + 0.5

    def best(self, least: float, greatest: float) -> tuple[float, float]:
        """The ends of least error, in the observed range widened to contain 0.

        Of equal errors the first one found wins; the observed range comes first.
        """
        if self.square == 0:  # all values are in bin 0
            return least, greatest
        ends = torch.tensor([min(least, 0.0), max(greatest, 0.0)], dtype=torch.float64)
        # In a symmetric range the larger magnitude decides alone.
        moving = torch.tensor([True, False]) if self.symmetric else ends != 0
        first = torch.arange(_HALVINGS, dtype=torch.float64, device="cpu")
        best = self._choose(ends, _grid(first, moving))
        for step, around in _FINER:
            steps = torch.arange(-around, around + 1, dtype=torch.float64, device="cpu") * step
            # The best candidate comes first, so that it wins ties.
            nearby = torch.cat([best[None], best + _grid(steps, moving)]).clamp(min=0.0)
            best = self._choose(ends, nearby)
        low, high = self._ends(ends, best[None])
        return float(low), float(high)

    def _choose(self, ends: Tensor, halvings: Tensor) -> Tensor:
        low, high = self._ends(ends, halvings)
        # Parts of this size stay in the cache, and their memory is reused.
        size = max(1, _PART // self.steps.numel())
        parts = zip(low.split(size), high.split(size), strict=True)
        return halvings[torch.cat([self.errors(*part) for part in parts]).argmin()]

    def _ends(self, ends: Tensor, halvings: Tensor) -> tuple[Tensor, Tensor]:
        """float32 ends; ``halvings`` ``[candidates, 2]`` says how often each end is halved."""
        if self.symmetric:
            limit = ends.abs().max() * torch.exp2(-halvings[:, 0])
            low, high = torch.maximum(ends[0], -limit), torch.minimum(ends[1], limit)
            return low.float(), high.float()
        scaled = ends * torch.exp2(-halvings)
        return scaled[:, 0].float(), scaled[:, 1].float()

    def errors(self, low: Tensor, high: Tensor) -> Tensor:
        """The squared error of each range, float64.

        With the levels ``v_k``, the edges ``m_k`` between them and the scale s, the sums over the
        levels of ``v_k`` and ``v_k^2`` become sums over the edges, because
        ``v_(k+1) - v_k = s`` and ``v_(k+1)^2 - v_k^2 = 2 s m_k``.
        """
        scale, zero_point = qparams_from_range(
            low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric
        )
        s, z = scale.double(), zero_point.double()
        edges = (self.steps - z[:, None]) * s[:, None]
        # The number of bins whose middle is below the edge; bin 0 has the middle 0.
        place = edges / self.width
        bins = torch.nn.functional.softshrink(place, 0.5).ceil_()
        bins += (bins == 0) & (place > 0)
        bins = bins.add_(self.middle).clamp_(0, 2 * self.middle + 1).long().view(-1)
        below = self.total.index_select(0, bins).view(edges.shape)
        below -= self.count.index_select(0, bins).view(edges.shape).mul_(edges)
        top = (self.qmax - z) * s
        errors: Tensor = self.square - 2 * top * self.total[-1] + top.square() * self.count[-1]
        return errors.add_(2 * s * below.sum(1))


def _grid(steps: Tensor, moving: Tensor) -> Tensor:
    """Pairs of steps for the two ends; an end that does not move has the step 0."""
    still = torch.zeros(1, dtype=torch.float64, device="cpu")
    low, high = (steps if bool(moves) else still for moves in moving)
    return torch.cartesian_prod(low, high).view(-1, 2)


__all__ = ["ErrorSearch", "HistogramObserver"]
