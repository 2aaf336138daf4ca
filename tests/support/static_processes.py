"""Static quantization in two processes, each with its own batches."""

import torch
from torch import Tensor

from support.calibrated_models import mlp, static
from torchquant import calibrate, convert_, prepare_

NAMES = ("minmax", "percentile", "histogram", "entropy")


def calibrated_alone(batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """The state of the converted model, for each observer."""
    states = {}
    for name in NAMES:
        model = mlp()
        prepare_(model, static(observer=name))
        calibrate(model, batches)
        convert_(model)
        states[name] = model.state_dict()
    return states


def calibrated_in_process(rank: int, batches: list[list[Tensor]]) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    return calibrated_alone(batches[rank])
