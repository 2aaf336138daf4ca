"""GPTQ: the algorithm in float64 as an oracle, known mistakes, and bad Hessians."""

import math

import pytest
import torch
from support.gptq_oracle import authors_parameters, gptq_oracle, layer_error, problem

from torchquant import PerAxis, PerGroup, PerTensor, Weights
from torchquant.algorithms.gptq_problem import cholesky_of_inverse
from torchquant.algorithms.gptq_rounding import gptq
from torchquant.algorithms.integer_weight import nearest

PAPER = {"sweeps": 0, "search_clip": False}  # the algorithm alone


def part(bits=4, symmetric=True, group_size=None):
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return Weights(bits, symmetric, granularity=granularity)


def row_errors(weight, found, hessian):
    change = (weight - found.dequantize()).double()
    return (change @ hessian.double() * change).sum(1)


# ---------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("group_size", [None, 8, 24, 32, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_algorithm_in_float64(bits, symmetric, group_size):
    weight, hessian = problem()
    integers, scale, zero, values = gptq_oracle(
        weight, hessian, bits, group_size, symmetric=symmetric
    )
    result = gptq(weight, hessian, part(bits, symmetric, group_size), **PAPER)
    found = result.integers
    plain = row_errors(weight, nearest(weight, part(bits, symmetric, group_size)), hessian)
    change = values - weight.double()
    better = (change @ hessian.double() * change).sum(1) < plain
    assert better.sum() >= 23, "rounding is better for one output at most"
    assert torch.equal(found.qweight.double()[better], integers[better])
    scale, zero = (tensor.view(found.scale.shape)[better] for tensor in (scale, zero))
    torch.testing.assert_close(found.scale.double()[better], scale, rtol=1e-4, atol=0)
    if not symmetric:
        assert torch.equal(found.zero_point.double()[better], zero)
    assert result.error == pytest.approx(layer_error(weight, found.dequantize(), hessian), rel=1e-4)
    assert (result.damping, result.dead_columns, result.fell_back) == (0.01, 0, False)


FAULTS = (
    "no division by the diagonal",
    "inverse instead of its factor",
    "lower factor",
    "factor of the Hessian",
    "stale weights",
    "no damping",
    "damping of 1",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_tells_known_faults(fault):
    weight, hessian = problem()
    right = gptq(weight, hessian, part(3), **PAPER).integers
    wrong = gptq_oracle(weight, hessian, 3, fault=fault)[0]
    assert (right.qweight.double() != wrong).double().mean() > 0.002


@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_groups_have_scales_of_their_current_weights(group_size):
    """The scales of the authors' program are stale where a group begins inside of a block."""
    weight, hessian = problem()
    current = gptq_oracle(weight, hessian, 4, group_size)[1]
    stale = gptq_oracle(weight, hessian, 4, group_size, stale=True)[1]
    found = gptq(weight, hessian, part(4, group_size=group_size), **PAPER).integers.scale.double()
    torch.testing.assert_close(found, current, rtol=1e-4, atol=0)
    assert (stale / found - 1).abs().max() > 0.05


@pytest.mark.parametrize("group_size", [None, 8, 24, 48])
@pytest.mark.parametrize("block_size", [1, 10, 24, 33, 64])
def test_blocks_change_nothing(block_size, group_size):
    weight, hessian = problem()
    whole = gptq(weight, hessian, part(4, group_size=group_size), block_size=1000, **PAPER)
    found = gptq(weight, hessian, part(4, group_size=group_size), block_size=block_size, **PAPER)
    assert torch.equal(found.integers.qweight, whole.integers.qweight)
    torch.testing.assert_close(found.integers.scale, whole.integers.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 24])
def test_order_of_activations_keeps_the_layout(group_size, symmetric):
    weight, hessian = problem()
    order = hessian.diagonal().argsort(descending=True)
    integers, scale, _, _ = gptq_oracle(
        weight, hessian, 4, group_size, symmetric=symmetric, order=order
    )
    scheme = part(4, symmetric, group_size)
    found = gptq(weight, hessian, scheme, order="activations", **PAPER).integers
    assert torch.equal(found.qweight.double(), integers)
    torch.testing.assert_close(found.scale.double().view(scale.shape), scale, rtol=1e-4, atol=0)
    plain = nearest(weight, scheme)
    assert torch.equal(found.scale, plain.scale), "static: the scales of the weight at the start"


def test_static_groups_in_the_given_order():
    weight, hessian = problem()
    scheme = part(4, group_size=16)
    given = torch.arange(80)
    found = gptq(weight, hessian, scheme, static_groups=True, **PAPER).integers
    assert torch.equal(found.qweight.double(), gptq_oracle(weight, hessian, 4, 16, order=given)[0])
    assert torch.equal(found.scale, nearest(weight, scheme).scale)


