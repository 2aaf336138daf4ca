"""Observers in two processes, for tests of what they must agree on."""

from typing import Any

from torch import Tensor

import torchquant
from torchquant import PerAxis
from torchquant.observers import (
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    Observer,
    PercentileObserver,
)
from torchquant.training.processes import ALONE

OBSERVERS: dict[str, Any] = {
    "min_max": lambda: MinMaxObserver(process_group=ALONE),
    "channels": lambda: MinMaxObserver(granularity=PerAxis(0), process_group=ALONE),
    "percentile": lambda: PercentileObserver(99.0, 64),
    "percentile channels": lambda: PercentileObserver(90.0, 64, granularity=PerAxis(0)),
    "histogram": lambda: HistogramObserver(64),
    "symmetric histogram": lambda: HistogramObserver(64, bits=4, symmetric=True),
    "entropy": lambda: EntropyObserver(256, 16),
}


def observed(name: str, batches: list[Tensor]) -> Observer:
    observer: Observer = OBSERVERS[name]()
    for batch in batches:
        observer(batch)
    return observer


def state(observer: Observer) -> dict[str, Tensor]:
    scale, zero_point = observer.calculate_qparams()
    return {**observer.state_dict(), "scale": scale, "zero_point": zero_point}


def reduced_in_process(rank: int, divisions: list[list[list[Tensor]]]) -> Any:
    """For each division of the batches, the reduced state of each observer; and refusals."""
    states = [
        {name: state(observed(name, batches[rank]).reduced()) for name in OBSERVERS}
        for batches in divisions
    ]
    messages = []
    for observer in (
        torchquant.MinMaxObserver(bits=4 + rank, process_group=ALONE),
        observed("channels", [divisions[0][0][0][: 2 + rank]]),
    ):
        try:
            observer.reduced()
        except ValueError as error:
            messages.append(str(error))
    return states, messages
