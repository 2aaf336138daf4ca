"""Percentile, least squared error and entropy: each against a slow version of its definition."""

import math
from fractions import Fraction

import pytest
import torch
from support import floats
from support.calibration_data import DISTRIBUTIONS
from torch import Tensor

from torchquant import functional
from torchquant.observers import EntropyObserver, HistogramObserver, PercentileObserver
from torchquant.training.counts import magnitudes, widths
from torchquant.training.entropy import best_candidate, divergences, entropy_counts
from torchquant.training.squared_error import ErrorSearch

# ---------------------------------------------------------------- percentile


def outer_edge(value: float, width: float) -> float:
    """The edge of the value's bin that is farther from minus infinity."""
    place = math.trunc(value / width)
    return (place + 1 if place >= 0 else place) * width


@pytest.mark.parametrize("data", DISTRIBUTIONS)
@pytest.mark.parametrize("percentile", [51, 90.0, 99.0, 99.9, 99.99, 100])
@pytest.mark.parametrize("symmetric", [False, True])
def test_percentiles_are_those_of_the_sorted_values(
    data: str, percentile: float, symmetric: bool
) -> None:
    x = DISTRIBUTIONS[data]
    observer = PercentileObserver(percentile, 100, symmetric=symmetric)
    observer(x)
    low, high = (float(end) for end in observer.calculate_range())
    width = float(widths(observer.exponent))
    outside = math.floor(x.numel() * (100 - Fraction(str(percentile))) / 100)
    ordered = sorted((x.abs() if symmetric else x).tolist())
    edge = outer_edge(ordered[len(ordered) - 1 - outside], width)
    if symmetric:
        assert high == min(edge, float(x.max()))
        assert low == max(-edge, float(x.min()))
    else:
        assert high == min(edge, float(x.max()))
        assert low == max(-outer_edge(-ordered[outside], width), float(x.min()))
        assert int((x > high).sum()) <= outside and int((x < low).sum()) <= outside
    if percentile == 100:
        assert (low, high) == (float(x.min()), float(x.max()))


# ---------------------------------------------------------------- entropy


def slow_divergence(counts: list[int], levels: int, i: int) -> float:
    """The definition, bin by bin."""
    counts = [min(counts[0], counts[1]), *counts[1:]]
    p = [float(count) for count in counts[:i]]
    p[i - 1] += sum(counts[i:])
    level_of = [j * levels // i for j in range(i)]
    mass, spread = [0.0] * levels, [0] * levels
    for j in range(i):
        mass[level_of[j]] += counts[j]  # without what lies beyond the bins
        spread[level_of[j]] += p[j] != 0
    q = [mass[level_of[j]] / spread[level_of[j]] if p[j] else 0.0 for j in range(i)]
    if not sum(p):
        return math.nan
    divergence = 0.0
    for mine, other in zip(p, q, strict=True):
        if mine:
            if not other:
                return math.inf
            divergence += mine / sum(p) * math.log(mine / sum(p) / (other / sum(q)))
    return divergence


def check_divergences(counts: Tensor, levels: int) -> Tensor:
    got = divergences(counts, levels)
    slow = [slow_divergence(counts.tolist(), levels, i) for i in range(levels, counts.numel() + 1)]
    expected = torch.tensor(slow, dtype=torch.float64)
    assert torch.equal(got.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=0, atol=1e-12)
    assert best_candidate(got) == best_candidate(expected)
    return got


@pytest.mark.parametrize("data", DISTRIBUTIONS)
@pytest.mark.parametrize(("bins", "levels"), [(128, 128), (200, 16), (257, 100)])
def test_every_candidate_is_the_definition_bin_for_bin(data: str, bins: int, levels: int) -> None:
    x = DISTRIBUTIONS[data]
    observer = EntropyObserver(bins, levels)
    observer(x)
    counts, group = entropy_counts(magnitudes(observer.counts)[0], bins)
    width = float(widths(observer.exponent)) * group
    expected = [0] * bins
    for value in x.abs().tolist():
        expected[int(value / width)] += 1
    assert counts.tolist() == expected
    used = max(index for index, count in enumerate(expected) if count) + 1
    assert used > bins // 2 or float(x.abs().max()) < 2.0**-80
    divergence = check_divergences(counts, levels)
    winner = best_candidate(divergence)
    low, high = (float(end) for end in observer.calculate_range())
    if winner is None:  # all values are in the first bin
        assert (low, high) == (float(x.min()), float(x.max()))
    else:
        threshold = (winner + levels) * width
        assert high == max(min(float(x.max()), threshold), 0.0)
        assert low == min(max(float(x.min()), -threshold), 0.0)


def test_the_usual_size_is_the_definition() -> None:
    """2048 bins, 128 levels: every 17th candidate, and the winner among all of them."""
    observer = EntropyObserver()
    observer(DISTRIBUTIONS["outliers"])
    counts, _ = entropy_counts(magnitudes(observer.counts)[0], 2048)
    got = divergences(counts, 128)
    assert got.numel() == 2048 - 128 + 1
    for index in [*range(0, got.numel(), 17), got.numel() - 1]:
        expected = slow_divergence(counts.tolist(), 128, 128 + index)
        assert got[index] == expected or abs(got[index] - expected) < 1e-12
    assert observer.calculate_range()[1] < 30  # the outliers at 60 are clipped


@pytest.mark.parametrize("seed", range(6))
def test_sparse_histograms_with_empty_levels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 100, (96,), generator=generator)
    counts[torch.rand(96, generator=generator) < 0.3 * (seed % 4)] = 0
    counts[-1] = seed
    got = check_divergences(counts, 8)
    # Candidate i ends with an empty level, and values lie beyond it.
    counts[20:30] = 0
    got = check_divergences(counts, 24)
    assert not got[-1].isinf()