def test_order_of_activations_does_not_depend_on_the_order_of_the_inputs():
    weight, hessian = problem()
    place = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    plain = gptq(weight, hessian, part(3), order="activations", sweeps=0).integers
    other = gptq(
        weight[:, place], hessian[place][:, place], part(3), order="activations", sweeps=0
    ).integers
    assert torch.equal(other.qweight, plain.qweight[:, place])
    torch.testing.assert_close(other.scale, plain.scale)


def test_factor_of_the_inverse():
    hessian = problem()[1].double()
    hessian = hessian + hessian.t()
    factor, failed = cholesky_of_inverse(hessian[None])
    wanted = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    assert failed.tolist() == [0]
    torch.testing.assert_close(factor[0], wanted, rtol=1e-6, atol=1e-8)
    assert torch.equal(factor[0], factor[0].triu())


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e6, 1e20])
def test_size_of_the_hessian_does_not_matter(factor):
    weight, hessian = problem()
    plain = gptq(weight, hessian, part(3, group_size=32))
    scaled = gptq(weight, hessian.double() * factor, part(3, group_size=32))
    same = scaled.integers.qweight == plain.integers.qweight
    assert same.double().mean() > 0.999
    assert scaled.error == pytest.approx(plain.error * factor, rel=1e-2)


# ---------------------------------------------------------------- what it gains


@pytest.mark.parametrize("group_size", [None, 128, 64, 32])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_error_is_not_above_that_of_the_authors(bits, group_size):
    for seed in range(3):
        weight, hessian = problem(terms=256, samples=2000, seed=seed)
        result = gptq(weight, hessian, part(bits, group_size=group_size))
        for parameters in (None, authors_parameters):
            options = {} if parameters is None else {"parameters": parameters}
            theirs = gptq_oracle(weight, hessian, bits, group_size, stale=True, **options)
            assert result.error < layer_error(weight, theirs[3], hessian)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerGroup(16)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search_clip", [True, False])
def test_no_output_is_worse_than_rounded(search_clip, symmetric, granularity):
    weight, hessian = problem()
    weight[:3] = weight[:3].round()  # rounding has no error there
    weight[:3, 0] = 7
    scheme = Weights(4, symmetric, granularity=granularity)
    plain = nearest(weight, scheme)
    result = gptq(weight, hessian, scheme, search_clip=search_clip)
    before, after = (row_errors(weight, one, hessian) for one in (plain, result.integers))
    assert result.error == pytest.approx(float(after.sum()), rel=1e-4)
    assert result.nearest_error == pytest.approx(float(before.sum()), rel=1e-4)
    assert result.error < 0.8 * result.nearest_error
    if granularity != PerTensor():
        assert bool((after <= before * (1 + 1e-5)).all())
    low, high = scheme.range
    assert low <= int(result.integers.qweight.min()) and int(result.integers.qweight.max()) <= high


def test_one_scale_for_all_outputs():
    weight, hessian = problem()
    on_grid = weight.clone()  # rounding alone is best for half of the outputs
    on_grid[:12] = (weight[:12] * 2).round().clamp(-7, 7)
    on_grid[0, 0] = 7
    for symmetric in (True, False):
        scheme = Weights(4, symmetric, granularity=PerTensor())
        for options in ({}, {"search_clip": True}, {"order": "activations"}):
            for best in (weight, on_grid):
                found = gptq(best, hessian, scheme, **options).integers
                assert found.scale.shape == (24,) and len(found.scale.unique()) == 1


def test_half_types_and_inputs_stay_as_they_are():
    weight, hessian = problem()
    half = weight.bfloat16()
    kept = half.clone(), hessian.clone()
    found = gptq(half, hessian, part()).integers
    assert torch.equal(found.qweight, gptq(half.float(), hessian, part()).integers.qweight)
    assert torch.equal(half, kept[0]) and torch.equal(hessian, kept[1])


# ---------------------------------------------------------------- convolutions


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(16)])
@pytest.mark.parametrize("order", ["given", "activations"])
def test_groups_of_a_convolution_are_problems_of_their_own(order, granularity):
    pairs = [problem(outputs=6, terms=40, seed=seed) for seed in range(3)]
    scheme = Weights(4, granularity=granularity)
    together = gptq(
        torch.cat([weight for weight, _ in pairs]),
        torch.stack([hessian for _, hessian in pairs]),
        scheme,
        order=order,
    )
    alone = [gptq(*pair, scheme, order=order) for pair in pairs]
    parts = torch.cat([one.integers.qweight for one in alone])
    assert torch.equal(together.integers.qweight, parts)
    assert together.error == pytest.approx(sum(one.error for one in alone), rel=1e-5)


