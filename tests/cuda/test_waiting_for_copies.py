"""``.to("cpu", non_blocking=True)``: who reads a copy on the host waits for it first."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from support.pretend import pretended_cuda
from torch import nn

import torchquant
from torchquant import Int8DynamicActivationInt8WeightConfig as Int8
from torchquant import QATConfig
from torchquant.nn import QATLinear, QuantizedLinear


@pytest.fixture
def waits() -> Iterator[mock.Mock]:
    stream = mock.Mock()
    with (
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.current_stream", return_value=stream),
    ):
        yield stream.synchronize


def test_a_weight_is_packed_once_it_is_there(waits: mock.Mock) -> None:
    with pretended_cuda() as gpu:
        layer = QuantizedLinear.from_float(nn.Linear(32, 16), Int8())
        layer.to(gpu)
        waits.assert_not_called()
        layer.to("cpu", non_blocking=True)
    waits.assert_called()


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_flags_are_read_once_they_are_there(activations: str, waits: mock.Mock) -> None:
    with pretended_cuda() as gpu:
        layer = QATLinear(32, 16, config=QATConfig(activations=activations)).to(gpu)
        waits.assert_not_called()
        layer.to("cpu", non_blocking=True)
    waits.assert_called()


def test_a_learned_step(waits: mock.Mock) -> None:
    with pretended_cuda() as gpu:
        quantizer = torchquant.LSQQuantizer().to(gpu)
        quantizer.to("cpu", non_blocking=True)
    waits.assert_called()


def test_factories_that_mean_the_cpu() -> None:
    """Whatever the default device is: CPU tensors meet no others."""
    x, layer = torch.randn(4, 32), nn.Linear(32, 16)
    norm = nn.LayerNorm(32)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            wide = input.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * wide.to(input.dtype)

    own = Norm()
    with torch.device("meta"):
        torchquant.functional.layer_norm(x, norm.weight, norm.bias, 1e-5)
        torchquant.functional.gelu(x)
        torchquant.nn.RMSNorm.from_float(own)
        quantizer = torchquant.LSQPlusQuantizer(device="cpu")
        assert quantizer.initialize(x)
        assert not torchquant.ops.quantize(x, 0.5).is_meta
        assert not QuantizedLinear.from_float(layer)(x).is_meta
