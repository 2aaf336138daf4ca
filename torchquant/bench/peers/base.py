"""The interface of a peer: load a layer, then provide ways of calling it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


class NotInThisTorch(RuntimeError):
    """A peer that was a part of torch, and is none of the installed release."""


class LinearPeer(ABC):
    """One library's int8 (or float) linear layer. Each instance lives alone in its own process.

    Quantizing and packing the weight is not part of a call; it happens once, in `load`.
    Quantizing the activation belongs to the call in the dynamic suite; a prequantized peer does it
    in `calls`, outside of the functions that it returns.

    Modules of peers import their libraries inside functions: the package works without them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Take a float layer, fp32 weight `[N, K]` and bias `[N]`, and convert it."""

    @abstractmethod
    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        """Ways of applying the loaded layer to fp32 `x` `[M, K]`, by name; the fastest one counts
        for the peer.

        Each call returns `[M, N]` as a tensor or an array.
        """

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Version, engine and instruction set, for readers of the results."""


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 `[N, K]` in [-127, 127] and fp32 scale `[N]`, for peers without a converter."""
    scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_input(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """int8 `[M, K]` in [-127, 127] and one scale, as after a calibration on `x`."""
    scale = max(float(x.abs().max()), 1e-12) / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def as_uint8(q: torch.Tensor) -> torch.Tensor:
    """The same integers, unsigned: the zero point becomes 128."""
    return (q.to(torch.int16) + 128).to(torch.uint8)


def float_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """An `nn.Linear` in evaluation mode that shares the given weight `[N, K]` and bias `[N]`."""
    out_features, in_features = weight.shape
    with torch.device("meta"):  # no initialisation, because the parameters are replaced
        linear = torch.nn.Linear(in_features, out_features, bias=bias is not None)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear.eval()