def test_depthwise_with_a_failed_and_a_dead_channel():
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 9, 50, generator=torch.Generator().manual_seed(1))
    hessian = 2 / 50 * x @ x.transpose(1, 2)
    hessian[1, 2, 2] = math.nan
    hessian[2] = 0
    hessian[3, 4] = hessian[3, :, 4] = 0
    result = gptq(weight, hessian, part(3))
    plain = nearest(weight, part(3))
    rows = result.integers.qweight.ne(plain.qweight).any(1)
    assert not rows[1] and not rows[2]
    assert result.fell_back and result.dead_columns == 1
    assert result.integers.qweight[3, 4] == 0
    good = [0, 3, 4]
    alone = gptq(weight[good], hessian[good], part(3))
    assert torch.equal(alone.integers.qweight, result.integers.qweight[good])
    assert not alone.fell_back


@pytest.mark.parametrize("order", ["given", "activations"])
def test_a_dead_channel_of_a_depthwise_convolution_is_no_failure(order):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 9, 50, generator=torch.Generator().manual_seed(1))
    x[2] = 0
    hessian = 2 / 50 * x @ x.transpose(1, 2)
    result = gptq(weight, hessian, part(3), order=order)
    assert not result.fell_back and result.damping == 0.01
    assert torch.equal(result.integers.qweight[2], nearest(weight, part(3)).qweight[2])
    assert result.error < result.nearest_error


def test_the_hessian_of_the_caller_stays():
    weight, hessian = problem()
    hessian = hessian.double()
    hessian[3] = hessian[:, 3] = 0
    before = hessian.clone()
    for order in ("given", "activations"):
        gptq(weight, hessian, part(4), order=order)
    assert torch.equal(hessian, before)


