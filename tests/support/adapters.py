"""Models with quantized or prepared layers, and adapters of peft on them."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchquant
from torchquant import Int8StaticActivationInt8WeightConfig, QATConfig
from torchquant.nn import QuantizedModule

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Two projections and a head; no activation module that a layer could compute."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.up = nn.Linear(64, 96)
        self.head = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.up(self.q_proj(x))))
        return output


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))


def float_net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


def quantized() -> nn.Module:
    model = float_net()
    assert len(torchquant.quantize_(model).quantized) == 3
    return model


def static() -> nn.Module:
    model = float_net()
    torchquant.prepare_qat_(model, Int8StaticActivationInt8WeightConfig())
    model.train()(batch())
    torchquant.convert_(model)
    return model.eval()


def low_bits() -> nn.Module:
    model = float_net()
    torchquant.quantize_(model, torchquant.IntxActivationIntxWeightConfig())
    return model


def prepared() -> nn.Module:
    model = float_net()
    torchquant.prepare_qat_(model, QATConfig())
    return model


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "dynamic": quantized,
    "static": static,
    "intx": low_bits,
}
MODELS = {**QUANTIZED, "prepared": prepared}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 8, "target_modules": ["q_proj", "up"], **options})


def ia3(**options: Any) -> Any:
    settings = {"target_modules": ["q_proj", "up"], "feedforward_modules": ["up"]}
    return peft.IA3Config(**{**settings, **options})


def add(model: nn.Module, config: Any, name: str = "default") -> Any:
    """The model with adapters; a warning of peft fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.get_peft_model(model, config, adapter_name=name)


def train(model: nn.Module, steps: int = 6, rate: float = 0.5) -> list[float]:
    """Train all parameters that require gradients; the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = (model(batch()) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def trained(model: nn.Module, config: Any) -> Any:
    torch.manual_seed(7)
    adapted = add(model, config)
    train(adapted)
    return adapted


def integers(model: nn.Module) -> dict[str, Tensor]:
    """The state of all quantized layers, without the names that peft adds."""
    return {
        f"{name.replace('base_model.model.', '').replace('.base_layer', '')}.{key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key, value in module.state_dict().items()
    }


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.fixture
def readable_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers whose float weight can be read, which some adapters need."""
    if not hasattr(QuantizedModule, "weight"):
        weight = property(lambda self: self.to_float().weight.detach())
        monkeypatch.setattr(QuantizedModule, "weight", weight, raising=False)
