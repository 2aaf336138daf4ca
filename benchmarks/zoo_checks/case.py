"""What is known of one architecture while it is checked: its models, inputs and float outputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from architectures import Architecture, Inputs, tensors
from torch import Tensor, nn

import torchquant
from torchquant.nn import QuantizedModule


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Attributes:
        text: the cell of the table.
        ok: False for a failure; None if there was nothing to check.
        value: the number that was measured, if there is one.
    """

    text: str
    ok: bool | None = True
    value: float | None = None


class FloatFails(Exception):
    """The float model cannot do what the check asks of the quantized model."""


class Case:
    """One architecture; models are built anew, because some change when they run."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._kept: nn.Module | None = None

    def float_model(self, weights: int = 0) -> nn.Module:
        """A float model; ``weights`` other than 0 give other values."""
        if not self.architecture.real:
            return self.architecture.model(weights)
        if self._kept is None:  # reading a trained model takes seconds
            self._kept = self.architecture.model()
        model = copy.deepcopy(self._kept)
        if weights:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
        return model

    def quantized_model(self, **options: Any) -> nn.Module:
        """A model after ``quantize_``."""
        model = self.float_model()
        torchquant.quantize_(model, **options)
        return model

    def arguments(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """The arguments of a call, with floating-point tensors of ``dtype``."""
        return {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.architecture.arguments().items()
        }

    def call(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The outputs of a model; random numbers in it are the same in every call."""
        arguments = self.arguments(dtype)
        torch.manual_seed(7)
        with torch.no_grad():
            return [tensor.detach().clone() for tensor in tensors(model(**arguments))]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The outputs of the float model."""
        return self.call(self.float_model())

    @cached_property
    def quantized(self) -> nn.Module:
        """A quantized model that the checks share; they call it, but do not change it."""
        return self.quantized_model()

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The outputs of :attr:`quantized`."""
        return self.call(self.quantized)

    @property
    def of_transformers(self) -> bool:
        """True for models of the transformers library."""
        return hasattr(self.quantized, "set_attn_implementation")


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of a model's quantized layers."""
    return [name for name, part in model.named_modules() if isinstance(part, QuantizedModule)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, also those that are not part of its state dict."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def same_values(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have the same values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """The least cosine between two lists of tensors."""
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        return float("nan")
    found = [1.0]
    for x, y in zip(a, b, strict=True):
        x, y = x.double().flatten(), y.double().flatten()
        if x.numel() > 1 and (x.any() or y.any()):
            found.append(torch.cosine_similarity(x, y, dim=0).item())
    return min(found) if all(value == value for value in found) else float("nan")


def decibels(a: list[Tensor], b: list[Tensor]) -> float:
    """The least ratio of signal to difference between two lists of tensors; 200 for equal bits."""
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        return float("nan")
    found = [200.0]
    for x, y in zip(a, b, strict=True):
        difference = (x.double() - y.double()).square().sum()
        if difference > 0:
            ratio = x.double().square().sum() / difference
            found.append(min(200.0, 10 * ratio.log10().item()))
    return min(found)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """True if two lists of tensors are equal."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def compared(a: list[Tensor], b: list[Tensor]) -> Outcome:
    """Same bits, or how large the difference is."""
    if same_bits(a, b):
        return Outcome("same bits")
    least = cosine(a, b)
    return Outcome(f"wrong numbers: cosine {least:.3f}", False, least)
