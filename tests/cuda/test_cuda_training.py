"""Training on a GPU."""

import copy
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.gpu_modules import (
    CUDA,
    devices_of,
)
from support.layers import assert_same_state
from torch import nn

from torchquant import (
    LSQQuantizer,
    QATConfig,
    TrainingConfig,
    convert_,
    parameter_groups,
    prepare_qat_,
    to_float_,
    verify,
)
from torchquant.nn import QATLinear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # A kernel that fails leaves its operator to ATen with a message: here that is a failure.
    pytest.mark.filterwarnings("error:torchquant:RuntimeWarning"),
]

QAT_CONFIGS = {
    "dynamic": QATConfig(),
    "static": QATConfig(activations="static"),
    "w4a4_learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
        learned_offset=True,
    ),
    "weights_asymmetric": QATConfig(weight_bits=2, weight_symmetric=False),
}


@pytest.mark.parametrize("prepared_on", ["cpu", "cuda"])
@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_trained_on_the_gpu_shipped_on_the_cpu(config: TrainingConfig, prepared_on: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(prepared_on)
    prepare_qat_(model, config)
    model.to(CUDA).train()
    optimizer = torch.optim.SGD(parameter_groups(model), lr=1e-3)
    for seed in range(3):
        x = floats(32, 64, seed=seed).to(CUDA)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    batches = [floats(8, 64, seed=seed) for seed in (7, 8)]
    here = copy.deepcopy(model).cpu()
    report = verify(model, here, batches)  # both prepared
    assert report.exact, str(report)
    assert report.devices == ("cuda:0", "cpu")
    shipped = copy.deepcopy(model)
    convert_(shipped)
    assert devices_of(shipped) == {CUDA}
    for training in (False, True):
        assert verify(model, shipped, batches, training=training).exact
        assert verify(here, shipped, batches, training=training).exact
        assert verify(model, copy.deepcopy(shipped).cpu(), batches, training=training).exact
    converted_here = copy.deepcopy(here)
    convert_(converted_here)
    assert_same_state(copy.deepcopy(shipped).cpu(), converted_here)
    back = copy.deepcopy(shipped)
    to_float_(back)
    assert devices_of(back) == {CUDA}


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_step_of_training_in_both_places(config: TrainingConfig) -> None:
    """The forward's bits, ranges and first steps; gradients but for the order of sums."""
    torch.manual_seed(0)
    here = QATLinear(64, 48, config=config, activation="relu")
    there = copy.deepcopy(here).to(CUDA)
    for seed in range(3):
        x = floats(32, 64, seed=seed)
        ours, theirs = x.clone().requires_grad_(), x.to(CUDA).requires_grad_()
        y, z = here(ours), there(theirs)
        if seed == 0:  # the first step is a mean, whose last bits may differ
            with torch.no_grad():
                for a, b in zip(here.parameters(), there.parameters(), strict=True):
                    torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-7)
                    b.copy_(a)
            continue
        assert_same_bits(z.detach().cpu(), y.detach())
        for output in (y, z):
            output.square().mean().backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-4, atol=1e-6)
        for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
            assert a.grad is not None, name
            assert b.grad is not None, name
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (key, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert_same_bits(b.cpu(), a, key)


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_step_does_not_wait(config: TrainingConfig, no_waiting: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(CUDA)
    prepare_qat_(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = floats(32, 64).to(CUDA)

    def step() -> None:
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    with no_waiting:
        step()


def test_autocast_in_training() -> None:
    layer, x = QATLinear(64, 32), floats(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    layer.to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(x.to(CUDA))
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert_same_bits(output.detach().cpu(), expected.detach())


def test_quantizers_keep_to_the_cpus_values() -> None:
    x = floats(64, 64)
    for make in (
        lambda: LSQQuantizer(bits=4),
        lambda: LSQQuantizer(bits=4, symmetric=False),
        lambda: LSQQuantizer(bits=4, per_channel=True, num_channels=64),
    ):
        here = make()
        here(x)
        there = copy.deepcopy(here).to(CUDA)
        assert_same_bits(there(x.to(CUDA)).detach().cpu(), here(x).detach())
        fresh = make().to(CUDA)
        fresh(x.to(CUDA))
        torch.testing.assert_close(fresh.step.cpu(), here.step, rtol=1e-6, atol=0)
