"""clip_search: scales and zero points with the least error of a weight, not those of its range.

A range that cuts off the greatest weights has smaller steps for all others. The error is the sum of
squares of the weights' changes, or, with a Hessian, of the changes of the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchquant.algorithms.integer_weight import IntegerWeight, check_weights, rounded
from torchquant.configs import Weights
from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import MIN_SCALE
from torchquant.functional.qparams import qparams_from_range
from torchquant.scheme import PerGroup, PerTensor

__all__ = [
    "clip_search",
    "column_groups",
    "fitted_parameters",
    "least_error_parameters",
    "range_parameters",
    "steps_of",
]

_RATIOS = tuple(1 - 0.05 * step for step in range(17))  # of the range, down to a fifth
_FITS = 3  # times that scales are fitted to integers, and integers to scales


@torch.no_grad()
def clip_search(
    weight: Tensor,
    weights: Weights,
    hessian: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
) -> IntegerWeight:
    """Round a weight on the scales and zero points that give the least error.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``; finite.
        weights: per tensor, per output channel or in groups.
        hessian: what weighs the changes of the weights. None weighs them alike; float ``[K]`` is
            the diagonal of a Hessian. With a whole Hessian ``[K, K]`` the changes of the weights
            that share a scale are weighed together, so that their errors may cancel.
        inputs: float ``[n, K]`` instead of a Hessian: inputs of the layer, whose outputs count.

    Returns:
        The integers. No channel or group has a greater error than with the scale of its range.

    Raises:
        TypeError: weight is not a float tensor, or weights is not a :class:`torchquant.Weights`.
        ValueError: a shape is wrong, or the weight or the Hessian is not finite.

    Example:
        >>> weight = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([4.0])]).view(1, 64)
        >>> found = clip_search(weight, Weights(4))
        >>> bool(found.scale < 4 / 7)
        True
    """
    check_weights("clip_search", weight, weights)
    terms = weight.shape[1]
    if not bool(weight.isfinite().all()):
        raise ValueError("clip_search: weight must be finite, got NaN or infinities")
    _check_importance(terms, hessian, inputs)
    columns = weight.detach().float().t().contiguous()  # [K, N]
    shared = weights.granularity == PerTensor()
    scales, zeros = [], []
    for part in column_groups(terms, weights):
        importance = _part_of(hessian, inputs, part)
        scale, zero = least_error_parameters(columns[part], weights, importance, shared=shared)
        scales.append(scale)
        zeros.append(zero)
    grouped = isinstance(weights.granularity, PerGroup)
    scale, zero = (torch.stack(some, 1) if grouped else some[0] for some in (scales, zeros))
    return rounded(weight, weights, scale, None if weights.symmetric else zero.to(torch.int8))


def column_groups(terms: int, weights: Weights) -> list[slice]:
    """The inputs that share scales: one part for all, or one per group.

    Example:
        >>> column_groups(80, Weights(granularity=PerGroup(32)))
        [slice(0, 32, None), slice(32, 64, None), slice(64, 80, None)]
    """
    granularity = weights.granularity
    size = granularity.group_size if isinstance(granularity, PerGroup) else terms
    return [slice(first, min(terms, first + size)) for first in range(0, terms, size)]


def range_parameters(
    columns: Tensor, weights: Weights, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover the range of the weights of each output.

    Args:
        columns: float32 ``[..., K, N]``: K weights of each of N outputs.
        weights: bits and symmetry.
        shared: whether all outputs share a scale.

    Returns:
        float32 ``[..., N]`` each.

    Example:
        >>> range_parameters(torch.tensor([[7.0, -1.0], [-3.0, 14.0]]), Weights(4))
        (tensor([1., 2.]), tensor([0., 0.]))
    """
    least, greatest = torch.aminmax(columns, dim=-2)
    if shared:
        least, greatest = least.amin().expand_as(least), greatest.amax().expand_as(greatest)
    return _covering(least, greatest, weights)