def test_clipped_values_that_no_level_represents_rule_a_candidate_out() -> None:
    counts = torch.tensor([5, 5, 0, 0, 5, 5, 0, 0])
    got = check_divergences(counts, 4)
    assert got.isinf().tolist() == [True, False, False, False, False]


def test_ties_go_to_the_least_threshold() -> None:
    # Candidates that clip nothing and keep each filled bin in a level of its own lose nothing.
    counts = torch.tensor([7, 7, 7, 7, 0, 0, 0, 0, 0, 0])
    got = check_divergences(counts, 4)
    assert got[0].abs() < 1e-12 and got[4].abs() < 1e-12  # 4 bins, and 8 bins in pairs
    assert best_candidate(got) == 0
    nearly = torch.tensor([0.5, 0.3 + 1e-10, 0.3, 0.2999], dtype=torch.float64)
    assert best_candidate(nearly) == 3
    assert best_candidate(nearly[:3]) == 1


def test_the_zero_bin_counts_at_most_as_much_as_its_neighbour() -> None:
    x = floats(20_000, seed=3)
    with_zeros = torch.cat([x, torch.zeros(1_000_000)])
    plain, relu = EntropyObserver(), EntropyObserver()
    plain(x[x != 0]), relu(with_zeros)
    few = torch.tensor([3, 9, 4, 4, 2, 1])
    assert torch.equal(
        divergences(torch.tensor([900, 9, 4, 4, 2, 1]), 2),
        divergences(torch.tensor([9, 9, 4, 4, 2, 1]), 2),
    )
    assert not torch.equal(divergences(few, 2), divergences(torch.tensor([9, 9, 4, 4, 2, 1]), 2))
    # A million zeros change the threshold no more than a few bins do.
    ends = [float(observer.calculate_range()[1]) for observer in (plain, relu)]
    assert abs(ends[0] - ends[1]) <= 0.05 * max(ends)


# ---------------------------------------------------------------- least squared error


@pytest.mark.parametrize("data", ["normal", "negative", "far from 0", "outliers", "few"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_those_of_quantizing_the_bins(data: str, symmetric: bool, bits: int) -> None:
    x = DISTRIBUTIONS[data]
    observer = HistogramObserver(50, bits=bits, symmetric=symmetric)
    observer(x)
    counts, width = observer.counts[0], float(widths(observer.exponent))
    middle = counts.numel() // 2
    place = torch.arange(-middle, middle + 1).double()
    centers = (place + place.sign() / 2) * width
    search = ErrorSearch(counts, width, observer.qmin, observer.qmax, symmetric)

    def direct(low: Tensor, high: Tensor) -> float:
        scale, zero_point = functional.qparams_from_range(
            low, high, qmin=observer.qmin, qmax=observer.qmax, symmetric=symmetric
        )
        s, z = scale.double(), zero_point.double()
        q = (torch.round(centers / s) + z).clamp(observer.qmin, observer.qmax)
        return float((counts * (centers - (q - z) * s).square()).sum())

    ends = [float(x.min()), float(x.max())]
    fractions = [1.0, 0.7, 0.31, 0.05, 0.003]
    low = torch.tensor([ends[0] * f for f in fractions for _ in fractions])
    high = torch.tensor([ends[1] * f for _ in fractions for f in fractions])
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    errors = search.errors(low, high)
    scale = float((counts * centers.square()).sum())
    for index in range(low.numel()):
        expected = direct(low[index : index + 1], high[index : index + 1])
        assert abs(float(errors[index]) - expected) <= 1e-9 * scale
    # The choice is at least as good as all of these, and as the observed range.
    best = direct(*observer.calculate_range())
    assert best <= float(errors.min()) + 1e-9 * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_range_is_much_better(symmetric: bool, bits: int) -> None:
    """A dense search on the values themselves finds no range with 1 % less error."""
    x = DISTRIBUTIONS["outliers"].relu() + 0.0
    observer = HistogramObserver(bits=bits, symmetric=symmetric)
    observer(x)

    def error(scale: Tensor, zero_point: Tensor) -> float:
        rounded = functional.fake_quantize(
            x, scale, zero_point, qmin=observer.qmin, qmax=observer.qmax
        )
        return float((rounded.double() - x.double()).square().sum())

    chosen = error(*observer.calculate_qparams())
    for step in range(1, 300):
        other = functional.qparams_from_range(
            0.0,
            float(x.max()) * step / 300,
            qmin=observer.qmin,
            qmax=observer.qmax,
            symmetric=symmetric,
        )
        assert chosen <= 1.01 * error(*other)


def test_the_observed_range_wins_ties_and_one_value_is_kept() -> None:
    observer = HistogramObserver()
    observer(torch.full((10,), 2.5))
    assert [float(end) for end in observer.calculate_range()] == [2.5, 2.5]
    scale, zero_point = observer.calculate_qparams()
    value = functional.fake_quantize(torch.tensor([2.5]), scale, zero_point, qmin=-128, qmax=127)
    assert value.item() == 2.5
    tiny = HistogramObserver()
    tiny(torch.tensor([2.0**-120, -(2.0**-121)]))  # all values are in bin 0
    assert [float(end) for end in tiny.calculate_range()] == [-(2.0**-121), 2.0**-120]