def test_sweeps_do_not_make_the_error_of_an_output_greater_with_much_damping():
    weight, hessian = problem()
    errors = []
    for sweeps in (0, 2):
        found = gptq(weight, hessian, part(4), damping=100.0, sweeps=sweeps).integers
        change = found.dequantize() - weight
        errors.append(((change @ hessian) * change).sum(1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


def test_one_scale_for_groups_whose_inputs_have_different_sizes():
    """Two groups with the same inputs, but of another size: the loud one decides the scale."""
    weight, hessian = problem()
    weights = Weights(3, granularity=PerTensor())
    both = torch.cat([weight, 4 * weight])
    loud = gptq(both, torch.stack([hessian, 1e-6 * hessian]), weights, damping=1e-4)
    values = loud.integers.dequantize()[: len(weight)]
    fitted = ((values @ hessian) * weight).sum() / ((values @ hessian) * values).sum()
    assert abs(float(fitted) - 1) < 0.025


# ---------------------------------------------------------------- bad Hessians


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_dead_columns_are_0_and_do_not_change_the_damping(size):
    """A diagonal of 1 for dead columns would raise the damping where the others are small."""
    weight, hessian = problem()
    dead = torch.zeros(80, dtype=torch.bool)
    dead[[0, 17, 40, 41, 79]] = True
    hessian = hessian * size
    hessian[dead] = 0
    hessian[:, dead] = 0
    for options in (PAPER, {}):
        result = gptq(weight, hessian, part(4, group_size=16), **options)
        assert not bool(result.integers.qweight[:, dead].any())
        assert result.dead_columns == 5 and not result.fell_back
        assert result.error < 0.5 * result.nearest_error
    integers = gptq_oracle(weight, hessian, 4, 16)[0]
    found = gptq(weight, hessian, part(4, group_size=16), **PAPER).integers
    assert torch.equal(found.qweight.double(), integers)


def test_dead_columns_with_zero_points_represent_0():
    weight, hessian = problem()
    hessian[5] = hessian[:, 5] = 0
    found = gptq(weight + 1, hessian, part(4, symmetric=False)).integers
    assert not bool(found.dequantize()[:, 5].any())


def test_fewer_inputs_than_terms():
    weight, hessian = problem(samples=10)
    result = gptq(weight, hessian, part(3))
    assert result.damping == 0.01 and not result.fell_back
    assert result.error < 0.2 * result.nearest_error
    raised = gptq(weight, hessian, part(3), damping=0)
    assert 0 < raised.damping <= 0.01 and not raised.fell_back
    assert raised.error < 0.2 * raised.nearest_error


def test_equal_inputs():
    weight, _ = problem()
    result = gptq(weight, torch.ones(80, 80), part(3))
    assert not result.fell_back and math.isfinite(result.error)
    assert result.error < 0.01 * result.nearest_error


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_ill_conditioned(damping):
    weight, hessian = problem()
    size = torch.logspace(-10, 10, 80)
    result = gptq(weight, hessian * size * size[:, None], part(3, group_size=16), damping=damping)
    assert not result.fell_back and math.isfinite(result.error)
    assert result.error <= result.nearest_error


def test_a_tiny_input_is_not_a_dead_one():
    """The factor of its Hessian is too large for float32 without damping."""
    weight, hessian = problem()
    size = torch.ones(80, dtype=torch.float64)
    size[3] = 1e-60
    result = gptq(weight, hessian.double() * size * size[:, None], part(3), damping=0)
    assert result.dead_columns == 0 and not result.fell_back
    assert result.damping > 0 and result.error < 0.5 * result.nearest_error


def test_damping_is_raised_for_one_group_alone():
    (weight, hessian), (other, singular) = problem(), problem(samples=10, seed=1)
    result = gptq(torch.cat([weight, other]), torch.stack([hessian, singular]), part(3), damping=0)
    alone = gptq(weight, hessian, part(3), damping=0)
    assert result.damping > alone.damping == 0
    assert torch.equal(result.integers.qweight[:24], alone.integers.qweight)


def test_damping_is_raised_step_by_step():
    weight, hessian = problem()
    low = float(torch.linalg.eigvalsh(hessian)[0])
    mean = float(hessian.diagonal().mean())
    hessian.diagonal().sub_(
        low + 0.3 * mean
    )  # the least eigenvalue is 0.43 of the new mean below 0
    result = gptq(weight, hessian, part(3))
    assert result.damping == pytest.approx(1.0) and not result.fell_back


@pytest.mark.parametrize("bad", [math.nan, math.inf, "zero", "negative"])
def test_rounding_is_the_last_resort(bad):
    weight, hessian = problem()
    if bad == "zero":
        hessian = torch.zeros_like(hessian)
    elif bad == "negative":
        hessian = -hessian
    else:
        hessian[3, 7] = bad
    for order in ("given", "activations"):
        result = gptq(weight, hessian, part(4, False, 32), order=order)
        plain = nearest(weight, part(4, False, 32))
        assert result.fell_back
        assert torch.equal(result.integers.qweight, plain.qweight)
        assert torch.equal(result.integers.scale, plain.scale)
        assert torch.equal(result.integers.zero_point, plain.zero_point)
    assert bad == "zero" or math.isnan(result.error) or bad == "negative"


def test_a_weight_of_zeros():
    _, hessian = problem()
    result = gptq(torch.zeros(24, 80), hessian, part(4, group_size=32))
    assert result.error == 0 and not bool(result.integers.qweight.any())


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.full((24, 80), math.nan)}, ValueError, "weight must be finite"),
        ({"hessian": torch.eye(79)}, ValueError, r"must have shape \[80, 80\], or .* got \[79, 79"),
        ({"hessian": torch.ones(5, 80, 80)}, ValueError, r"a divisor of the 24 outputs, got \[5,"),
        ({"hessian": torch.eye(80).int()}, TypeError, "hessian must be a float tensor, got torch"),
        ({"hessian": None}, TypeError, "hessian must be a float tensor, got NoneType"),
        ({"damping": -0.1}, ValueError, "damping must be a finite number of at least 0, got -0.1"),
        ({"damping": math.nan}, ValueError, "damping must be a finite number"),
        ({"block_size": 0}, ValueError, "block_size must be an integer of at least 1, got 0"),
        ({"sweeps": -1}, ValueError, "sweeps must be an integer of at least 0, got -1"),
        ({"order": "act"}, ValueError, "order must be 'given' or 'activations', got 'act'"),
        (
            {"order": "activations", "static_groups": False},
            ValueError,
            "static_groups must be True or None with order='activations', got False",
        ),
    ],
)
def test_refusals(change, error, message):
    weight, hessian = problem()
    arguments = {"weight": weight, "hessian": hessian, "weights": part(), **change}
    with pytest.raises(error, match=message):
        gptq(**arguments)


# ---------------------------------------------------------------- bits


def test_number_of_threads_changes_no_bit():
    weight, hessian = problem(outputs=64, terms=512, samples=2000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            factor = cholesky_of_inverse(hessian[None].double())[0]
            assert torch.get_num_threads() == threads
            found.append((factor, gptq(weight, hessian, part(3, group_size=64)).integers))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].qweight, found[1][1].qweight)
    assert torch.equal(found[0][1].scale, found[1][1].scale)
