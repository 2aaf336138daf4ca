"""Folding: divide the channels of a norm or of a layer, multiply the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["FoldUndo", "ScalingGroup", "fold"]


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """Layers that read the same channels, and the norm or the layer that produces the channels.

    Dividing the channels by factors and multiplying the columns that read them by the same factors
    does not change what the model computes.

    Attributes:
        layers: names of the modules that read the channels.
        producer: name of the module that produces the channels.
        kind: "norm" for a norm or another vector that scales channels, "linear" for a matrix.
        channels: int64 ``[K]``, the channel of the producer that each column of the layers reads;
            -1 for a column that reads another value, whose factor is 1. Several columns may read
            one channel: grouped heads of attention repeat the heads of the values.
        count: the number of channels of the producer.
        readers: names of the weights that read the channels, each with the dimension that has the
            columns.
        written: names of the parameters that produce the channels, each with the dimension of the
            channels and a constant that the model adds to the parameter.

    Example:
        >>> group = ScalingGroup(
        ...     ("fc",), "norm", "norm", torch.arange(2), 2, (("fc.weight", 1),),
        ...     (("norm.weight", 0, 0.0),))
        >>> group.repeat
        1
    """

    layers: tuple[str, ...]
    producer: str
    kind: str
    channels: Tensor
    count: int
    readers: tuple[tuple[str, int], ...]
    written: tuple[tuple[str, int, float], ...]

    @property
    def repeat(self) -> int:
        """The greatest number of columns that read one channel."""
        used = self.channels[self.channels >= 0]
        return int(used.bincount().max()) if len(used) else 0

    def parameters(self) -> list[str]:
        """Names of the parameters that :func:`fold` changes."""
        return [name for name, *_ in self.written] + [name for name, _ in self.readers]

    def largest(self, values: Tensor) -> Tensor:
        """For each column the greatest of the values of all columns that read the same channel.

        Args:
            values: float ``[K]``.

        Example:
            >>> group = ScalingGroup(
            ...     ("out",), "v", "linear", torch.tensor([0, 1, 0, 1]), 2, (), ())
            >>> group.largest(torch.tensor([1.0, 5.0, 3.0, 2.0]))
            tensor([3., 5., 3., 5.])
        """
        return self._shared(values, "amax")

    def mean(self, values: Tensor) -> Tensor:
        """For each column the mean of the values of all columns that read the same channel.

        Args:
            values: float ``[K]``.

        Example:
            >>> group = ScalingGroup(
            ...     ("out",), "v", "linear", torch.tensor([0, 1, 0, 1]), 2, (), ())
            >>> group.mean(torch.tensor([1.0, 5.0, 3.0, 3.0]))
            tensor([2., 4., 2., 4.])
        """
        return self._shared(values, "mean")

    def free(self, factors: Tensor) -> Tensor:
        """Factors with 1 for the columns whose factor must be 1."""
        return torch.where(self.channels.to(factors.device) >= 0, factors, torch.ones_like(factors))

    def _shared(self, values: Tensor, how: str) -> Tensor:
        channels = self.channels.to(values.device)
        read = channels >= 0
        empty = values.new_zeros(self.count)
        shared = empty.scatter_reduce(0, channels[read], values[read], how, include_self=False)
        return torch.where(read, shared[channels.clamp(min=0)], values)


class FoldUndo:
    """The parameters that :func:`fold` changed, to be restored.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
        >>> group = ScalingGroup(
        ...     ("1",), "0", "norm", torch.arange(2), 2, (("1.weight", 1),),
        ...     (("0.weight", 0, 0.0), ("0.bias", 0, 0.0)))
        >>> undo = fold(model, group, torch.tensor([2.0, 4.0]))
        >>> model[0].weight.tolist()
        [0.5, 0.25]
        >>> undo.restore()
        >>> model[0].weight.tolist()
        [1.0, 1.0]
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their values of before."""
        for parameter, value in self.kept:
            parameter.copy_(value)


@torch.no_grad()
def fold(model: nn.Module, group: ScalingGroup, factors: Tensor) -> FoldUndo:
    """Divide the channels of a group by factors, and multiply the columns that read them.

    What the model computes stays the same, except for rounding.

    Args:
        model: the float model in which the group was found.
        group: from :func:`torchquant.algorithms.find_scaling_groups`.
        factors: float ``[K]``, positive; a factor for each column of the layers, equal for columns
            that read the same channel, and 1 for columns that read none.

    Returns:
        An object whose ``restore()`` undoes the change.

    Raises:
        ValueError: factors do not fit the group; the model is unchanged.

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).eval()
        >>> x = torch.randn(5, 4)
        >>> before = model(x)
        >>> (group,) = torchquant.algorithms.find_scaling_groups(model, [x]).groups
        >>> _ = fold(model, group, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> torch.allclose(model(x), before, atol=1e-6), model[0].weight.tolist()[:2]
        (True, [1.0, 0.5])
    """
    columns = factors.detach().double()
    channels = group.channels.to(columns.device)
    if columns.shape != channels.shape:
        raise ValueError(
            f"fold: factors must have the shape {list(channels.shape)} of the group's columns, got "
            f"{list(columns.shape)}"
        )
    if not bool((columns.isfinite() & (columns > 0)).all()):
        raise ValueError("fold: factors must be positive and finite, got others")
    read = channels >= 0
    produced = columns.new_ones(group.count)
    produced[channels[read]] = columns[read]
    if not torch.equal(torch.where(read, produced[channels.clamp(min=0)], 1.0), columns):
        raise ValueError(
            "fold: factors must be equal for columns that read the same channel and 1 for columns "
            "that read none, got others; group.largest, group.mean and group.free give such factors"
        )
    undo = FoldUndo(model.get_parameter(name) for name in group.parameters())
    try:
        for name, axis, offset in group.written:
            parameter = model.get_parameter(name)
            divisor = _along(produced, parameter, axis)
            parameter.copy_((parameter.double() + offset) / divisor - offset)
        for name, axis in group.readers:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.double() * _along(columns, parameter, axis))
    except BaseException:
        undo.restore()
        raise
    return undo


def _along(values: Tensor, parameter: Tensor, axis: int) -> Tensor:
    """A vector in the shape that multiplies a dimension of a parameter."""
    shape = [1] * parameter.dim()
    shape[axis] = -1
    return values.to(parameter.device).view(shape)
