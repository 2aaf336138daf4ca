"""equalize_: the pairs it finds, the function it keeps, the networks it rescues."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchquant.algorithms.consecutive import Pair, find_pairs, is_float_layer
from torchquant.algorithms.equalize import equalize_
from torchquant.configs import Weights
from torchquant.convert.regions import find
from torchquant.models import SmallResNet
from torchquant.nn.conv_weight import quantize_weight
from torchquant.scheme import PerTensor

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def images(channels=3, size=12):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


def pairs_of(model):
    found = [find_pairs(model, region) for region in find(model, is_float_layer).regions]
    pairs = [pair for one, _ in found for pair in one]
    return pairs, {name: reason for _, reasons in found for name, reason in reasons.items()}


def depthwise(activation=nn.ReLU, channels=16):
    layers = [nn.Conv2d(3, channels, 3, padding=1), activation()]
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), activation()]
        layers += [nn.Conv2d(channels, channels, 1), activation()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)]
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, LAYERS):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def with_planted_ranges(model, most=1000.0):
    """The same function with ranges of channels from 1 to ``most`` in each layer but the last."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    layers = [layer for layer in model if isinstance(layer, LAYERS)]
    for first, second in itertools.pairwise(layers):
        count = len(first.weight)
        factors = most ** torch.linspace(-0.5, 0.5, count)
        factors = factors[torch.randperm(count, generator=generator)]
        first.weight *= factors.view(-1, 1, 1, 1)
        first.bias *= factors
        if isinstance(second, nn.Linear):
            second.weight /= factors.repeat_interleave(second.in_features // count)
        else:
            shape = (-1, 1, 1, 1) if second.groups > 1 else (1, -1, 1, 1)
            second.weight /= factors.view(shape)
    return model


@torch.no_grad()
def with_rounded_weights(model):
    """The model with weights of 8 bits, one scale per tensor."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            integers, scale = quantize_weight(layer.weight, Weights(granularity=PerTensor()))
            layer.weight.copy_(integers * scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    return model


@torch.no_grad()
def error(model, reference, x):
    expected = reference(x)
    return float((model(x) - expected).norm() / expected.norm())


def test_a_depthwise_network_with_planted_ranges_is_rescued():
    clean, x = depthwise(), images()
    planted = with_planted_ranges(clean)
    assert error(planted, clean, x) < 1e-4, "the same function"
    usual, broken = (error(with_rounded_weights(net), clean, x) for net in (clean, planted))
    report = equalize_(planted)
    rescued = error(with_rounded_weights(planted), clean, x)
    assert broken > 20 * usual, "planted ranges do harm"
    assert rescued < 1.2 * usual
    assert error(planted, clean, x) < 1e-4
    assert [row.action for row in report] == ["equalized"] * 5 + ["left"]
    assert all(row.spread_before > 900 > 10 > row.spread_after for row in report.rows[:5])


def test_report_prints_layers_and_ranges():
    report = equalize_(with_planted_ranges(depthwise()), [images()])
    text = str(report)
    assert "equalized: with 2" in text
    assert "left: the model returns its output" in text
    assert "5 equalized, 1 left; ranges of channels: at most 1:" in report.summary()
    assert report.difference is not None
    assert report.difference < 1e-5


# Pairs


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.head = nn.Linear(4 * 9, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.dropout(F.relu6(self.second(x)), 0.5, self.training)
        return self.head(torch.flatten(x, 1))


def test_pairs_through_functions():
    pairs, reasons = pairs_of(Functional())
    assert pairs == [Pair("first", "second"), Pair("second", "head", 6.0, 9)]
    assert reasons == {"head": "the model returns its output"}


def test_layers_of_a_residual_network():
    pairs, reasons = pairs_of(fused(SmallResNet()))
    names = [(pair.first, pair.second) for pair in pairs]
    assert ("stages.0.0.conv1", "stages.0.0.conv2") in names
    assert len(names) == 3, "only inside of blocks"
    assert reasons["stem.0"] == "several places read its output"
    assert reasons["stages.0.0.conv2"] == "add stands after it"


def fused(model):
    """The model with its batch norms folded."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model.eval())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        return self.three(self.two(self.one(self.one(x))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.three.weight = self.one.weight

    def forward(self, x):
        return self.three(self.two(self.one(x)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.one(x)
        return self.two(x) + x


class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.one(x)
        return self.two(x), x


class Linears(nn.Module):
    """A linear layer on the last dimension of an image reads no channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.one(x))


def sequence(*between, second=None):
    return nn.Sequential(nn.Conv2d(4, 4, 1), *between, second or nn.Conv2d(4, 4, 1))


REFUSED = {
    "called twice": (Twice(), {"one": "it is called several times"}),
    "tied": (Tied(), {"one": "it shares a parameter with another layer"}),
    "branches": (Branches(), {"one": "several places read its output"}),
    "returned": (Seen(), {"one": "several places read its output"}),
    "last dimension": (Linears(), {"one": "its channels are not the input channels of two"}),
    "sigmoid": (sequence(nn.Sigmoid()), {"0": "1 (Sigmoid) stands after it"}),
    "norm": (
        sequence(nn.BatchNorm2d(4)),
        {"0": "1 (BatchNorm2d) stands after it; prepare_ folds it"},
    ),
    "softmax": (sequence(nn.Softmax(1)), {"0": "1 (Softmax) stands after it"}),
    "flatten of all": (
        sequence(nn.Flatten(0), second=nn.Linear(4, 4)),
        {"0": "1 (Flatten) stands after it"},
    ),
    "transposed": (
        sequence(nn.ReLU(), second=nn.ConvTranspose2d(4, 4, 1)),
        {"0": "2 (ConvTranspose2d) stands after it"},
    ),
    "pool of tokens": (
        nn.Sequential(nn.Linear(8, 8), nn.MaxPool1d(2), nn.Linear(4, 4)),
        {"0": "1 (MaxPool1d) stands after it"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_no_pair(name):
    model, expected = REFUSED[name]
    before = copy.deepcopy(model.state_dict())
    report = equalize_(model)
    for layer, reason in expected.items():
        assert report[layer].action == "left"
        assert report[layer].reason == reason
        for key in ("weight", "bias"):
            assert torch.equal(model.state_dict()[f"{layer}.{key}"], before[f"{layer}.{key}"])


CHANNEL_WISE = {
    "relu": [nn.ReLU()],
    "in place": [nn.ReLU(inplace=True)],
    "leaky relu": [nn.LeakyReLU(0.2)],
    "dropout": [nn.Dropout(), nn.Dropout2d()],
    "pools": [nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2, padding=1)],
    "adaptive": [nn.AdaptiveAvgPool2d(3), nn.Identity()],
    "nothing": [],
}


@pytest.mark.parametrize("name", CHANNEL_WISE)
def test_functions_between_layers_keep_the_function(name):
    model = sequence(*CHANNEL_WISE[name]).eval()
    with torch.no_grad():
        model[0].weight[1] *= 300
    x = images(4)
    expected = model(x)
    report = equalize_(model)
    assert report["0"].action == "equalized"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_linear_layers_and_sequences():
    for model, x in (
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 6)),
        (nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(5, 6, 9)),
    ):
        with torch.no_grad():
            model[0].weight[2] *= 100
        expected = model(x)
        row = equalize_(model)["0"]
        assert row.spread_after < row.spread_before / 5
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# ReLU6, and models that need batches


def test_layers_before_relu6_need_batches():
    model = depthwise(nn.ReLU6)
    before = copy.deepcopy(model.state_dict())
    report = equalize_(model)
    assert "an activation cuts off at 6; pass a loader" in report["0"].reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_that_reach_the_bound_of_relu6_keep_their_scale():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4).view(4, 4, 1, 1))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([1e-3, 1e3, 1e-3, 1e3]).view(1, 4, 1, 1))
    x = images(4).abs()
    x = x / x.amax(dim=(0, 2, 3), keepdim=True) * torch.tensor([9.0, 9.0, 3.0, 3.0]).view(4, 1, 1)
    expected = model(x)
    report = equalize_(model, [x[:2], x[2:]])
    scale = model[0].weight.detach().flatten(1).diagonal().tolist()
    assert scale[:2] == [1, 1], "these are cut off at 6"
    assert scale[2] == pytest.approx(0.001**0.5), "a channel may become smaller"
    assert scale[3] == pytest.approx(6 / 3 / 1.25), "a channel may grow to 6, less a margin"
    assert report.difference < 1e-5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """A model that cannot be recorded, around a part that can."""

    def __init__(self):
        super().__init__()
        self.body = sequence(nn.ReLU())

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)


class Peeking(nn.Module):
    """It calls the layers of a part one by one, and reads what lies between."""

    def __init__(self):
        super().__init__()
        self.body = sequence(nn.ReLU())

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        middle = self.body[1](self.body[0](x))
        return self.body[2](middle) + middle.sum()


def test_parts_of_a_model_need_batches():
    model = Branching()
    assert "pass a loader" in equalize_(model)["body.0"].reason
    with torch.no_grad():
        model.body[0].weight[0] *= 50
    expected = model(images(4))
    assert equalize_(model, [images(4)])["body.0"].action == "equalized"
    torch.testing.assert_close(model(images(4)), expected, rtol=1e-4, atol=1e-4)


def test_a_part_whose_values_are_read_is_left():
    model = Peeking()
    expected = model(images(4))
    row = equalize_(model, [images(4)])["body.0"]
    assert (row.action, row.reason) == ("left", "Peeking.forward passes to sum its output")
    assert torch.equal(model(images(4)), expected)


def test_a_model_that_computes_something_else_is_left_as_it_was():
    model = sequence(nn.ReLU())
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad():
        model[0].weight[0] *= 50
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"outputs would change by .*; something else reads"):
        equalize_(model, [images(4)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Arguments


def test_a_custom_forward_and_modes():
    model = depthwise(nn.ReLU6).train()
    report = equalize_(
        model, [{"pixels": images()}], forward=lambda net, batch: net(batch["pixels"])
    )
    assert report["0"].action == "equalized"
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("model", [None, "net", nn.Conv2d])
def test_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"equalize_: model must be an nn.Module, got"):
        equalize_(model)


def test_models_without_float_layers_are_refused():
    with pytest.raises(ValueError, match=r"must hold float layers .*, got none; call it before"):
        equalize_(nn.Sequential(nn.ReLU()))


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match=r"loader must have batches, got none"):
        equalize_(depthwise(), [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = with_planted_ranges(depthwise(), 50.0).to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        expected = model(x).float()
        equalize_(model)
        assert model[0].weight.dtype == dtype
        assert (model(x).float() - expected).norm() / expected.norm() < 0.05