def least_error_parameters(
    columns: Tensor,
    weights: Weights,
    importance: Tensor | None = None,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points with the least error, for weights that share them.

    Fractions of the range are tried; then scales and zero points are fitted to the integers by
    least squares and the integers rounded again, a few times.

    Args:
        columns: float32 ``[..., K, N]``: K weights of each of N outputs, which share a scale.
        weights: bits and symmetry.
        importance: float32 ``[..., K]``, which weighs the squares of the changes; or
            ``[..., K, K]``, a quadratic form of the changes; None weighs them alike. It has one
            dimension less than ``columns``, or as many.
        shared: whether all outputs share a scale, too.

    Returns:
        float32 scales and zero points ``[..., N]``.

    Example:
        >>> columns = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([4.0])]).view(64, 1)
        >>> scale, _ = least_error_parameters(columns, Weights(4))
        >>> bool(scale < 4 / 7)
        True
    """
    form = _Form(importance, columns, shared)
    best = _Best(columns, weights, form)
    best.take(range_parameters(columns, weights, shared=shared))
    if importance is not None and form.full:  # many local minima: begin at that of the diagonal
        diagonal = importance.diagonal(dim1=-2, dim2=-1)
        best.take(least_error_parameters(columns, weights, diagonal, shared=shared))
    for candidate in _candidates(columns, weights, shared):
        best.take(candidate)
    for _ in range(_FITS):
        steps = steps_of(columns, best.scale, best.zero, weights)
        found = (columns, steps, best.scale, best.zero, weights, importance)
        if not best.take(fitted_parameters(*found, shared=shared)):
            break
    return best.scale, best.zero


class _Best:
    """The scales and zero points with the least error so far."""

    scale: Tensor
    zero: Tensor
    error: Tensor | None = None

    def __init__(self, columns: Tensor, weights: Weights, form: _Form) -> None:
        self.columns, self.weights, self.form = columns, weights, form

    def take(self, candidate: tuple[Tensor, Tensor]) -> bool:
        """Take the candidate for the outputs where it is better; False if there is none."""
        scale, zero = candidate
        steps = steps_of(self.columns, scale, zero, self.weights)
        error = self.form.error(self.columns - steps * scale.unsqueeze(-2))
        if self.error is None:
            self.scale, self.zero, self.error = scale, zero, error
            return True
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        return bool(better.any())


def fitted_parameters(
    columns: Tensor,
    steps: Tensor,
    scale: Tensor,
    zero: Tensor,
    weights: Weights,
    importance: Tensor | None = None,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scale that fits integers best by least squares, after the zero point if there is one.

    The weights are ``scale * (steps + shift)`` with a real shift, which is then rounded, so that
    the zero point stays an integer.

    Args:
        columns: float32 ``[..., K, N]``.
        steps: float32 ``[..., K, N]``, the integers minus ``zero``.
        scale, zero: float32 ``[..., N]``; what cannot be fitted stays.
        weights: bits and symmetry.
        importance, shared: see :func:`least_error_parameters`.

    Example:
        >>> columns, steps = torch.tensor([[1.0], [2.1]]), torch.tensor([[2.0], [4.0]])
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> fitted_parameters(columns, steps, one, zero, Weights(4))[0]
        tensor([0.5200])
    """
    weigh = _Form(importance, columns, shared)
    if not weights.symmetric:
        ones = torch.ones_like(columns)
        of_steps, of_ones = weigh.times(steps), weigh.times(ones)
        ss, so, oo = (
            weigh.product(of_steps, steps),
            weigh.product(of_steps, ones),
            weigh.product(of_ones, ones),
        )
        sw, ow = weigh.product(of_steps, columns), weigh.product(of_ones, columns)
        slope, offset = sw * oo - so * ow, ss * ow - so * sw  # both times the determinant
        qmin, qmax = weights.range
        moved = (zero - offset / slope).round().clamp(qmin, qmax)
        moved = torch.where(moved.isfinite() & (slope > 0), moved, zero)
        steps = steps + (zero - moved).unsqueeze(-2)
        zero = moved
    of_steps = weigh.times(steps)
    fitted = weigh.product(of_steps, columns) / weigh.product(of_steps, steps)
    usable = fitted.isfinite() & (fitted >= MIN_SCALE)
    return torch.where(usable, fitted, scale), zero


