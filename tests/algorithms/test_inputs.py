"""What layers see: columns of all kinds of convolutions and linear layers."""

import pytest
import torch
from torch import nn

from torchquant.algorithms.inputs import columns, grouped_weight

LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), (5, 6)),
    "linear of tokens": (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "linear of one row": (nn.Linear(6, 4, bias=False), (6,)),
    "1 x 1": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 7)),
    "padding": (nn.Conv2d(4, 6, 3, padding=(1, 2), bias=False), (2, 4, 5, 7)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same", bias=False), (2, 4, 5, 7)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (2, 4, 5, 7)),
    "stride": (nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1, bias=False), (2, 4, 9, 8)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=(2, 1), bias=False), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False), (2, 4, 5, 7)),
    "one image": (nn.Conv2d(4, 6, 3, bias=False), (4, 5, 7)),
    "1-d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 4, 9)),
    "1-d circular": (
        nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", bias=False),
        (2, 4, 9),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weight_times_columns_is_the_output(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = layer(x).detach()
    if not isinstance(layer, nn.Linear):
        batch = expected if expected.dim() == len(layer.kernel_size) + 2 else expected[None]
        expected = batch.transpose(0, 1).flatten(1)
    else:
        expected = expected.reshape(-1, 4).t()
    product = (grouped_weight(layer, layer.weight) @ columns(layer, x)).detach().flatten(0, 1)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_some_columns_are_chosen_at_random_and_the_same_each_time():
    layer = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 2, 10, 10)
    whole, some = columns(layer, x), columns(layer, x, 5)
    assert some.shape == (1, 18, 20)
    assert torch.equal(some, columns(layer, x, 5))
    assert torch.equal(columns(layer, x, 64), whole), "64 places are all"
    places = {column.numpy().tobytes() for column in whole[0].t()}
    assert all(column.numpy().tobytes() in places for column in some[0].t())
    doubled = columns(layer, 2 * x, 5)
    assert torch.equal(doubled, 2 * some), "two inputs of one shape give the same columns"


def test_some_rows_of_a_linear_layer():
    layer, x = nn.Linear(3, 2), torch.randn(4, 10, 3)
    assert columns(layer, x).shape == (1, 3, 40)
    assert columns(layer, x, 2).shape == (1, 3, 8)
