"""The Hessian of a layer: its definition, what is left out, and one order of all sums."""

import pytest
import torch
from support.hessian_processes import hessian_in_process, hessian_of
from support.processes import in_processes
from torch import nn

from torchquant.algorithms.hessian import LANES, Hessian, lanes_of
from torchquant.algorithms.inputs import columns, grouped_weight

ALL = list(range(LANES))


def data(count=11, terms=40, seed=0):
    """Batches of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [20 + 3 * number for number in range(count)]
    return [torch.randn(terms, size, generator=generator) for size in sizes]


def test_is_twice_the_mean_of_the_products_of_inputs():
    batches = data(terms=600)  # more than one stripe
    hessian = hessian_of(batches, ALL)
    x = torch.cat(batches, 1).double()
    found = hessian.value()
    assert found.shape == (1, 600, 600) and found.dtype == torch.float32
    assert hessian.rows == x.shape[1]
    torch.testing.assert_close(found[0].double(), 2 / x.shape[1] * x @ x.t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.transpose(1, 2)), "symmetric in all bits"


def test_does_not_grow_with_the_data():
    batches = data()
    once, twice = hessian_of(batches, ALL).value(), hessian_of(batches * 2, ALL).value()
    torch.testing.assert_close(once, twice)


def test_batches_of_one_size_more_or_less_weigh_by_their_inputs():
    """A running mean that gives each batch the same weight would differ."""
    small, large = torch.ones(1, 1), torch.full((1, 3), 2.0)
    assert float(hessian_of([small, large], ALL).value()) == pytest.approx(2 / 4 * (1 + 3 * 4))


def test_measures_the_error_of_the_outputs_of_a_grouped_convolution():
    layer = nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False)
    hessian = Hessian.of(layer)
    inputs = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    for number, x in enumerate(inputs):
        hessian.add(number, columns(layer, x))
    with torch.no_grad():
        change = 0.1 * torch.randn_like(layer.weight)
        outputs = [nn.functional.conv2d(x, change, padding=1, groups=2) for x in inputs]
    squares = sum(output.double().square().sum() for output in outputs)
    d = grouped_weight(layer, change)
    found = (d @ hessian.value() * d).sum() * hessian.rows / 2
    assert float(found) == pytest.approx(float(squares), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_left_out_and_counted(bad):
    batches = data(3)
    spoiled = [batch.clone() for batch in batches]
    spoiled[1][5, 2] = bad
    spoiled[2][:, 4] = bad
    kept = [batches[0], *(batch.clone() for batch in batches[1:])]
    kept[1] = torch.cat([kept[1][:, :2], kept[1][:, 3:]], 1)
    kept[2] = torch.cat([kept[2][:, :4], kept[2][:, 5:]], 1)
    hessian = hessian_of(spoiled, ALL)
    assert torch.equal(hessian.value(), hessian_of(kept, ALL).value())
    assert hessian.dropped == 2
    assert hessian.rows == sum(batch.shape[1] for batch in batches) - 2


def test_large_inputs_are_not_taken_for_infinite_ones():
    hessian = hessian_of([torch.full((2, 4), 1e38)], ALL)
    assert (hessian.rows, hessian.dropped) == (4, 0)


def test_nothing_but_nan_is_a_hessian_of_zeros():
    hessian = hessian_of([torch.full((2, 4), float("nan"))], ALL)
    assert torch.equal(hessian.value(), torch.zeros(1, 2, 2))
    assert (hessian.rows, hessian.dropped) == (0, 4)


def test_lanes_may_be_visited_in_any_order():
    batches = data(20)
    plain = hessian_of(batches, ALL).value()
    other = Hessian(40)
    for lane in reversed(ALL):
        for number in range(lane, 20, LANES):
            other.add(number, batches[number].unsqueeze(0))
    assert torch.equal(other.value(), plain)


def test_two_processes_give_the_bits_of_one():
    batches = data(13)
    batches[3][0, 0] = float("nan")
    alone = hessian_of(batches, ALL)
    assert [lane for process in (0, 1) for lane in lanes_of(process, 2)] == [*ALL[::2], *ALL[1::2]]
    for value, rows, dropped, message in in_processes(hessian_in_process, batches):
        assert torch.equal(value, alone.value())
        assert (rows, dropped) == (alone.rows, alone.dropped)
        assert "must add only batches of the lanes r, r + 2" in message


def test_bad_calls():
    hessian = Hessian(3)
    with pytest.raises(ValueError, match=r"columns must have shape \[1, 3, n\], got \[1, 4, 5\]"):
        hessian.add(0, torch.ones(1, 4, 5))
    hessian.add(0, torch.ones(1, 3, 5))
    value = hessian.value()
    with pytest.raises(ValueError, match="inputs must be added before reduce"):
        hessian.add(1, torch.ones(1, 3, 5))
    assert torch.equal(hessian.value(), value)


def test_lane_by_lane_gives_the_same_bits_with_two_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 5, 7, generator=generator) * 1.5**number for number in range(20)]
    every, by_lane = Hessian(5), Hessian(5, by_lane=True)
    for number, one in enumerate(inputs):
        every.add(number, one)
    for lane in range(LANES):
        for number in range(lane, 20, LANES):
            by_lane.add(number, inputs[number])
            assert len(by_lane._lanes) == 1
    assert torch.equal(by_lane.value(), every.value())
    assert by_lane.rows == every.rows == 140
    assert torch.equal(Hessian(5, by_lane=True).value(), torch.zeros(1, 5, 5))


def test_lanes_that_come_too_late_are_refused() -> None:
    hessian = Hessian(2, by_lane=True)
    hessian.add(1, torch.ones(1, 2, 1))
    with pytest.raises(ValueError, match="got batch 8 of lane 0 after a later lane"):
        hessian.add(8, torch.ones(1, 2, 1))
