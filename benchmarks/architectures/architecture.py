"""One architecture of the zoo: how its float model is built, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
VOCABULARY = 320


@dataclass(frozen=True)
class Architecture:
    """A float model with random weights, and its inputs.

    Attributes:
        name: the name on the command line and in the table.
        group: where the model comes from: the name of the file that lists it.
        package: the package that it needs besides torch; empty if there is none.
        build: makes the model with weights from torch's global generator.
        inputs: makes the keyword arguments of a call of the model.
        prompt: the arguments of ``generate``; None if the model does not generate.
        fast: True for the models that the default tests run.
        real: True if the weights are those of a trained model, which nobody changes.
        spread: True if small matrices become larger; False for a model that then becomes chaotic.
        least: the least cosine that int8 must reach; less than the usual value for real models.
        seed: the seed of the weights and of the inputs.
    """

    name: str
    group: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    prompt: Callable[[], Inputs] | None = None
    fast: bool = False
    real: bool = False
    spread: bool = True
    least: float = 0.99
    seed: int = 0

    def model(self, weights: int = 0) -> nn.Module:
        """The float model in evaluation mode; the same ``weights`` are the same values."""
        torch.manual_seed(self.seed + 1000 * weights)
        model = self.build()
        if not self.real:
            unsettle(model, self.spread)
        return model.eval()

    def empty(self) -> nn.Module:
        """The model on the meta device, without values."""
        with torch.device("meta"):
            return self.build().eval()

    def arguments(self) -> Inputs:
        """The arguments of a call; always the same."""
        torch.manual_seed(self.seed + 1)
        return self.inputs()

    def prompts(self) -> Inputs:
        """The arguments of ``generate``; always the same."""
        torch.manual_seed(self.seed + 2)
        return self.prompt() if self.prompt is not None else {}


@torch.no_grad()
def unsettle(model: nn.Module, spread: bool = True) -> None:
    """Change parameters whose initial values would hide a fault.

    Weights of norms move away from 1, and biases and constant vectors away from 0. Matrices that
    are zero or very small become larger, so that no layer is close to having no effect; not so if
    ``spread`` is False.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            parameter.add_(torch.randn(parameter.shape) * 0.05)
            continue
        if not spread:
            continue
        least = 0.5 / (parameter.numel() / parameter.shape[0]) ** 0.5
        deviation = parameter.std().item() if parameter.numel() > 1 else 0.0
        if deviation == 0:
            parameter.add_(torch.randn(parameter.shape) * least)
        elif deviation < least:
            parameter.mul_(least / deviation)


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "sample") and isinstance(value.sample, Tensor):
        yield value.sample  # of diffusers


def numbers(*shape: int) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape)


def ids(*shape: int) -> Tensor:
    """Numbers of tokens; none of them is one of the first, which models give a meaning."""
    return torch.randint(5, VOCABULARY, shape)
