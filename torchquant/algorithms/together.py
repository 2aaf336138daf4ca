"""Processes that compress one model together: they share values and take the same decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from torchquant.training.processes import processes_of

__all__ = ["agreed", "every", "from_process", "in_all", "place_among"]

Value = TypeVar("Value")


def place_among() -> tuple[int, int]:
    """The number of this process and of all processes; ``(0, 1)`` without torch.distributed.

    Example:
        >>> place_among()
        (0, 1)
    """
    processes = processes_of(None)
    return (0, 1) if processes == 1 else (dist.get_rank(), processes)


def agreed(make: Callable[[], Value]) -> Value:
    """What the first process makes; the others do not call the function.

    All processes raise if it fails.

    Example:
        >>> agreed(lambda: 3)
        3
    """
    number, processes = place_among()
    if processes == 1:
        return make()
    made = in_all(make if number == 0 else lambda: None)
    return from_process(made, 0)


def in_all(act: Callable[[], Value]) -> Value:
    """Call a function in each process; all processes raise if it fails in one.

    A process that went on alone would wait for the others in its next collective.

    Raises:
        RuntimeError: it failed in another process.

    Example:
        >>> in_all(lambda: 3)
        3
    """
    if place_among()[1] == 1:
        return act()
    value, error = None, None
    try:
        value = act()
    except Exception as raised:
        error = raised
    text = None if error is None else f"{type(error).__name__}: {error}"
    failed = [(number, one) for number, one in enumerate(every(text)) if one is not None]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"process {failed[0][0]} failed: {failed[0][1]}")
    return value  # type: ignore[return-value]


def from_process(value: Value | None, source: int) -> Value:
    """The value of one process.

    Example:
        >>> from_process(3, 0)
        3
    """
    values = [value]
    if place_among()[1] > 1:
        dist.broadcast_object_list(values, src=source)
    return values[0]  # type: ignore[return-value]


def every(value: Value) -> list[Value]:
    """The values of all processes in the order of their numbers.

    Example:
        >>> every(3)
        [3]
    """
    processes = place_among()[1]
    if processes == 1:
        return [value]
    values: list[Value] = [value] * processes
    dist.all_gather_object(values, value)
    return values
