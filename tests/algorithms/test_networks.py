"""The verbs on convolutional networks: batch norms folded, values int8 between layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchquant
from torchquant import adaround_, correct_bias_, equalize_
from torchquant.configs import Static, Weights
from torchquant.convert.adjustment import adjustment_of
from torchquant.data import augment, digit_images
from torchquant.models import load_digits_resnet, load_digits_vgg
from torchquant.scheme import PerTensor

STATIC = torchquant.Int8StaticActivationInt8WeightConfig()
FOUR_BITS = torchquant.IntxActivationIntxWeightConfig(weight_bits=4, static=True)
PER_TENSOR = torchquant.QuantizationConfig(Weights(granularity=PerTensor()), Static())


class Depthwise(nn.Module):
    """Inverted residual blocks with batch norm and a depthwise convolution each."""

    def __init__(self, channels=24, blocks=2):
        super().__init__()
        torch.manual_seed(0)

        def layer(inputs, outputs, size, groups=1):
            conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
            norm = nn.BatchNorm2d(outputs)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            return [conv, norm]

        self.stem = nn.Sequential(*layer(1, channels, 3), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *layer(channels, 2 * channels, 1),
                nn.ReLU(),
                *layer(2 * channels, 2 * channels, 3, 2 * channels),
                nn.ReLU(),
                *layer(2 * channels, channels, 1),
            )
            for _ in range(blocks)
        )
        self.head = nn.Conv2d(channels, 16, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).mean((2, 3))


@torch.no_grad()
def plant(model, most=1000.0):
    """Ranges from 1 to ``most`` in the channels inside of each block; the function stays."""
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        _, expanded_norm, _, depthwise, depth_norm, _, projection, _ = block
        count = len(depthwise.weight)
        for norm, follow in ((expanded_norm, depthwise), (depth_norm, projection)):
            factors = most ** torch.linspace(-0.5, 0.5, count)
            factors = factors[torch.randperm(count, generator=generator)]
            norm.weight *= factors
            norm.bias *= factors
            shape = (-1, 1, 1, 1) if follow is depthwise else (1, -1, 1, 1)
            follow.weight /= factors.view(shape)
    return model


def images(count=24, seed=0):
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def with_statistics(model):
    """The model in evaluation mode, with running statistics from some images."""
    model.train()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None
        model(images(64, 5))
    return model.eval()


@torch.no_grad()
def error(model, reference):
    x = images(32, 9)
    expected = reference(x)
    return float((model(x) - expected).norm() / expected.norm())


def quantized(model, config, *steps):
    """A copy of the model: prepared, calibrated and converted, with steps at their places."""
    model = copy.deepcopy(model)
    torchquant.prepare_(model, config, images(1))
    if equalize_ in steps:
        equalize_(model)
    torchquant.calibrate(model, [images(seed=seed) for seed in range(3)], progress=False)
    for step in steps:
        if step is not equalize_:
            step(model, [images(seed=seed) for seed in range(3)])
    torchquant.convert_(model)
    return model


@pytest.mark.filterwarnings("ignore")
def test_equalization_rescues_planted_ranges_under_per_tensor_weights():
    clean = with_statistics(Depthwise())
    planted = plant(copy.deepcopy(clean))
    assert error(planted, clean) < 1e-4, "the same function"
    usual = error(quantized(clean, PER_TENSOR), clean)
    broken = error(quantized(planted, PER_TENSOR), clean)
    rescued = error(quantized(planted, PER_TENSOR, equalize_), clean)
    assert broken > 10 * usual
    assert rescued < 1.5 * usual


def test_equalize_goes_through_folded_norms_and_keeps_the_region():
    model = plant(with_statistics(Depthwise()))
    torchquant.prepare_(model, STATIC, images(1))
    expected = model(images())
    report = equalize_(model, [images()])
    assert [row.name for row in report if row.action == "equalized"] == [
        f"blocks.{block}.{place}" for block in (0, 1) for place in (0, 3)
    ]
    assert report["stem.0"].reason == "several places read its output"
    assert report["head"].reason == "mean stands after it"
    torch.testing.assert_close(model(images()), expected, rtol=1e-3, atol=1e-4)
    torchquant.calibrate(model, [images()], progress=False)
    assert "int8: the model" in str(torchquant.convert_(model)), "the region holds"


def rounded_(model, loader):
    return adaround_(model, loader, iterations=100)


@pytest.mark.parametrize("verb", [pytest.param(rounded_, marks=pytest.mark.slow), correct_bias_])
def test_verbs_keep_the_region_and_help(verb):
    model = with_statistics(Depthwise())
    plain, better = quantized(model, FOUR_BITS), quantized(model, FOUR_BITS, verb)
    limit = 0.5 if verb is rounded_ else 0.97
    assert error(better, model) < limit * error(plain, model)
    layers = [layer for layer in better.modules() if hasattr(layer, "qweight")]
    assert len(layers) == 8
    assert "forward" in better.__dict__, "the region holds"


def test_weights_per_tensor_keep_one_scale():
    four = torchquant.QuantizationConfig(Weights(4, granularity=PerTensor()), Static())
    model = with_statistics(Depthwise(blocks=1))
    plain, better = quantized(model, four), quantized(model, four, rounded_)
    assert error(better, model) < error(plain, model)
    for layer in (layer for layer in better.modules() if hasattr(layer, "qweight")):
        assert len(layer.weight_scale.unique()) == 1


def test_every_layer_of_a_network_is_rounded_and_corrected():
    model = load_digits_resnet()
    data = [augment(digit_images(test_copies=0).train_images[:8], torch.Generator())]
    torchquant.prepare_(model, FOUR_BITS, data[0])
    torchquant.calibrate(model, data, progress=False)
    rounded = adaround_(model, data, iterations=2)
    corrected = correct_bias_(model, data)
    assert {row.action for row in rounded} == {"rounded"}
    assert {row.action for row in corrected} == {"corrected"}
    names = [row.name for row in rounded]
    assert len(names) == 10, "the small classifier is part of the int8 chain"
    assert names.index("stages.1.0.conv1") < names.index("stages.1.0.conv2"), "in order of calls"
    found = {name: adjustment_of(model.get_submodule(name)) for name in names}
    torchquant.convert_(model)
    for name, adjustment in found.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.qweight, adjustment.qweight)
        assert torch.equal(layer.bias.detach(), adjustment.bias)


# Accuracy on held-out images

MODELS = {"vgg": load_digits_vgg, "resnet": load_digits_resnet}


@pytest.fixture(scope="module")
def data():
    return digit_images()


def calibration(data, count=8):
    generator = torch.Generator().manual_seed(0)
    return [
        augment(data.train_images[32 * place : 32 * place + 32], generator)
        for place in range(count)
    ]


@torch.no_grad()
def measured(model, data):
    """Correct answers in percent, and the mean cross entropy."""
    logits = torch.cat([model(part) for part in data.test_images.split(100)])
    right = (logits.argmax(dim=1) == data.test_labels).double().mean()
    return 100 * float(right), float(F.cross_entropy(logits, data.test_labels))


def converted(model):
    model = copy.deepcopy(model)
    torchquant.convert_(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_static_int8_loses_little_accuracy(name, data):
    model = MODELS[name]()
    before = measured(model, data)[0]
    torchquant.prepare_(model, STATIC, data.train_images[:1])
    torchquant.calibrate(model, calibration(data), progress=False)
    torchquant.convert_(model)
    assert measured(model, data)[0] > before - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_training_with_integers_loses_no_accuracy(name, data):
    model = MODELS[name]()
    before = measured(model, data)[0]
    torchquant.prepare_qat_(model, STATIC)
    torchquant.qat.freeze_statistics_(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(torchquant.parameter_groups(model, 0.0), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 40)
    model.train()
    for _ in range(40):
        rows = torch.randint(len(data.train_images), (32,), generator=generator)
        logits = model(augment(data.train_images[rows], generator))
        loss = F.cross_entropy(logits, data.train_labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    deployed = converted(model)
    report = torchquant.verify(model, deployed, [data.test_images[:50]])
    assert report.differing_bits == 0
    assert measured(deployed, data)[0] > before - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_learned_rounding_to_four_bits_keeps_two_thirds_of_what_plain_rounding_loses(name, data):
    model = MODELS[name]()
    accuracy, loss = measured(model, data)
    torchquant.prepare_(model, FOUR_BITS, data.train_images[:1])
    torchquant.calibrate(model, calibration(data), progress=False)
    plain = measured(converted(model), data)
    adaround_(model, calibration(data), progress=False)
    learned = measured(converted(model), data)
    assert plain[0] < accuracy
    assert plain[1] > loss
    assert accuracy - learned[0] <= (accuracy - plain[0]) / 3
    assert learned[1] - loss <= (plain[1] - loss) / 3
