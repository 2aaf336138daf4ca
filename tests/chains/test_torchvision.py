"""Models that nobody rewrites by hand: one program each, 90 % of the products int8 at least."""

import copy
from typing import Any

import pytest
import torch
from support.chain_models import images, with_statistics
from torch import nn

import torchquant
from torchquant.chains import region as region_module
from torchquant.chains.programs import REFUSED
from torchquant.convert.fold import fold_batch_norms
from torchquant.convert.regions import find, regions_in

CONFIG = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")

# Name -> size of the images.
MODELS = {"resnet18": 64, "mobilenet_v3_small": 64, "shufflenet_v2_x1_0": 64}
SLOW_MODELS = {
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "inception_v3": 96,
    "googlenet": 64,
    "vgg11_bn": 64,
    "squeezenet1_1": 64,
    "mnasnet0_5": 64,
    "resnext50_32x4d": 64,
}


def built(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    quiet = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model: nn.Module = getattr(torchvision.models, name)(weights=None, **quiet)
    return with_statistics(model)


def check(name: str, size: int, monkeypatch: Any) -> None:
    """All of it is one program, without a call in Python."""
    model, x = built(name), images(2, size)
    with torch.no_grad():
        wanted = model(x)
        torchquant.prepare_(model, CONFIG)
        torchquant.calibrate(model, [x])
        report = torchquant.convert_(model)
        (row,) = report.regions
        assert row.name == "" and row.action == "int8"
        assert row.share is not None and row.share >= 0.9
        assert row.breaks == ()
        fast = model(x)
        assert (fast - wanted).norm() < 0.1 * wanted.norm()
        (region,) = regions_in(model)
        programs, calls = region._programs, region.trace.calls
        assert programs is not None and programs.run([x]) is not REFUSED
        python = [item for item, _ in programs.items if isinstance(item, int)]
        assert all(calls[item].kind in ("input", "tensor") for item in python)
        assert len(programs.items) - len(python) == 1
        monkeypatch.setattr(region_module, "may_use_kernels", lambda inputs: False)
        assert torch.equal(model(x), fast)
    assert all(row.action == "fused" for row in report.foldings) or name == "densenet121"


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, MODELS[name], monkeypatch)


LARGE = ("inception_v3", "resnext50_32x4d", "vgg11_bn")
# Batch norms that become part of a layer; the others have none before them.
FOLDED = {
    "resnet18": 20,
    "resnext50_32x4d": 53,
    "mobilenet_v2": 52,
    "mobilenet_v3_small": 34,
    "efficientnet_b0": 49,
    "regnet_y_400mf": 53,
    "regnet_x_400mf": 71,
    "densenet121": 59,
    "shufflenet_v2_x1_0": 56,
    "inception_v3": 94,
    "googlenet": 57,
    "vgg11_bn": 8,
    "mnasnet0_5": 52,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in FOLDED],
)
def test_all_batch_norms_are_folded(name: str) -> None:
    model = built(name)
    found = find(model, lambda module: isinstance(module, (nn.Conv2d, nn.Linear)))
    rows = fold_batch_norms(model, found.regions, lambda layer: True)
    assert [row.action for row in rows] == ["fused"] * FOLDED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_MODELS)
def test_more_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, SLOW_MODELS[name], monkeypatch)


def check_training(name: str, size: int) -> None:
    """A trained network has the bits and the plan of the converted one, and no float values."""
    model, x = built(name), images(2, size)
    calibrated = copy.deepcopy(model)
    torchquant.prepare_qat_(model, torchquant.Int8StaticActivationInt8WeightConfig())
    model.train()
    output = model(x)
    (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        report = torchquant.convert_(model)
        assert torch.equal(model(x), wanted)
        torchquant.prepare_(calibrated, CONFIG)
        torchquant.calibrate(calibrated, [x])
        other = torchquant.convert_(calibrated)
    (ours,), (theirs,) = regions_in(model), regions_in(calibrated)
    assert ours._programs is not None and ours._programs.ready
    assert ours.plan is not None and theirs.plan is not None
    assert ours.plan.groups == theirs.plan.groups
    assert ours.plan.edge_of == theirs.plan.edge_of
    assert report.regions == other.regions


def test_a_trained_model() -> None:
    check_training("resnet18", 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("mobilenet_v2", 64), ("mobilenet_v3_small", 64), ("efficientnet_b0", 64)),
        *(("googlenet", 96), ("convnext_tiny", 64), ("densenet121", 64)),
        *(("shufflenet_v2_x1_0", 64), ("regnet_y_400mf", 64), ("squeezenet1_1", 64)),
        ("inception_v3", 299),
    ],
)
def test_more_trained_models(name: str, size: int) -> None:
    check_training(name, size)
