"""What the demo measures of a model: latency, and the size of its state."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one forward pass over ``batch`` images."""

    batch: int
    float_ms: float
    int8_ms: float


def state_dict_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the model's state dict, which a file of it contains.

    Example:
        >>> import torch
        >>> from torchquant.demo import state_dict_bytes
        >>> state_dict_bytes(torch.nn.Linear(10, 2))
        88
    """
    tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_latency(
    float_model: nn.Module, int8_model: nn.Module, images: Tensor, seconds: float
) -> Latency:
    """Time both models for about ``seconds``, in turns, so that a drifting clock affects both."""
    times: dict[nn.Module, list[float]] = {float_model: [], int8_model: []}
    for model in times:
        for _ in range(5):
            model(images)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[int8_model]) < 5:
        for model, durations in times.items():
            begin = time.perf_counter()
            model(images)
            durations.append(1e3 * (time.perf_counter() - begin))
    medians = (statistics.median(durations) for durations in times.values())
    return Latency(len(images), *medians)
