"""A weight as a checkpoint stores it, and the integers that our layers take from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchquant.configs import Weights
from torchquant.scheme import PER_CHANNEL, PerGroup

MIN_SCALE = 2.0**-126


# What the user can do about a checkpoint that is damaged, or not that of the model, or of a kind
# that is not read.
DAMAGED = "the checkpoint is damaged, so download it or write it again"
MISFIT = "build the model from the configuration of the checkpoint, or write the checkpoint again"
UNKNOWN = "write it in another layout with the library that made it"


class Unreadable(Exception):
    """Raised for a checkpoint that is damaged or of a kind that is not read.

    Args:
        problem: what is wrong, and where.
        remedy: what the user can do about it.

    Example:
        >>> print(Unreadable("fc.scales is missing", DAMAGED))
        fc.scales is missing; the checkpoint is damaged, so download it or write it again
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")


@dataclass(frozen=True)
class Integers:
    """The canonical tensors of a layer.

    Attributes:
        qweight: int8 ``[N, K]``.
        scale: float32 ``[N]``, or ``[N, groups]``.
        zero_point: int8 of scale's shape, or None.
        weights: what they are.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    weights: Weights


class StoredWeight:
    """One weight of a checkpoint.

    A subclass defines :meth:`integers`, or :meth:`rows` for a weight that our formats do not hold.

    Attributes:
        form: how the checkpoint stores it, in words.
        shape: ``(N, K)``, outputs first.
        activations: what the checkpoint says about the inputs of the layer: a part of a
            configuration, or None for float inputs.
        why: why :meth:`integers` has none.
        names: the names of its tensors in a safetensors file.
    """

    form: str
    shape: tuple[int, int]
    activations: Any = None
    why: str = ""
    names: tuple[str, ...] = ()

    def integers(self) -> Integers | None:
        """The integers of a layer with exactly these values; None if there are none."""
        return None

    def rows(self, first: int, last: int) -> Tensor:
        """The float32 values of some rows."""
        raise NotImplementedError

    def input(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of the input, for static activations."""
        return None

    def nearest(self, bits: int) -> tuple[Integers, float] | None:
        """Integers of ``bits`` bits and their relative error, if the layout has its own way."""
        return None


@dataclass(frozen=True)
class FloatTensor:
    """A float tensor of a checkpoint, read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    form: str = ""
    is_floating: bool = True


@dataclass
class Contents:
    """What a checkpoint holds for a model.

    Attributes:
        layout: its name, for the report.
        weights: quantized weights by the name of the layer.
        floats: the other tensors by their key in the model's state dict.
        ignored: names of tensors without a meaning for the model, each with the reason.
        notes: sentences for the report.
    """

    layout: str
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    floats: dict[str, FloatTensor] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Shapes = Mapping[str, tuple[int, int]]  # of the model's layers: name -> (outputs, inputs)


def canonical(
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int | None,
    where: str,
) -> Integers:
    """The canonical tensors of integers that may have negative scales, or scales of 0.

    Our scales are positive. ``(q - z) * s`` is ``(~q - ~z) * -s``, because ``~q = -1 - q``, which
    has as many bits as q. All values with a scale of 0 are 0. Zero points that are all 0 are left
    out. The values stay the same, bit by bit, except that -0 becomes 0.

    Args:
        qweight: int8 ``[N, K]``.
        scale: float ``[N, groups]``; ``[N, 1]`` for one scale per channel.
        zero_point: int8 of that shape, or None.
        bits: 2 to 8.
        group_size: None for one scale per channel.
        where: what messages call the weight.

    Raises:
        Unreadable: a scale is not finite or too small.

    Example:
        >>> q = torch.tensor([[3, -8]], dtype=torch.int8)
        >>> found = canonical(q, torch.tensor([[-0.5]]), None, 4, None, "fc")
        >>> found.qweight, found.scale, found.zero_point
        (tensor([[-4,  7]], dtype=torch.int8), tensor([0.5000]), tensor([-1], dtype=torch.int8))
    """
    scale = scale.to(torch.float32)
    size = qweight.shape[1] if group_size is None else group_size
    amount = scale.abs()
    if not bool(torch.isfinite(amount).all()):
        raise Unreadable(f"{where} must have finite scales, but some are NaN or infinite", DAMAGED)
    if bool(((amount < MIN_SCALE) & (amount > 0)).any()):
        raise Unreadable(
            f"{where} must have scales of at least 2^-126, but some are smaller",
            "write it again with larger scales",
        )
    for select, change in ((scale < 0, _inverted), (scale == 0, _cleared)):
        if bool(select.any()):
            if zero_point is None:
                zero_point = torch.zeros_like(scale, dtype=torch.int8)
            columns = select.repeat_interleave(size, 1)[:, : qweight.shape[1]]
            qweight = change(qweight, columns)
            zero_point = change(zero_point, select)
    scale = torch.where(amount == 0, 1.0, amount)
    if zero_point is not None and not bool(zero_point.any()):
        zero_point = None
    if group_size is None:
        scale = scale[:, 0].contiguous()
        zero_point = None if zero_point is None else zero_point[:, 0].contiguous()
    granularity = PER_CHANNEL if group_size is None else PerGroup(group_size)
    whole = bits == 8 and zero_point is None and int(qweight.min()) == -128
    weights = Weights(bits, zero_point is None, False if whole else None, granularity)
    return Integers(qweight, scale, zero_point, weights)


def _inverted(integers: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, ~integers, integers)


def _cleared(integers: Tensor, where: Tensor) -> Tensor:
    return integers.masked_fill(where, 0)


__all__ = ["canonical"]
