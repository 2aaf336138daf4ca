"""equalize_ scales channels only if no method, branch or argument shows them elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchquant.algorithms.consecutive import find_pairs, is_float_layer
from torchquant.algorithms.equalize import equalize_
from torchquant.convert.fold import fold_batch_norms
from torchquant.convert.regions import find


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def images(seed=0):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Returns(Two):
    def forward(self, x, features=False):
        h = F.relu(self.a(x))
        if features:
            return h
        return self.b(h)


class Encodes(Two):
    def encode(self, x):
        return F.relu(self.a(x))

    def forward(self, x):
        return self.b(self.encode(x))


class Decodes(Two):
    def decode(self, x):
        return self.b(x)


class Other(Two):
    """Another branch applies a function that does not keep scales."""

    def forward(self, x, smooth=False):
        h = self.a(x)
        return self.b(torch.sigmoid(h) if smooth else F.relu(h))


class Cut(Two):
    def forward(self, x, cut=False):
        h = self.a(x)
        return self.b(F.relu6(h) if cut else F.relu(h))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(F.relu(self.b(F.relu(self.a(x)))), self.a.weight.t())


class TiedConv(Two):
    def forward(self, x):
        return F.conv_transpose2d(F.relu(self.b(F.relu(self.a(x)))), self.a.weight)


class Coder(nn.Module):
    """Two parts with names; a user calls the first one alone."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(conv(), nn.ReLU())
        self.decoder = nn.Sequential(conv(), nn.ReLU())

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Taps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.ReLU(), conv())
        self.tap = 9

    def forward(self, x):
        found = x * 0
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place == self.tap:
                found = x
        return x + found

    def tapped(self, x):
        self.tap = 0
        try:
            return self(x)
        finally:
            self.tap = 9


class Slices(Taps):
    def forward(self, x):
        return self.layers(x)

    def low(self, x):
        return self.layers[:2](x)


WAYS = {
    "argument": (Returns, lambda m, x: m(x, features=True)),
    "method": (Encodes, lambda m, x: m.encode(x)),
    "second in a method": (Decodes, lambda m, x: m.decode(x)),
    "other function": (Other, lambda m, x: m(x, smooth=True)),
    "function that cuts off": (Cut, lambda m, x: m(x, cut=True)),
    "tied linear": (Tied, lambda m, x: m(x)),
    "tied convolution": (TiedConv, lambda m, x: m(x)),
    "named part": (Coder, lambda m, x: m.encoder(x)),
    "second named part": (Coder, lambda m, x: m.decoder(x)),
    "taps": (Taps, lambda m, x: m.tapped(x)),
    "slice": (Slices, lambda m, x: m.low(x)),
}


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_another_path_keeps_the_weights(name, loader):
    make, way = WAYS[name]
    model = make().eval()
    with torch.no_grad():
        next(model.parameters())[0] *= 100
    reference = copy.deepcopy(model)
    report = equalize_(model, [images()] if loader else None)
    assert all(row.action == "left" and row.reason for row in report)
    for call in (way, lambda m, x: m(x)):
        assert torch.equal(call(model, images(1)), call(reference, images(1)))


class Helper(Two):
    """A module that is an element of a Sequential."""

    def forward(self, x):
        return F.relu(self.b(F.max_pool2d(self.a(x).relu(), 1)))


def depthwise(channels=4):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


ONE_WAY = {
    "flat": (lambda: nn.Sequential(conv(), nn.ReLU(), conv()), 1),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(conv(), nn.ReLU()),
            nn.Sequential(nn.Sequential(depthwise(), nn.ReLU()), conv()),
            nn.Sequential(nn.Dropout(), nn.ReLU(), conv()),
        ),
        3,
    ),
    "modules in a row": (lambda: nn.Sequential(Helper(), Helper(), nn.ReLU(), conv()), 4),
    "functions": (Two, 1),
}


@pytest.mark.parametrize("name", ONE_WAY)
def test_one_path_is_equalized(name):
    make, count = ONE_WAY[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        next(model.parameters())[0] *= 100
    reference = copy.deepcopy(model)
    report = equalize_(model)
    assert sum(row.action == "equalized" for row in report) == count, str(report)
    got, wanted = model(images(1)), reference(images(1))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_pairs_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    (region,) = find(model, is_float_layer).regions
    fold_batch_norms(model, [region], lambda layer: True)
    (region,) = find(model, is_float_layer).regions
    assert len(find_pairs(model, region)[0]) == 37
