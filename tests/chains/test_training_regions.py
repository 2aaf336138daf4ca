"""Regions in training: the bits of the converted network, and the plan of the calibrated one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chain_models import IMAGE_MODELS, Decides, Functional, Gated, Sequence, UNet
from support.chains import CONFIG, converted, input_of, plain
from support.qat_models import CONFIGS
from support.trained_regions import (
    STATIC,
    assert_converts,
    converted_copy,
    region_in_training,
    train,
    trained,
)
from torch import Tensor, nn

import torchquant
from torchquant import QATConfig, prepare_qat_, qat, verify
from torchquant.chains.program import Program
from torchquant.convert.regions import regions_in, remove
from torchquant.models import SmallResNet, SmallVGG
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import Observer

ONE_REGION = [cls for cls in (*IMAGE_MODELS, Sequence) if cls is not Decides]


def steps_of(model: nn.Module, x: Tensor) -> list[str]:
    """The kinds of all steps of the programs that run a converted model."""
    with torch.no_grad():
        model(x)
    (region,) = regions_in(model)
    programs = region._programs
    assert programs is not None and programs.ready
    return [
        type(step).__name__
        for _, program in programs.items
        if isinstance(program, Program)
        for step in program.steps
    ]


@pytest.mark.parametrize("cls", ONE_REGION)
def test_the_converted_network_has_the_bits_of_the_trained_one(
    cls: Callable[[], nn.Module],
) -> None:
    model, x = trained(cls)
    assert_converts(model, x)
    qat.freeze_(model)
    with torch.no_grad():
        wanted = plain(model.eval()(x))
        model.train()
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
                module.eval()
        assert torch.equal(plain(model(x)), wanted)  # training mode has these bits, too


# No layer trains a one-dimensional convolution together with its batch norm.
@pytest.mark.parametrize("cls", [cls for cls in ONE_REGION if cls is not Sequence])
def test_the_plan_is_that_of_the_calibrated_network(cls: Callable[[], nn.Module]) -> None:
    model, x = trained(cls, filter_fn=None)
    ours, region = converted_copy(model)
    theirs, *_ = converted(cls)
    (other,) = regions_in(theirs)
    assert region.plan is not None and other.plan is not None
    assert region.plan.groups == other.plan.groups
    assert region.plan.edge_of == other.plan.edge_of
    assert region.plan.layers == other.plan.layers
    assert steps_of(ours, x) == steps_of(theirs, x)


@pytest.mark.parametrize("cls", [SmallResNet, SmallVGG])
def test_the_networks_of_the_package(cls: Any) -> None:
    torch.manual_seed(0)
    model, x = cls(channels=3), torch.randn(4, 3, 32, 32)
    plain_model = copy.deepcopy(model).eval()
    report = prepare_qat_(model, STATIC)
    assert [(one.name, one.action) for one in report.regions] == [("", "found")]
    keys = [key for key in model.state_dict() if "quantize" not in key]
    train(model, x)
    assert [key for key in model.state_dict() if "quantize" not in key] == keys
    region = assert_converts(model, x)
    torchquant.prepare_(plain_model, CONFIG)
    torchquant.calibrate(plain_model, [x])
    torchquant.convert_(plain_model)
    ours, _ = converted_copy(model)
    assert steps_of(ours, x) == steps_of(plain_model, x)
    (other,) = regions_in(plain_model)
    assert region.plan is not None and other.plan is not None
    assert region.plan.groups == other.plan.groups
    assert verify(model, ours, [x]).exact and verify(model, ours, [x], training=True).exact


@pytest.mark.parametrize("name", ["w2a4_static", "w4a4_learned", "w8a4_learned_offset"])
@pytest.mark.parametrize("cls", [Functional, Gated])
def test_other_numbers_of_bits_and_learned_steps(cls: Callable[[], nn.Module], name: str) -> None:
    model, x = trained(cls, CONFIGS[name])
    assert_converts(model, x)


def test_unsigned_learned_steps() -> None:
    config = QATConfig(activations="static", learned_activations=True, activation_signed=False)
    torch.manual_seed(0)
    model, x = Functional(), input_of(Functional).abs()
    prepare_qat_(model, config, filter_fn="*")
    train(model, x)
    assert_converts(model, x)


def test_every_value_is_observed_once_per_forward() -> None:
    model, x = trained(UNet, steps=3)
    observers = [module for module in model.modules() if isinstance(module, Observer)]
    assert len(observers) > 8
    assert {int(observer.num_batches) for observer in observers} == {3}
    region = region_in_training(model)
    assert region.plan is not None and len(observers) == len(region.plan.edges)
    with torch.no_grad():
        model(x)
    assert {int(observer.num_batches) for observer in observers} == {3}


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    for config in (STATIC, CONFIGS["w4a4_learned"]):
        model, x = trained(Branches, config)
        shared = model.left.input_quantizer
        assert shared is model.right.input_quantizer and shared is model.pooled.input_quantizer
        assert shared is not model.stem.input_quantizer
        assert_converts(model, x)
        other = copy.deepcopy(model)
        assert other.left.input_quantizer is other.pooled.input_quantizer
        names = [name for name, _ in model.named_parameters() if "input_quantizer" in name]
        assert len(names) == (2 if config.learned else 0)  # an optimizer sees each step once


class Branches(nn.Module):
    """Three layers read one value, one of them behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.pooled = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y: Tensor = self.left(x) + self.right(x)
        return y + self.pooled(torch.max_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize("name", ["w8a8_static", "w2a4_static"])
def test_gradients_are_those_of_the_layers_one_by_one(name: str) -> None:
    """The layers alone round the value that they share, each on its own, to the same integers."""
    model, x = trained(Branches, CONFIGS[name])
    model.pooled.weight.data.zero_()  # its pooling chooses among equal integers
    alone = copy.deepcopy(model)
    (region,) = regions_in(alone)
    remove(region)
    grads = []
    for one in (model, alone):
        one.train().zero_grad()
        qat.freeze_(one)
        one(x).square().sum().backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    ours, theirs = grads
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_averages_of_the_deployed_bits_have_gradients() -> None:
    model, x = trained(Gated, steps=1)
    model.train()
    model.zero_grad()
    x.requires_grad_()
    model(x)["out"].square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_stages() -> None:
    model, x = trained(Gated)
    float_model = copy.deepcopy(model)
    qat.observe_(model)
    quantizers = [m for m in model.modules() if isinstance(m, ObservedQuantizer)]
    assert any("value_quantizers" in name for name, _ in model.named_modules())
    before = [quantizer.scale.clone() for quantizer in quantizers]
    with torch.no_grad():
        floats = model.train()(10 * x)["out"]
    assert all(
        not torch.equal(a, q.scale) for a, q in zip(before, quantizers, strict=True)
    )  # observers of all values record their ranges
    torchquant.to_float_(float_model)
    assert not regions_in(float_model)
    with torch.no_grad():
        assert torch.equal(floats, float_model.train()(10 * x)["out"])
    qat.freeze_(model)
    before = [quantizer.scale.clone() for quantizer in quantizers]
    with torch.no_grad():
        model.train()(x)
    assert all(torch.equal(a, q.scale) for a, q in zip(before, quantizers, strict=True))
    assert_converts(model, x)


def test_a_network_in_which_no_layer_reads_a_sum() -> None:
    """Values that only additions read have quantizers of their own."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
            self.c = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            first, second = torch.sigmoid(a) + a, torch.tanh(b) + torch.relu(b)
            result: Tensor = self.c(first + second)
            return result

    model, x = trained(Sums)
    region = assert_converts(model, x)
    assert region.plan is not None and len(region.plan.edges) == len(region.plan.edge_of) == 9
    places = region_in_training(model).places[0]
    assert len(set(places)) == 9 and sum(bool(place and place.key) for place in places) == 7


@pytest.mark.parametrize("cls", [Functional])
def test_channels_last(cls: Callable[[], nn.Module]) -> None:
    model, x = trained(cls)
    x = x.contiguous(memory_format=torch.channels_last)
    train(model, x, 1)
    assert_converts(model, x)
