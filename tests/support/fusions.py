"""Models with activations, converted with and without fusion."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support import assert_same_bits
from torchquant import Fusion, functional, quantize_
from torchquant import QuantizationReport as Report
from torchquant.nn.replaced_activation import ReplacedActivation

KNOWN = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "leaky_relu": nn.LeakyReLU,
}
KNOWN = {name: make for name, make in KNOWN.items() if name in functional.ACTIVATIONS}


def fusions(report: Report) -> list[str]:
    return [str(fusion) for fusion in report.fusions]


def linear(out_features: int = 64, in_features: int = 64) -> nn.Linear:
    return nn.Linear(in_features, out_features)


class Of(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = linear(128), linear(64, 128)
        self.act = nn.GELU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.act(self.up(x)))
        return result


def assert_fused(model: nn.Module, x: Tensor, *, tolerance: float = 1e-5) -> Report:
    """Convert with and without fusion: something is fused, and the outputs agree."""
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    report = quantize_(model)
    assert any(fusion.action == "fused" for fusion in report.fusions)
    with torch.no_grad():
        expected, got = plain(x), model(x)
    assert got.dtype == expected.dtype
    scale = float(expected.abs().max())
    assert (got - expected).abs().max() <= tolerance * scale
    return report


def assert_not_fused(model: nn.Module, *inputs: Any) -> Report:
    """Convert with and without fusion: nothing is offered, and the outputs are the same bits."""
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    report = quantize_(model)
    assert not any(fusion.action == "fused" for fusion in report.fusions)
    assert not any(isinstance(module, ReplacedActivation) for module in model.modules())
    with torch.no_grad():
        for x in inputs:
            expected, got = plain(x), model(x)
            assert_same_bits(got, expected)
    return report


def assert_unnoticed(model: nn.Module, *inputs: Any, tolerance: float = 1e-5) -> Report:
    """Convert with and without fusion: whatever is offered, the outputs differ by rounding only."""
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    report = quantize_(model)
    with torch.no_grad():
        for x in inputs:
            expected, got = plain(x), model(x)
            assert (got - expected).abs().max() <= tolerance * float(expected.abs().max())
    return report
