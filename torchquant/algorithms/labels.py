"""Facts about tensors of a running model: labels of elements, parameters that a tensor shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class Labels:
    """A number for each element of a tensor; -1 for an element without one.

    Example:
        >>> import torch
        >>> Labels(torch.tensor([0, 1, -1])).used().tolist()
        [0, 1]
    """

    values: Tensor

    def used(self) -> Tensor:
        """The different numbers, sorted."""
        found: Tensor = shrunk(self.values).unique()
        return found[found >= 0]


@dataclass(frozen=True)
class Reference:
    """A tensor with the values of a parameter, perhaps transposed, and perhaps plus a constant.

    Attributes:
        name: the name of the parameter.
        axes: for each dimension of the tensor the dimension of the parameter that it shows whole
            and in order; None for another dimension.
        offset: the constant.

    Example:
        >>> Reference("fc.weight", (1, 0)).axes  # transposed
        (1, 0)
    """

    name: str
    axes: tuple[int | None, ...]
    offset: float = 0.0


class Zero:
    """A tensor of zeros."""


@dataclass(frozen=True)
class After:
    """A tensor whose labels ended with a function, which a reason can name.

    Example:
        >>> After("gelu").function
        'gelu'
    """

    function: str


@dataclass(frozen=True, eq=False)
class Squares:
    """A tensor of the squares of labelled elements.

    Example:
        >>> import torch
        >>> Squares(Labels(torch.tensor([0, 1]))).labels.used().tolist()
        [0, 1]
    """

    labels: Labels


Fact: TypeAlias = Labels | Reference | Zero | Squares


def shrunk(values: Tensor) -> Tensor:
    """Labels without repetitions along dimensions that were expanded.

    Example:
        >>> import torch
        >>> shrunk(torch.arange(3).expand(1000, 3)).shape
        torch.Size([1, 3])
    """
    for dimension in range(values.dim()):
        if values.stride(dimension) == 0 and values.shape[dimension] > 1:
            values = values.narrow(dimension, 0, 1)
    return values


def varies(values: Tensor, dimension: int) -> bool:
    """True if labels differ along a dimension.

    Example:
        >>> import torch
        >>> values = torch.tensor([[0, 1], [0, 1]])
        >>> varies(values, 0), varies(values, 1)
        (False, True)
    """
    small = shrunk(values)
    if small.shape[dimension] <= 1:
        return False
    return not bool((small == small.narrow(dimension, 0, 1)).all())


def along(values: Tensor) -> int | None:
    """The only dimension along which labels differ; None if there is none or several.

    Example:
        >>> import torch
        >>> along(torch.tensor([[0, 0], [1, 1]]))
        0
    """
    found = [dimension for dimension in range(values.dim()) if varies(values, dimension)]
    return found[0] if len(found) == 1 else None


def line(values: Tensor, dimension: int) -> Tensor | None:
    """The labels along a dimension, if they are the same at all places of the others.

    Example:
        >>> import torch
        >>> line(torch.tensor([[0, 1], [0, 1]]), -1), line(torch.tensor([[0, 1], [1, 0]]), -1)
        (tensor([0, 1]), None)
    """
    dimension %= max(values.dim(), 1)
    if values.numel() == 0:
        return None
    others = (other for other in range(values.dim()) if other != dimension)
    return None if any(varies(values, other) for other in others) else first_line(values, dimension)


def first_line(values: Tensor, dimension: int) -> Tensor:
    """The labels along a dimension at the first place of the others."""
    moved = values.movedim(dimension, -1)
    for _ in range(moved.dim() - 1):
        moved = moved[0]
    return moved


def names_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by their first names.

    Example:
        >>> list(names_of(nn.Sequential(nn.Linear(2, 2))))
        ['0.weight', '0.bias']
    """
    return dict(model.named_parameters())


def owner_of(parameter: str) -> str:
    """The name of the module that has a parameter.

    Example:
        >>> owner_of("layers.0.fc.weight")
        'layers.0.fc'
    """
    return parameter.rpartition(".")[0]


def common_owner(names: Iterable[str]) -> str:
    """The name of the innermost module that holds all the named ones.

    Example:
        >>> common_owner(["layers.0.attn.q", "layers.0.norm"])
        'layers.0'
    """
    parts: list[Sequence[str]] = [name.split(".") for name in names]
    shared = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)
