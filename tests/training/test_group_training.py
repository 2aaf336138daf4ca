"""Training of weights in groups: the loss of the float model; from preparation to files."""

import copy
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, generator
from torch import Tensor, nn

import torchquant
from torchquant import (
    PerGroup,
    QATConfig,
    TrainingConfig,
    convert_,
    prepare_qat_,
    quantize_,
    verify,
)
from torchquant.configs import QuantizationConfig, Static, Weights
from torchquant.nn import QuantizedIntxLinear

CONFIGS = {
    "groups": QATConfig(weight_bits=4, group_size=32),
    "zero_points": QATConfig(weight_bits=4, weight_symmetric=False, group_size=32),
    "learned": QATConfig(weight_bits=4, learned_weights=True, group_size=32),
    "float_activations": QATConfig(weight_bits=4, activations=None, group_size=32),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


def samples() -> tuple[Tensor, Tensor]:
    """Inputs, and what a teacher with the same shape makes of them."""
    x = torch.randn(256, 64, generator=generator(1))
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    return x, teacher(x).detach()


def train(model: nn.Module, steps: int, rate: float) -> float:
    """The mean squared error after some steps on the samples."""
    x, target = samples()
    optimizer = torch.optim.Adam(torchquant.parameter_groups(model, 0.0), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((model(x) - target).square().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, float]:
    """A float model, and its loss."""
    model = network()
    return model, train(model, 300, 1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_four_bits_reach_the_loss_of_the_float_model(
    name: str, trained: tuple[nn.Module, float], tmp_path: Path
) -> None:
    model, loss = copy.deepcopy(trained[0]), trained[1]
    x, target = samples()
    variance = float(target.var())
    rounded = copy.deepcopy(model)
    config: TrainingConfig = CONFIGS[name]
    quantize_(rounded, config.deployed())
    with torch.no_grad():
        without_training = float((rounded(x) - target).square().mean())
    prepare_qat_(model, config)
    with_training = train(model, 200, 1e-2)
    assert with_training - loss < 0.5 * (without_training - loss)
    assert with_training - loss < 0.02 * variance

    shipped = copy.deepcopy(model)
    convert_(shipped)
    assert [type(m) for m in shipped if not isinstance(m, nn.ReLU)][:1] == [QuantizedIntxLinear]
    report = verify(model, shipped, [x])
    assert report.exact
    assert report.differing_bits == 0
    with torch.no_grad():
        for mode in (True, False):
            assert_same_bits(model.train(mode)(x), shipped(x))
    torchquant.save(shipped, tmp_path / "model.safetensors")
    loaded = torchquant.load(tmp_path / "model.safetensors", network())
    assert_same_bits(loaded(x).detach(), shipped(x).detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_in_the_middle_of_training(name: str) -> None:
    models = []
    x, _ = samples()
    for interrupted in (False, True):
        model = network()
        prepare_qat_(model, CONFIGS[name])
        train(model, 3, 1e-2)
        if interrupted:
            other = network()
            prepare_qat_(other, CONFIGS[name])
            other.load_state_dict(model.state_dict())
            model = other
        train(model, 3, 1e-2)
        models.append(model)
    assert_same_bits(models[1](x).detach(), models[0](x).detach())


def test_groups_that_do_not_fit_stay_float() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(48, 64), nn.Conv2d(64, 64, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = QATConfig(weight_bits=4, group_size=64)
    with pytest.raises(ValueError, match="group_size must be at most in_features = 48, got 64"):
        prepare_qat_(model, config, strict=True, filter_fn=lambda module, name: name != "2")
    assert [type(m) for m in model] == [nn.Linear, nn.Linear, nn.Conv2d]
    report = prepare_qat_(model, config)
    assert {layer.name: layer.action for layer in report.layers} == {
        "0": "prepared",
        "1": "skipped",
        "2": "skipped",
    }
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["1"] == "group_size must be at most in_features = 48, got 64"
    assert "groups" in reasons["2"] or "PerAxis" in reasons["2"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="QATLinear: group_size must be at most in_features = 8"):
        torchquant.QATLinear(8, 4, config=config)


def test_static_activations_with_groups_are_refused() -> None:
    config = QuantizationConfig(Weights(4, granularity=PerGroup(32)), Static())
    with pytest.raises(ValueError, match="weights in groups are trained with dynamic activations"):
        torchquant.QATLinear(64, 64, config=config)
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="weights in groups are trained with dynamic activations"):
        prepare_qat_(model, config, strict=True)
    assert type(model[0]) is nn.Linear
