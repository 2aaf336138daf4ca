"""The factors of cross-layer equalization."""

import pytest
import torch
from torch import nn

from torchquant.algorithms.scaling import (
    channel_ranges,
    equalization_factors,
    range_spread,
    scale_channels,
)


def test_factors_give_both_layers_the_same_ranges():
    first, second = torch.tensor([1e-3, 4.0, 100.0]), torch.tensor([5.0, 4.0, 1e-2])
    factors = equalization_factors(first, second)
    torch.testing.assert_close(first / factors, second * factors)


@pytest.mark.parametrize(
    ("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (float("inf"), 1.0), (1e-40, 1e38)]
)
def test_channels_without_a_useful_factor_keep_their_scale(first, second):
    factors = equalization_factors(torch.tensor([first, 4.0]), torch.tensor([second, 1.0]))
    assert factors.tolist() == [1.0, 2.0]


LAYERS = {
    "linear": nn.Linear(6, 4),
    "dense": nn.Conv2d(6, 4, 3),
    "grouped": nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": nn.Conv2d(6, 12, 3, groups=6),
    "1-d": nn.Conv1d(6, 4, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ranges_are_those_of_the_weights_that_matter(name):
    """A weight matters to a channel if the output depends on both."""
    layer = LAYERS[name]
    x = torch.ones((1, 6, 3, 3)[: layer.weight.dim()])
    for channel in range(6):
        weight = layer.weight.detach().clone().requires_grad_(True)
        only = torch.zeros_like(x)
        only[:, channel] = 1
        output = torch.func.functional_call(layer, {"weight": weight}, (only,))
        (slope,) = torch.autograd.grad(output.sum(), weight)
        expected = (weight * (slope != 0)).abs().max()
        found = channel_ranges(layer.weight, getattr(layer, "groups", 1), inputs=True)
        assert found[channel] == expected
    outputs = channel_ranges(layer.weight, getattr(layer, "groups", 1), inputs=False)
    assert torch.equal(outputs, layer.weight.detach().abs().flatten(1).amax(1))


@pytest.mark.parametrize("name", LAYERS)
def test_scaled_channels(name):
    layer = LAYERS[name]
    groups = getattr(layer, "groups", 1)
    x = torch.randn((2, 6, 5, 5)[: layer.weight.dim()])
    factors = torch.linspace(0.5, 4.0, 6)
    shape = (-1, *[1] * (layer.weight.dim() - 2))
    weight = scale_channels(layer.weight.detach(), factors, groups, inputs=True)
    output = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(output, layer(x * factors.view(shape)))
    outputs = torch.linspace(0.5, 4.0, len(weight))
    divided = scale_channels(layer.weight.detach(), outputs, groups, inputs=False)
    torch.testing.assert_close(divided * outputs.view(-1, *shape[1:], 1), layer.weight.detach())


def test_channels_after_a_flatten_are_blocks():
    weight = torch.arange(12.0).reshape(2, 6)
    assert channel_ranges(weight, 1, inputs=True, block=3).tolist() == [8, 11]
    scaled = scale_channels(weight, torch.tensor([1.0, 10.0]), 1, inputs=True, block=3)
    assert scaled.tolist() == [[0, 1, 2, 30, 40, 50], [6, 7, 8, 90, 100, 110]]


def test_spread_leaves_out_channels_of_zeros():
    assert range_spread(torch.tensor([0.0, 2.0, 6.0])) == 3
    assert range_spread(torch.zeros(3)) == 1
