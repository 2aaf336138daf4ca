"""A norm beside an operator: formulas to try, both results, and what counts as equal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchquant.nn.norm_recipe import NormRecipe
from torchquant.nn.norm_specimen import RefusedError

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")
_EPS_VALUES = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-3, torch.finfo(torch.float32).eps, 0.0)

_FLOAT32_ERROR = 2e-6  # relative to the row; two orders of summing thousands of squares differ less
_ROUNDINGS = 2.0  # units of half precision by which a norm that rounds more often may differ


def candidates(copy: nn.Module) -> Iterator[NormRecipe]:
    """Formulas for a norm with these parameters, the likely ones first."""
    names = [name for name, value in copy._parameters.items() if value is not None]
    absent = [name for name, value in copy._parameters.items() if value is None]
    values = [getattr(copy, name, None) for name in _EPS_NAMES]
    values += [value for value in vars(copy).values() if isinstance(value, float)]
    eps = [float(v) for v in values if isinstance(v, (int, float)) and 0.0 <= v < 1.0]
    families: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for family, value, one_plus in itertools.product(
        families, dict.fromkeys([*eps, *_EPS_VALUES]), (False, True)
    ):
        if not names and not one_plus:
            # A parameter that is None now may be set later: its name makes that visible.
            weight, bias = [*absent, None, None][:2]
            yield NormRecipe(family, weight, bias, value)
        elif len(names) == 1:
            bias = absent[0] if absent and family == "layer" else None
            yield NormRecipe(family, names[0], bias, value, one_plus)
        elif len(names) == 2 and family == "layer":
            yield NormRecipe(family, names[0], names[1], value, one_plus)
            yield NormRecipe(family, names[1], names[0], value, one_plus)


def parameters_of(recipe: NormRecipe, copy: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The norm's parameters that the recipe uses as weight and bias."""
    values = copy._parameters
    return (
        None if recipe.weight is None else values[recipe.weight],
        None if recipe.bias is None else values[recipe.bias],
    )


def theirs(copy: nn.Module, input: Tensor) -> Any:
    """The norm's result; a norm that changes its input is refused."""
    given = input.clone()
    with torch.no_grad():
        output = copy.forward(given)
    if not torch.equal(given, input):
        raise RefusedError("its forward changes its input")
    return output


@dataclasses.dataclass(frozen=True)
class Ours:
    """An operator's result.

    Attributes:
        values: the result.
        size: for each element, the size of its summands.
        largest: the same, but the largest of each row.
    """

    values: Tensor
    size: Tensor
    largest: Tensor


def ours(recipe: NormRecipe, copy: nn.Module, input: Tensor) -> Ours:
    """The operator's result, with the sizes by which rounding errors are measured."""
    with torch.no_grad():
        values = recipe.compute(copy._parameters, input)
        bias = parameters_of(recipe, copy)[1]
        dimension = 1 if recipe.channels_first else -1
        size = values.double().abs()
        if bias is not None:
            wide = bias.double()
            wide = wide[:, None, None] if recipe.channels_first else wide
            size = (values.double() - wide).abs() + wide.abs()
        return Ours(values, size, size.nan_to_num().amax(dimension, keepdim=True))


def same(theirs: Any, ours: Ours) -> bool:
    """True if two results are equal but for rounding, and of one type, shape, dtype and layout."""
    values = ours.values
    if type(theirs) is not type(values) or theirs.layout is not torch.strided:
        return False
    if theirs.dtype != values.dtype or theirs.shape != values.shape:
        return False
    if theirs.device != values.device or _strides(theirs) != _strides(values):
        return False
    allowed = _FLOAT32_ERROR * ours.largest
    if values.dtype != torch.float32:
        limits = torch.finfo(values.dtype)
        allowed = allowed + _ROUNDINGS * limits.eps * (ours.size + limits.tiny)
    near = (theirs.double() - values.double()).abs() <= allowed
    return bool((near | (theirs.isnan() & values.isnan())).all())


def _strides(tensor: Tensor) -> list[int]:
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for length, stride in pairs if length > 1]
