"""Training on a pretended GPU: layers move, first values agree, nothing waits for the device."""

import copy
from collections.abc import Callable

import pytest
import torch
from support import assert_same_bits, floats
from support.devices import (
    on_cuda,
)
from support.layers import assert_same_state
from support.pretend import CUDA, pretended_cuda, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from torchquant import (
    LSQQuantizer,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObservedQuantizer,
    PACTQuantizer,
    QATConfig,
    TrainingConfig,
)
from torchquant.nn import QATLinear

QAT_CONFIGS = {
    "dynamic": QATConfig(),
    "static": QATConfig(activations="static"),
    "learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
        learned_offset=True,
    ),
}


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_prepared_layer_on_the_gpu(config: TrainingConfig) -> None:
    torch.manual_seed(0)
    layer = QATLinear(64, 32, config=config, activation="relu")
    layer(floats(8, 64))  # ranges and first steps
    layer.eval()
    x = floats(5, 64, seed=3)
    with torch.no_grad():
        expected, deployed = layer(x), layer.to_quantized()
    twin = copy.deepcopy(layer)
    with torch.no_grad(), pretended_cuda() as cuda:
        layer.to(cuda)
        output = layer(on_cuda(x))
        converted = layer.to_quantized()
        assert converted.packed.device == CUDA
        again = converted(on_cuda(x))
        converted.to("cpu")
        layer.to("cpu")
    assert_same_bits(values(output), expected)
    assert_same_bits(values(again), expected)
    assert_same_state(converted, deployed)
    assert_same_state(layer, twin)


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_ranges_and_steps_move_alike(config: TrainingConfig) -> None:
    """In training mode, without gradients: what observers and quantizers keep is the CPU's."""
    torch.manual_seed(0)
    here = QATLinear(64, 32, config=config)
    with torch.no_grad():
        here(floats(8, 64))
        with pretended_cuda() as cuda:
            there = copy.deepcopy(here).to(cuda)
            for seed in range(3):
                batch = floats(8, 64, seed=seed)
                output = there(on_cuda(batch))
                assert_same_bits(values(output), here(batch))
            there.to("cpu")
    assert_same_state(there, here)


def test_first_steps_and_offsets_are_the_cpus() -> None:
    x = floats(64, 64)
    with torch.no_grad():
        for make in (
            lambda: LSQQuantizer(bits=4, symmetric=False),
            lambda: LSQQuantizer(bits=4, symmetric=False, per_channel=True, num_channels=64),
        ):
            here = make()
            here(x)
            with pretended_cuda() as cuda:
                there = make().to(cuda)
                there(on_cuda(x))
                there.to("cpu")
            assert_same_state(there, here)


def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CPU tensors take the ways of a GPU's; to look at a value raises."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda tensor: False))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))


def test_looking_at_a_fake_value_raises() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.zeros(1) > 0)


@pytest.mark.parametrize(
    "make",
    [
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        ObservedQuantizer,
        PACTQuantizer,
        LSQQuantizer,
        lambda: LSQQuantizer(symmetric=False),
        lambda: LSQQuantizer(per_channel=True, num_channels=8),
    ],
    ids=["minmax", "moving", "fake", "pact", "lsq", "lsq_plus", "lsq_channels"],
)
def test_quantizers_do_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]
) -> None:
    no_host(monkeypatch)
    with FakeTensorMode():
        module = make()
        _started(module)
        for _ in range(2):
            x = torch.empty(8, 64, requires_grad=True)
            module(x).sum().backward()


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_training_step_does_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, config: TrainingConfig
) -> None:
    no_host(monkeypatch)
    with FakeTensorMode():
        layer = QATLinear.__new__(QATLinear)  # from_float wants plain parameters
        nn.Module.__init__(layer)
        layer._init(nn.Linear(64, 32), config, "relu")
        _started(layer)
        x = torch.empty(8, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


def _started(module: nn.Module) -> None:
    """As after the first batch, at which a quantizer may look, once."""
    for part in module.modules():
        if isinstance(part, LSQQuantizer):
            part._initialized = True
        if isinstance(part, ObservedQuantizer):
            part._has_scale = True
