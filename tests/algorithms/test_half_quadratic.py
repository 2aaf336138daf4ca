"""Half-quadratic scales: the shrinkage formula, and the norm that they minimize."""

import math

import pytest
import torch

from torchquant import PerAxis, PerGroup, PerTensor, Weights
from torchquant.algorithms.half_quadratic import hqq, shrink
from torchquant.algorithms.integer_weight import nearest
from torchquant.algorithms.least_error import clip_search


def weight_of(outputs=16, inputs=96, seed=0):
    """Normal weights with a few large ones; the last rows are all of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[:, ::29] *= 4
    weight[-3:] = weight[-3:].abs() + 1
    return weight


def norms(weight, found, norm=0.7):
    return (weight - found.dequantize()).double().abs().pow(norm).sum(1)


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32), PerGroup(40)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_output_has_a_greater_norm_than_with_its_range(bits, symmetric, granularity):
    weight, scheme = weight_of(), Weights(bits, symmetric, granularity=granularity)
    found, plain = hqq(weight, scheme), nearest(weight, scheme)
    before, after = norms(weight, plain), norms(weight, found)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < {2: 0.9, 3: 0.97, 4: 1, 8: 1}[bits] * float(before.sum())
    assert (found.zero_point is None) == symmetric
    low, high = scheme.range
    assert low <= int(found.qweight.min()) and int(found.qweight.max()) <= high


def test_forgives_the_few_large_errors_that_squares_do_not():
    weight, scheme = weight_of(), Weights(3, symmetric=False)
    by_norm, by_squares = hqq(weight, scheme), clip_search(weight, scheme)
    assert norms(weight, by_norm).sum() < norms(weight, by_squares).sum()
    assert norms(weight, by_norm, 2).sum() > norms(weight, by_squares, 2).sum()


def test_shrinkage_is_the_least_point_of_its_problem():
    """``shrink`` is close to the e that minimizes ``|e|^p + beta / 2 (e - x)^2``, or 0."""
    places = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for beta in (2.0, 10.0, 100.0):
        for x in (-2.0, -0.9, 0.01, 0.5, 1.5):
            cost = places.abs() + beta / 2 * (places - x).square()
            best = places[cost.argmin()]
            assert float(shrink(torch.tensor(x), 1.0, beta)) == pytest.approx(float(best), abs=2e-4)
    assert shrink(torch.zeros(3), 0.7, 10.0).tolist() == [0, 0, 0]
    assert shrink(torch.tensor([0.05]), 0.7, 10.0).tolist() == [0]


def test_the_size_of_the_weights_does_not_matter():
    weight, scheme = weight_of(), Weights(3, symmetric=False, granularity=PerGroup(32))
    plain, small = hqq(weight, scheme), hqq(weight / 1024, scheme)
    assert torch.equal(plain.qweight, small.qweight)
    assert torch.equal(plain.scale, small.scale * 1024)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_the_whole_tensor(symmetric):
    weight, scheme = weight_of(), Weights(3, symmetric, granularity=PerTensor())
    found = hqq(weight, scheme)
    assert found.scale.shape == (16,) and len(found.scale.unique()) == 1
    assert norms(weight, found).sum() < 0.97 * norms(weight, nearest(weight, scheme)).sum()


def test_no_iteration_is_rounding():
    weight, scheme = weight_of(), Weights(4, symmetric=False)
    found, plain = hqq(weight, scheme, iterations=0), nearest(weight, scheme)
    assert torch.equal(found.qweight, plain.qweight)
    assert torch.equal(found.scale, plain.scale)
    assert torch.equal(found.zero_point, plain.zero_point)


def test_zeros():
    assert not bool(hqq(torch.zeros(3, 8), Weights(4, symmetric=False)).dequantize().any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 0}, "norm must be more than 0 and at most 1, got 0"),
        ({"norm": 1.5}, "norm must be more than 0 and at most 1, got 1.5"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ({"growth": math.inf}, "growth must be a positive finite number, got inf"),
        ({"iterations": -1}, "iterations must be an integer of at least 0, got -1"),
        ({"iterations": 2.0}, "iterations must be an integer of at least 0, got 2.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"hqq: {message}"):
        hqq(weight_of(), Weights(4), **options)


def test_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="hqq: weight must be finite"):
        hqq(torch.full((2, 2), math.nan), Weights(4))
