"""Coordinate descent on integers and scales never climbs; no single step helps at its end."""

import pytest
import torch
from support.gptq_oracle import layer_error, problem

from torchquant import PerAxis, PerGroup, Weights
from torchquant.algorithms.descent import descend
from torchquant.algorithms.integer_weight import nearest
from torchquant.algorithms.least_error import column_groups


def start(scheme, outputs=6, terms=40):
    """Columns, Hessian, and the steps, scales and zero points of rounding."""
    weight, hessian = problem(outputs, terms)
    plain = nearest(weight, scheme)
    zero = torch.zeros_like(plain.scale) if scheme.symmetric else plain.zero_point.float()
    columns = (weight, plain.qweight.float())
    wide = [tensor.t().contiguous().unsqueeze(0) for tensor in columns]
    narrow = [
        tensor.view(outputs, -1).t().contiguous().unsqueeze(0) for tensor in (plain.scale, zero)
    ]
    sizes = [part.stop - part.start for part in column_groups(terms, scheme)]
    wide[1] -= narrow[1].repeat_interleave(torch.tensor(sizes), 1)
    return wide[0], hessian.unsqueeze(0), wide[1], *narrow, torch.tensor(sizes)


def error_of(columns, hessian, steps, scale, sizes):
    values = steps * scale.repeat_interleave(sizes, 1)
    return layer_error(columns[0].t(), values[0].t(), hessian[0])


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_sweep_goes_down_until_no_step_helps(symmetric, granularity):
    scheme = Weights(3, symmetric, granularity=granularity)
    columns, hessian, steps, scale, zero, sizes = start(scheme)
    error = error_of(columns, hessian, steps, scale, sizes)
    for _ in range(3):
        descend(columns, hessian, steps, scale, zero, scheme, sweeps=1)
        found = error_of(columns, hessian, steps, scale, sizes)
        assert found <= error * (1 + 1e-5)
        error = found
    descend(columns, hessian, steps, scale, zero, scheme, sweeps=60)
    error = error_of(columns, hessian, steps, scale, sizes)
    qmin, qmax = scheme.range
    spread = zero.repeat_interleave(sizes, 1)
    assert bool(((steps + spread) >= qmin).all() & ((steps + spread) <= qmax).all())
    assert torch.equal(steps, steps.round())
    for column in range(0, 40, 3):
        for output in range(6):
            for move in (-1, 1):
                other = steps.clone()
                other[0, column, output] += move
                if qmin <= float((other + spread)[0, column, output]) <= qmax:
                    assert error_of(columns, hessian, other, scale, sizes) >= error * (1 - 1e-5)
    for factor in (0.99, 1.01):
        for group in range(scale.shape[1]):
            other = scale.clone()
            other[0, group] *= factor
            assert error_of(columns, hessian, steps, other, sizes) > error


def test_a_shared_scale_stays_shared():
    scheme = Weights(3)
    columns, hessian, steps, scale, zero, sizes = start(scheme)
    scale.fill_(scale.max())
    before = error_of(columns, hessian, steps, scale, sizes)
    descend(columns, hessian, steps, scale, zero, scheme, sweeps=3, shared=True)
    assert len(scale.unique()) == 1
    assert error_of(columns, hessian, steps, scale, sizes) < before


def test_a_scale_never_turns_negative():
    """Integers of the wrong sign would fit best with a negative scale."""
    columns, hessian = torch.tensor([[[1.0], [1.0]]]), torch.eye(2).unsqueeze(0)
    steps, scale = torch.tensor([[[-1.0], [-1.0]]]), torch.ones(1, 1, 1)
    descend(columns, hessian, steps, scale, torch.zeros(1, 1, 1), Weights(4), sweeps=2)
    assert float(scale) > 0
    assert torch.equal(steps * scale, columns)
