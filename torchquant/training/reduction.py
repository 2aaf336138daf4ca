"""The states of one observer in all processes of a group."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from torchquant.training.processes import gather

_MOST_DIMENSIONS = 8


def common_shape(like: Tensor, described: str, who: str, group_name: str | None) -> Any:
    """The shape of the scales in the processes that have data; ``(0,)`` if none has.

    All processes call this function and raise the same error.

    Args:
        like: the scales of this process; its device carries the collective.
        described: class and arguments of the observer, which must be the same everywhere.
        who: what messages start with.
        group_name: the processes.

    Raises:
        ValueError: the processes describe their observers differently, or the shapes differ.
    """
    shape = tuple(like.shape)
    values = [zlib.crc32(described.encode()), len(shape), *shape]
    values += [0] * (_MOST_DIMENSIONS + 2 - len(values))
    everyone = gather(like.new_tensor(values, dtype=torch.int64), group_name).tolist()
    if len({row[0] for row in everyone}) > 1:
        raise ValueError(
            f"{who}: all processes must hold observers with the same arguments, got {described} "
            "here and another one elsewhere; prepare the same model with the same configuration "
            "in each"
        )
    shapes = {tuple(row[2 : 2 + row[1]]) for row in everyone}
    if len(shapes) > 1:
        shapes.discard((0,))
    if len(shapes) > 1:
        texts = ", ".join(str(list(found)) for found in sorted(shapes))
        raise ValueError(
            f"{who}: all processes must have ranges of one shape, got {texts}; use one observer "
            "for each tensor"
        )
    return shapes.pop()


def states_of_processes(
    buffers: dict[str, Tensor], group_name: str | None
) -> list[dict[str, Tensor]]:
    """Buffers of the same shapes in each process, in the order of the processes.

    They are float32 or int64; one collective carries the bits of all.

    Example:
        >>> states_of_processes({"range": torch.tensor([0.5])}, None)
        [{'range': tensor([0.5000])}]
    """
    numbers = torch.cat(
        [
            (tensor.view(torch.int32) if tensor.is_floating_point() else tensor).flatten().long()
            for tensor in buffers.values()
        ]
    )
    states = []
    for row in gather(numbers, group_name):
        parts = row.split([tensor.numel() for tensor in buffers.values()])
        state = {}
        for (name, tensor), part in zip(buffers.items(), parts, strict=True):
            if tensor.is_floating_point():
                part = part.to(torch.int32).view(torch.float32)
            state[name] = part.view(tensor.shape)
        states.append(state)
    return states
