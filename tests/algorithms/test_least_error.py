"""Scales and zero points of least error, against the scales of ranges and a fine search."""

import math

import pytest
import torch

from torchquant import PerAxis, PerGroup, PerTensor, Weights
from torchquant.algorithms.integer_weight import nearest, rounded
from torchquant.algorithms.least_error import (
    clip_search,
    column_groups,
    least_error_parameters,
    steps_of,
)


def weight_of(outputs=16, inputs=96, seed=0):
    """Normal weights with a few large ones; the last rows are all of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[:, ::29] *= 4
    weight[-3:] = weight[-3:].abs() + 1
    return weight


def hessian_of(inputs=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, inputs, generator=generator) @ torch.randn(
        inputs, 500, generator=generator
    )
    x *= torch.randn(inputs, 1, generator=generator).exp()
    return x @ x.t() / 500


def errors(weight, found, hessian=None):
    """Of each output."""
    change = (weight - found.dequantize()).double()
    if hessian is None:
        return change.square().sum(1)
    wide = hessian.double()
    wide = wide.diag() if wide.dim() == 1 else wide
    return (change @ wide * change).sum(1)


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(32), PerGroup(40)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_output_is_worse_than_with_its_range(bits, symmetric, granularity):
    weight, scheme = weight_of(), Weights(bits, symmetric, granularity=granularity)
    plain = nearest(weight, scheme)
    for hessian in (None, hessian_of().diagonal()):
        found = clip_search(weight, scheme, hessian)
        before, after = errors(weight, plain, hessian), errors(weight, found, hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < {2: 0.8, 3: 0.9, 4: 0.96, 8: 1}[bits] * float(before.sum())
        assert found.scale.shape == plain.scale.shape
        assert (found.zero_point is None) == symmetric
        low, high = scheme.range
        assert low <= int(found.qweight.min()) and int(found.qweight.max()) <= high


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_is_close_to_a_fine_search(bits):
    weight, scheme = weight_of(), Weights(bits)
    best = torch.full((16,), math.inf, dtype=torch.float64)
    full = weight.abs().amax(1) / scheme.range[1]
    for step in range(1, 2001):
        best = torch.minimum(best, errors(weight, rounded(weight, scheme, full * step / 2000)))
    found = errors(weight, clip_search(weight, scheme))
    assert bool((found <= best * 1.05).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_asymmetric_is_close_to_a_fine_search(bits):
    weight, scheme = weight_of(outputs=6), Weights(bits, symmetric=False)
    best = torch.full((6,), math.inf, dtype=torch.float64)
    full = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    low, high = scheme.range
    for zero in range(low, high + 1):
        zeros = torch.full((6,), zero, dtype=torch.int8)
        for step in range(1, 301):
            found = rounded(weight, scheme, full * step / 150, zeros)
            best = torch.minimum(best, errors(weight, found))
    found = errors(weight, clip_search(weight, scheme))
    assert bool((found <= best * 1.15).all())
    assert float(found.sum()) < 1.06 * float(best.sum())


def test_the_diagonal_weighs_the_changes():
    weight, scheme, diagonal = weight_of(), Weights(3), hessian_of().diagonal()
    plain, weighed = clip_search(weight, scheme), clip_search(weight, scheme, diagonal)
    assert errors(weight, weighed, diagonal).sum() < 0.95 * errors(weight, plain, diagonal).sum()
    assert errors(weight, plain).sum() < errors(weight, weighed).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_hessian_lets_errors_cancel(symmetric):
    weight, scheme, hessian = weight_of(), Weights(3, symmetric), hessian_of()
    by_diagonal = clip_search(weight, scheme, hessian.diagonal())
    whole = clip_search(weight, scheme, hessian)
    before, after = (errors(weight, one, hessian) for one in (by_diagonal, whole))
    assert float(after.sum()) < 0.96 * float(before.sum())
    assert bool((after <= before * (1 + 1e-5)).all())
    plain = errors(weight, nearest(weight, scheme), hessian)
    assert bool((after <= plain * (1 + 1e-5)).all())


def test_inputs_stand_for_their_hessian():
    weight, scheme = weight_of(), Weights(3, granularity=PerGroup(40))
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(3))
    found = clip_search(weight, scheme, inputs=x)
    assert torch.equal(found.qweight, clip_search(weight, scheme, x.t() @ x).qweight)


def test_of_a_whole_hessian_groups_see_their_own_part():
    weight, hessian = weight_of(), hessian_of()
    found = clip_search(weight, Weights(3, granularity=PerGroup(40)), hessian)
    for group, part in enumerate(column_groups(96, Weights(granularity=PerGroup(40)))):
        alone = clip_search(weight[:, part], Weights(3), hessian[part, part])
        assert torch.equal(found.qweight[:, part], alone.qweight)
        assert torch.equal(found.scale[:, group], alone.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("hessian", [None, hessian_of()])
def test_one_scale_for_the_whole_tensor(hessian, symmetric):
    weight, scheme = weight_of(), Weights(4, symmetric, granularity=PerTensor())
    found = clip_search(weight, scheme, hessian)
    assert found.scale.shape == (16,) and len(found.scale.unique()) == 1
    before = errors(weight, nearest(weight, scheme), hessian).sum()
    assert float(errors(weight, found, hessian).sum()) < 0.9 * float(before)


def test_weights_on_a_grid_keep_it():
    scheme = Weights(4, symmetric=False, granularity=PerGroup(16))
    integers = torch.randint(-8, 8, (5, 32), generator=torch.Generator().manual_seed(0))
    integers[:, ::16], integers[:, 1::16], integers[:, 2::16] = -8, 7, 2
    weight = (integers - 2) * 0.25
    found = clip_search(weight, scheme)
    assert torch.equal(found.dequantize(), weight)
    assert torch.equal(found.qweight, integers.to(torch.int8))


def test_zeros_and_constant_rows():
    weight = torch.zeros(3, 8)
    weight[1], weight[2] = 0.3, -0.3
    for symmetric in (True, False):
        found = clip_search(weight, Weights(4, symmetric))
        torch.testing.assert_close(found.dequantize(), weight)


def test_importance_of_0_everywhere_changes_nothing():
    weight, scheme = weight_of(), Weights(4, symmetric=False)
    found, plain = clip_search(weight, scheme, torch.zeros(96)), nearest(weight, scheme)
    assert torch.equal(found.qweight, plain.qweight)
    assert torch.equal(found.scale, plain.scale)


def test_many_problems_at_once():
    columns = weight_of().t().contiguous()
    importance = hessian_of().diagonal()
    for one in (None, importance, hessian_of()):
        single = least_error_parameters(columns, Weights(3), one)
        stacked = None if one is None else one.expand(2, *one.shape)
        both = least_error_parameters(columns.expand(2, -1, -1), Weights(3), stacked)
        for alone, together in zip(single, both, strict=True):
            torch.testing.assert_close(together, alone.expand(2, -1), rtol=1e-5, atol=1e-6)


def test_steps_are_integers_minus_zero_points():
    weight, scheme = weight_of(), Weights(4, symmetric=False)
    plain = nearest(weight, scheme)
    zero = plain.zero_point.float()
    steps = steps_of(weight.t(), plain.scale, zero, scheme)
    assert torch.equal((steps + zero).t(), plain.qweight.float())


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (torch.full((2, 3), math.inf), {}, "weight must be finite, got NaN or infinities"),
        (torch.ones(2, 3), {"hessian": torch.ones(2)}, r"must have shape \[3\] or \[3, 3\], got"),
        (torch.ones(2, 3), {"hessian": torch.full((3,), math.nan)}, "hessian must be finite"),
        (torch.ones(2, 3), {"inputs": torch.ones(3)}, r"inputs must have shape \[n, 3\], got \[3"),
        (torch.ones(2, 3), {"inputs": torch.full((1, 3), math.nan)}, "inputs must be finite"),
        (
            torch.ones(2, 3),
            {"hessian": torch.ones(3), "inputs": torch.ones(1, 3)},
            "hessian or inputs must be None, got both",
        ),
    ],
)
def test_refusals(weight, importance, message):
    with pytest.raises(ValueError, match=f"clip_search: .*{message}"):
        clip_search(weight, Weights(4), **importance)
