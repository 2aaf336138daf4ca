"""Converted models with regions, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchquant
from support.chain_models import Sequence, images, with_statistics

CONFIG = torchquant.Int8StaticActivationInt8WeightConfig(observer="minmax")


def input_of(cls: Any, batch: int = 3) -> Tensor:
    x = images(batch)
    return x.flatten(2)[:, :, :60].contiguous() if cls is Sequence else x


def converted(cls: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Any]:
    """A converted model, an input, and the outputs of the float model."""
    torch.manual_seed(0)
    model, x = with_statistics(cls()), input_of(cls)
    with torch.no_grad():
        wanted = plain(model(x))
    torchquant.prepare_(model, CONFIG)
    torchquant.calibrate(model, [x])
    torchquant.convert_(model)
    return model, x, wanted


def plain(output: Any) -> Tensor:
    result: Tensor = output["out"] if isinstance(output, dict) else output
    return result