def steps_of(columns: Tensor, scale: Tensor, zero: Tensor, weights: Weights) -> Tensor:
    """``q - z`` of weights ``[..., K, N]`` that are rounded to the nearest integers, as float32.

    Example:
        >>> steps_of(torch.tensor([[7.0], [-3.4]]), torch.ones(1), torch.zeros(1), Weights(4))
        tensor([[ 7.],
                [-3.]])
    """
    qmin, qmax = weights.range
    steps = (columns * reciprocal(scale).unsqueeze(-2)).round_()
    if weights.symmetric:
        return steps.clamp_(qmin, qmax)
    low, high = (qmin - zero).unsqueeze(-2), (qmax - zero).unsqueeze(-2)
    return torch.minimum(torch.maximum(steps, low), high)


class _Form:
    """The quadratic form that measures an error, summed over the weights that share a scale."""

    def __init__(self, importance: Tensor | None, columns: Tensor, shared: bool) -> None:
        self.importance, self.shared = importance, shared
        self.full = importance is not None and importance.dim() == columns.dim()

    def times(self, change: Tensor) -> Tensor:
        """The form as a matrix, times changes ``[..., K, N]``."""
        if self.importance is None:
            return change
        if self.full:
            return self.importance @ change
        return self.importance.unsqueeze(-1) * change

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The sum of products ``[..., N]``; the same for all outputs if they share a scale."""
        found = (first * second).sum(-2)
        return found.sum().expand_as(found) if self.shared else found

    def error(self, change: Tensor) -> Tensor:
        return self.product(self.times(change), change)


def _candidates(columns: Tensor, weights: Weights, shared: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points of parts of the range."""
    least, greatest = torch.aminmax(columns, dim=-2)
    if shared:
        least, greatest = least.amin().expand_as(least), greatest.amax().expand_as(greatest)
    for ratio in _RATIOS[1:]:
        yield _covering(least * ratio, greatest * ratio, weights)
    if not weights.symmetric:
        for ratio in _RATIOS[1::2]:
            yield _covering(least * ratio, greatest, weights)
            yield _covering(least, greatest * ratio, weights)


def _covering(least: Tensor, greatest: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    qmin, qmax = weights.range
    scale, zero = qparams_from_range(
        least.contiguous(),
        greatest.contiguous(),
        qmin=qmin,
        qmax=qmax,
        symmetric=weights.symmetric,
    )
    return scale, zero.float()


def _part_of(hessian: Tensor | None, inputs: Tensor | None, part: slice) -> Tensor | None:
    """What weighs the changes of the weights that share a scale."""
    if inputs is not None:
        rows = inputs[:, part].detach().float()
        return rows.t() @ rows
    if hessian is None:
        return None
    found = hessian.detach().float()
    return found[part] if found.dim() == 1 else found[part, part]


def _check_importance(terms: int, hessian: Tensor | None, inputs: Tensor | None) -> None:
    if hessian is not None and inputs is not None:
        raise ValueError("clip_search: hessian or inputs must be None, got both; pass one of them")
    if hessian is not None and tuple(hessian.shape) not in ((terms,), (terms, terms)):
        raise ValueError(
            f"clip_search: hessian must have shape [{terms}] or [{terms}, {terms}], got "
            f"{list(hessian.shape)}"
        )
    if inputs is not None and (inputs.dim() != 2 or inputs.shape[1] != terms):
        raise ValueError(
            f"clip_search: inputs must have shape [n, {terms}], got {list(inputs.shape)}"
        )
    for name, value in (("hessian", hessian), ("inputs", inputs)):
        if value is not None and not bool(value.isfinite().all()):
            raise ValueError(f"clip_search: {name} must be finite, got NaN or infinities")
