"""Activations are recognized by their type or by their values."""

import pytest
import torch
from support.fusions import KNOWN, Of
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant.graph.recognize import activation_of


@pytest.mark.parametrize("name", KNOWN)
def test_activations_of_torch_are_recognized(name: str) -> None:
    assert activation_of(KNOWN[name]()) == name


SAME = {
    "gelu by erf": ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5))),
    "gelu_new": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
    ),
    "swish": ("silu", lambda x: x * torch.sigmoid(x)),
    "clamp": ("relu", lambda x: x.clamp(min=0)),
    "relu6": ("relu6", lambda x: x.clamp(0, 6)),
    "leaky relu": ("leaky_relu", lambda x: torch.where(x > 0, x, x * 0.01)),
    "hardswish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "hardsigmoid": ("hardsigmoid", lambda x: (x + 3).clamp(0, 6) / 6),
    "inplace": ("relu", lambda x: x.relu_()),
}
OTHER = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "leaky, hardly": lambda x: F.leaky_relu(x, 1e-8),
    "leakier": lambda x: F.leaky_relu(x, 0.01 + 1e-8),
    "leaky, much": lambda x: F.leaky_relu(x, 0.2),
    "relu7": lambda x: x.clamp(0, 7),
    "hardswish without overflow": lambda x: x * (F.relu6(x + 3) / 6),
    "capped": lambda x: x.clamp(0, 1e5),
    "shifted": lambda x: F.gelu(x) + 1e-5,
    "steeper": lambda x: F.silu(1.0001 * x),
    "normed": lambda x: F.relu(x) / x.abs().amax(-1, keepdim=True).clamp(min=1e30) * 1e30,
    "centered": lambda x: F.gelu(x) - 1e-30 * x.mean(-1, keepdim=True),
    "straight through": lambda x: x + (F.relu(x) - x).detach(),
    "without gradient": lambda x: F.relu(x).detach(),
    "always float": lambda x: F.relu(x).float(),
    "always double": lambda x: F.relu(x.double()),
    "flat": lambda x: F.relu(x).reshape(-1),
    "a tuple": lambda x: (F.relu(x),),
    "nan to zero": lambda x: F.relu(x).nan_to_num(0.0),
    "identity": lambda x: x,
    "dropout": lambda x: F.dropout(F.relu(x), 0.5),
    "raises": lambda x: x[10**6],
    "a thing": lambda x: object(),
}


@pytest.mark.parametrize("case", SAME)
def test_activations_of_other_libraries_are_recognized_by_their_values(case: str) -> None:
    name, function = SAME[case]
    assert activation_of(Of(function)) == name


@pytest.mark.parametrize("case", OTHER)
def test_modules_similar_to_an_activation_are_not_recognized(case: str) -> None:
    assert activation_of(Of(OTHER[case])) is None


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.Dropout(), nn.PReLU(), nn.RReLU(), nn.LayerNorm(16), nn.Softmax(-1)],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_are_not_activations(module: nn.Module) -> None:
    assert activation_of(module) is None


class DifferentInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.5, self.training)


def test_a_module_that_differs_in_training_is_not_recognized() -> None:
    assert activation_of(DifferentInTraining().eval()) is None


def test_recognition_does_not_change_the_module() -> None:
    module = Of(lambda x: F.relu(x)).eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert activation_of(module) == "relu"
        assert activation_of(Of(lambda x: F.relu(x) + torch.rand(()))) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training


def test_a_function_with_effects_is_not_run() -> None:
    seen: list[Tensor] = []
    assert activation_of(Of(lambda x: (seen.append(x), F.relu(x))[1])) is None
    assert seen == []
