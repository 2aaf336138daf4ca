"""The observer that a configuration of static activations names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchquant.configs import (
    Calibration,
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Percentile,
    Static,
)
from torchquant.training.entropy import EntropyObserver
from torchquant.training.observers import MinMaxObserver, MovingAverageMinMaxObserver, Observer
from torchquant.training.percentile import PercentileObserver
from torchquant.training.processes import ALONE
from torchquant.training.squared_error import HistogramObserver

# For each part, the observer that it names, and the part's arguments for it.
_OBSERVERS: dict[type[Calibration], Callable[..., Observer]] = {
    MinMax: MinMaxObserver,
    MovingAverage: MovingAverageMinMaxObserver,
    Percentile: PercentileObserver,
    Histogram: HistogramObserver,
    Entropy: EntropyObserver,
}


def observer_for(activations: Static, device: torch.device | str | None = None) -> Observer:
    """Create the observer that ``activations`` names, without data; ``Histogram()`` for None.

    It sees the values of its own process only; :meth:`Observer.reduced` combines the processes.

    Raises:
        TypeError: no observer is known for the part.

    Example:
        >>> type(observer_for(Static())).__name__
        'HistogramObserver'
        >>> observer_for(Static(observer=Percentile(99.0))).percentile
        99.0
    """
    part = activations.observer or Histogram()
    make = _OBSERVERS.get(type(part))
    if make is None:
        known = ", ".join(kind.__name__ for kind in _OBSERVERS)
        raise TypeError(
            f"observer_for: observer must be one of {known}, got {part!r}; add its class with "
            "torchquant.observers.register_observer"
        )
    qmin, _ = activations.range
    arguments: dict[str, Any] = dict(vars(part))
    return make(
        **arguments,
        bits=activations.bits,
        symmetric=activations.symmetric,
        narrow_range=qmin != -(1 << (activations.bits - 1)),
        process_group=ALONE,
        device=device,
    )


def register_observer(part: type[Calibration], observer: Callable[..., Observer]) -> None:
    """Let configurations name another observer.

    Args:
        part: a subclass of :class:`torchquant.configs.Calibration`.
        observer: takes the fields of the part and the arguments of :class:`Observer`, by name;
            usually the class of the observer.

    Raises:
        TypeError: part is not such a class.
        ValueError: part is registered already.

    Example:
        >>> register_observer(MinMax, MinMaxObserver)
        Traceback (most recent call last):
        ValueError: register_observer: part must be a new class, got MinMax, which is registered
    """
    if not (isinstance(part, type) and issubclass(part, Calibration)):
        raise TypeError(
            "register_observer: part must be a subclass of torchquant.configs.Calibration, got "
            f"{part!r}"
        )
    if part in _OBSERVERS:
        raise ValueError(
            f"register_observer: part must be a new class, got {part.__name__}, which is registered"
        )
    _OBSERVERS[part] = observer


__all__ = ["observer_for", "register_observer"]
