"""Learned rounding: the error that moments measure, the gradient, the integers that come out."""

import itertools

import pytest
import torch

from torchquant.algorithms.rounding import (
    Moments,
    Settings,
    _Choices,
    _slope,
    adaptive_rounding,
    least_error_scale,
    rounding_error,
)
from torchquant.scheme import quant_range


def problem(groups=1, outputs=8, terms=24, samples=300, bits=4, seed=0):
    """Correlated inputs of a positive mean, as after ReLU; inputs of the quantized model differ."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, terms, terms, generator=generator)
    x = (mix @ torch.randn(groups, terms, samples, generator=generator)).relu()
    y = x + 0.002 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(groups, outputs, terms, generator=generator)
    qmin, qmax = quant_range(bits)
    return weight, weight.abs().amax(-1) / qmax, x, y, {"qmin": qmin, "qmax": qmax}


def nearest_of(weight, scale, limits):
    grid = scale.unsqueeze(-1)
    return (weight / grid).round().clamp(limits["qmin"], limits["qmax"]) * grid


def true_error(weight, rounded, x, y):
    return (rounded.double() @ y.double() - weight.double() @ x.double()).square().sum(-1)


def test_moments_measure_the_error_of_the_outputs():
    weight, scale, x, y, limits = problem(groups=2)
    rounded = nearest_of(weight, scale, limits)
    whole = (weight.double() @ x.double()).square().sum(-1)
    measured = rounding_error(weight, rounded, Moments.of(y, x)) + whole
    torch.testing.assert_close(measured, true_error(weight, rounded, x, y), rtol=1e-3, atol=1e-2)


def test_moments_of_parts_add_up():
    _, _, x, y, _ = problem()
    whole = Moments.of(y, x)
    parts = Moments.of(y[..., :100], x[..., :100]) + Moments.of(y[..., 100:], x[..., 100:])
    torch.testing.assert_close(parts.quantized, whole.quantized)
    torch.testing.assert_close(parts.mixed, whole.mixed)
    assert not torch.equal(whole.mixed, whole.mixed.transpose(1, 2)), "x and x' are told apart"


@pytest.mark.parametrize("exponent", [None, 2.0, 7.5])
def test_gradient_is_that_of_the_objective(exponent):
    weight, scale, x, y, limits = problem(groups=2, outputs=3, terms=5, bits=3)
    weight, scale, x, y = (t.double() for t in (weight, scale, x, y))
    moments = Moments.of(y, x)
    choices = _Choices.of(weight, scale.unsqueeze(-1), **limits)
    generator = torch.Generator().manual_seed(1)
    variable = 3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    variable.requires_grad_(True)
    part = (variable.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    rounded = (choices.down + (choices.up - choices.down) * part) * choices.grid
    objective = rounding_error(weight, rounded, moments).sum() / 7
    if exponent is not None:
        objective = objective + 0.3 * (1 - (2 * part - 1).abs().pow(exponent)).sum()
    objective.backward()
    assert 0 < (variable.grad == 0).sum() < variable.numel(), "some are cut off, some are not"
    slope = _slope(choices, moments, 7.0, variable.detach(), exponent, 0.3)
    torch.testing.assert_close(slope, variable.grad)


def test_exponent_falls_from_the_first_to_the_last():
    settings = Settings(beta=(20.0, 2.0))
    found = [settings.exponent(progress / 10) for progress in range(11)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (20.0, 2.0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_next_to_the_weight_and_no_output_is_worse(bits):
    weight, scale, x, y, limits = problem(groups=2, bits=bits)
    moments = Moments.of(y, x)
    found = adaptive_rounding(weight, scale, moments, **limits, iterations=100)
    assert found.dtype == torch.int8
    assert limits["qmin"] <= found.min()
    assert found.max() <= limits["qmax"]
    assert ((weight / scale.unsqueeze(-1) - found).abs() < 1 + 1e-6).all()
    learned = true_error(weight, found * scale.unsqueeze(-1), x, y)
    nearest = true_error(weight, nearest_of(weight, scale, limits), x, y)
    assert (learned <= nearest * (1 + 1e-5)).all()
    assert learned.sum() < 0.7 * nearest.sum()


def test_learning_finds_almost_the_best_of_all_roundings():
    weight, scale, x, y, limits = problem(outputs=30, terms=8)
    moments, grid = Moments.of(y, x), scale.unsqueeze(-1)
    down = (weight / grid).floor()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    errors = torch.stack(
        [
            rounding_error(weight, (down + one).clamp(-8, 7) * grid, moments).squeeze(0)
            for one in every
        ]
    )
    whole = (weight @ x).square().sum(-1).squeeze(0)
    best = (errors.amin(0) + whole).sum()
    learned = adaptive_rounding(weight, scale, moments, **limits)
    reached = (rounding_error(weight, learned * grid, moments).squeeze(0) + whole).sum()
    nearest = rounding_error(weight, nearest_of(weight, scale, limits), moments).squeeze(0) + whole
    assert best < 0.8 * nearest.sum()
    assert reached < 1.1 * best


def test_learning_finds_more_than_changes_of_single_weights():
    weight, scale, x, y, limits = problem(outputs=40, terms=60)
    moments, grid = Moments.of(y, x), scale.unsqueeze(-1)
    learned, single = (
        adaptive_rounding(weight, scale, moments, **limits, iterations=count) for count in (300, 0)
    )
    errors = [true_error(weight, integers * grid, x, y).sum() for integers in (learned, single)]
    assert errors[0] < errors[1]


def test_units_of_inputs_and_weights_do_not_matter():
    weight, scale, x, y, limits = problem()
    usual = adaptive_rounding(weight, scale, Moments.of(y, x), **limits, iterations=60)
    large = Moments.of(1024 * y, 1024 * x)
    assert torch.equal(usual, adaptive_rounding(weight, scale, large, **limits, iterations=60))
    small = adaptive_rounding(weight / 256, scale / 256, Moments.of(y, x), **limits, iterations=60)
    assert (usual != small).float().mean() < 0.02


def test_weights_on_the_grid_keep_their_integers():
    _, _, x, _, limits = problem()
    integers = torch.randint(-8, 8, (1, 4, 24), generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([[0.5, 0.25, 3.0, 0.125]])
    weight = integers * scale.unsqueeze(-1)
    found = adaptive_rounding(weight, scale, Moments.of(x, x), **limits, iterations=20)
    assert torch.equal(found, integers.to(torch.int8))


def test_inputs_of_zeros_give_the_nearest_integers():
    weight, scale, _, _, limits = problem()
    zeros = torch.zeros(1, 24, 10)
    found = adaptive_rounding(weight, scale, Moments.of(zeros, zeros), **limits, iterations=20)
    expected = (weight / scale.unsqueeze(-1)).round().clamp(-8, 7)
    assert torch.equal(found, expected.to(torch.int8))


def test_weights_outside_of_the_range_are_cut_off():
    weight, scale, x, y, limits = problem()
    found = adaptive_rounding(weight, scale / 4, Moments.of(y, x), **limits, iterations=50)
    outside = (weight / (scale / 4).unsqueeze(-1)).abs() > 9
    assert outside.any()
    assert set(found[outside].tolist()) == {-8, 7}


def test_groups_are_independent():
    weight, scale, x, y, limits = problem(groups=3)
    together = adaptive_rounding(weight, scale, Moments.of(y, x), **limits, iterations=0)
    for group in range(3):
        one = slice(group, group + 1)
        moments = Moments.of(y[one], x[one])
        alone = adaptive_rounding(weight[one], scale[one], moments, **limits, iterations=0)
        assert torch.equal(alone, together[one])


# Scales


def test_scale_with_least_error_is_the_best_candidate():
    weight, scale, x, y, limits = problem(bits=3)
    moments = Moments.of(y, x)
    found = least_error_scale(weight, scale, moments, **limits, steps=20)
    assert (found < scale).any()
    candidates = [scale * (1 - 0.7 * step / 20) for step in range(20)]
    errors = torch.stack(
        [true_error(weight, nearest_of(weight, one, limits), x, y) for one in candidates]
    )
    reached = true_error(weight, nearest_of(weight, found, limits), x, y)
    torch.testing.assert_close(reached, errors.amin(0), rtol=1e-4, atol=1e-4)


def test_shared_scales_change_by_one_factor():
    weight, scale, x, y, limits = problem(bits=2)
    found = least_error_scale(weight, scale, Moments.of(y, x), **limits, shared=True)
    factors = found / scale
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert factors[0, 0] < 1
