"""GPTQ: integers of a weight with a small error of the layer's outputs, column by column.

A column of the weight is rounded, and the columns after it are changed so that they make up for its
error as far as the Hessian H allows. With U, the upper Cholesky factor of the inverse of H::

    error = (w_i - q_i) / U[i, i]
    w_j -= error * U[i, j]        for all j > i

The scale of a group follows from the weights of the group as they are when its turn comes.
:mod:`torchquant.algorithms.descent` then improves single integers and scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchquant.algorithms.descent import descend
from torchquant.algorithms.gptq_problem import Problem
from torchquant.algorithms.integer_weight import IntegerWeight, check_weights, nearest
from torchquant.algorithms.least_error import (
    column_groups,
    least_error_parameters,
    range_parameters,
)
from torchquant.configs import Weights
from torchquant.functional._arithmetic import reciprocal
from torchquant.scheme import PerTensor

__all__ = ["GPTQResult", "gptq"]

_PIECE = 32  # columns that are rounded one by one before the rest of the block changes

Order = Literal["given", "activations"]
Parameters = tuple[Tensor, Tensor]
# Takes weights [G, K, n] that share scales, and their importance [G, K].
Choose = Callable[[Tensor, Tensor], Parameters]


@dataclass(frozen=True, eq=False)
class GPTQResult:
    """What :func:`gptq` found.

    Attributes:
        integers: the integers, scales and zero points.
        damping: what was added to the diagonal of the Hessian, as a fraction of its mean. It is
            greater than the argument if the Hessian could not be factored otherwise.
        dead_columns: number of inputs that were always 0; their weights are 0.
        nearest_error: the error of rounding to the nearest integers: ``trace(D H D^T)`` with the
            change D of the weight.
        error: the error of these integers; at most ``nearest_error``.
        fell_back: True if rounding to the nearest integers was the last resort, because the Hessian
            is 0; or is not finite or could not be factored, in a grouped convolution for a group.
            A group whose inputs were always 0 has the nearest integers besides.

    Example:
        >>> gptq(torch.ones(1, 2), torch.zeros(2, 2), Weights(4)).fell_back
        True
    """

    integers: IntegerWeight
    damping: float
    dead_columns: int
    nearest_error: float
    error: float
    fell_back: bool


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    weights: Weights,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "given",
    static_groups: bool | None = None,
    search_clip: bool = True,
    sweeps: int = 2,
) -> GPTQResult:
    """Choose the integers of a weight by the error of the layer's outputs.

    No output gets a greater error than from rounding to the nearest integers, because the better of
    both is taken for each output (for all outputs together if they share one scale).

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``; finite.
        hessian: float ``[K, K]``, see :class:`torchquant.algorithms.hessian.Hessian`; for grouped
            convolutions ``[G, K, K]``, one for each ``N / G`` outputs.
        weights: per tensor, per output channel or in groups.
        damping: what is added to the diagonal of the Hessian, as a fraction of the mean of the
            diagonal (of the inputs that are not always 0). If the Hessian cannot be factored, the
            damping is raised tenfold until it can.
        block_size: number of columns after which all later columns change. It changes the speed,
            and the result only by rounding.
        order: "given" rounds the inputs in their order, "activations" those with the greatest
            diagonal of the Hessian first. The integers are stored in the given order in both cases.
        static_groups: if True, the scales of all groups follow from the weights as they are at the
            beginning; None is True if ``order`` is "activations", which needs it.
        search_clip: whether scales and zero points are those of least error
            (:func:`torchquant.algorithms.least_error.clip_search`), where the error of a weight
            counts as much as GPTQ cannot make up for it; False takes those of the range.
        sweeps: how often single integers and scales are improved afterwards. With 0 and
            ``search_clip=False`` this is the algorithm of the paper alone.

    Returns:
        The integers, and what had to be done.

    Raises:
        TypeError: weight is not a float tensor, or weights is not a :class:`torchquant.Weights`.
        ValueError: a shape is wrong, the weight is not finite, or another argument is out of range.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (2022).

    Example:
        >>> x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).cumsum(0)
        >>> w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        >>> result = gptq(w, 2 / 200 * x @ x.t(), Weights(4))
        >>> result.error < 0.2 * result.nearest_error
        True
    """
    _check(weight, hessian, weights)
    _check_options(damping, block_size, order, static_groups, sweeps)
    by_activations, shared = order == "activations", weights.granularity == PerTensor()
    plain = nearest(weight, weights)
    problem = Problem.of(weight, hessian, damping=damping, by_activations=by_activations)
    if bool((problem.failed | problem.zero).all()):
        return _best(problem, plain, [], shared)
    parts = column_groups(weight.shape[1], weights)

    def choose(columns: Tensor, importance: Tensor) -> Parameters:
        if search_clip:
            return least_error_parameters(columns, weights, importance, shared=shared)
        return range_parameters(columns, weights, shared=shared)

    static = bool(static_groups) or by_activations or shared
    rounding = _Rounding(problem, weights, parts, choose, static)
    rounding.run(_blocks(parts, block_size))
    steps, scale, zero = rounding.integers(), rounding.scale, rounding.zero
    found = [_integer_weight(steps, scale, zero, weights)]
    if sweeps:  # with the damping, which may make the error itself greater
        scale = scale.clone()
        damped = problem.damped()
        if shared:  # one scale for Hessians in different units
            damped *= problem.weights_of_groups()[:, None, None]
        descend(problem.columns, damped, steps, scale, zero, weights, sweeps=sweeps, shared=shared)
        found.append(_integer_weight(steps, scale, zero, weights))
    return _best(problem, plain, found, shared)


class _Rounding:
    """The weight as its columns change one after the other, and what was chosen so far."""

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        parts: list[slice],
        choose: Choose,
        static: bool,
    ) -> None:
        groups, terms, outputs = problem.columns.shape
        self.problem, self.weights, self.choose = problem, weights, choose
        self.parts, self.static = parts, static
        self.place = problem.place.unsqueeze(2).expand(-1, -1, outputs)
        self.work = problem.columns.gather(1, self.place)
        self.factor = problem.factor
        self.in_order = bool((problem.place[:, 1:] > problem.place[:, :-1]).all())
        self.pivots = self.factor.diagonal(dim1=1, dim2=2)
        self.steps = torch.empty_like(self.work)  # q - z
        self.scale = torch.empty(groups, len(parts), outputs, device=self.work.device)
        self.zero, self.inverse = torch.zeros_like(self.scale), torch.empty_like(self.scale)
        self.group_of = [group for group, part in enumerate(parts) for _ in range(terms)[part]]
        # A change of column i costs pivots[i]^-2, after the later columns have made up for it.
        cost = self.pivots.square().reciprocal()
        self.importance = torch.empty_like(cost).scatter_(1, problem.place, cost)
        if static:
            for group, part in enumerate(parts):
                self._set(group, choose(problem.columns[:, part], self.importance[:, part]))

    def run(self, blocks: list[tuple[int, int]]) -> None:
        """Round all columns."""
        for first, end in blocks:
            errors = self._block(first, end)
            self._change(first, errors, end, None)

    def integers(self) -> Tensor:
        """``q - z`` of all columns ``[G, K, n]`` in the given order."""
        return torch.empty_like(self.steps).scatter_(1, self.place, self.steps)

    def _block(self, first: int, end: int) -> Tensor:
        """Round the columns of a block, change those inside it, and return the errors."""
        errors = torch.empty_like(self.work[:, first:end])
        begin = first
        while begin < end:
            group = self.group_of[begin]
            part = self.parts[group]
            stop = min(begin + _PIECE, end, part.stop)
            if not self.static and begin == part.start:
                self._set(group, self.choose(self.work[:, part], self.importance[:, part]))
            for column in range(begin, stop):
                error = errors[:, column - first]
                self._column(column, error)
                rest = self.factor[:, column, column + 1 : stop].unsqueeze(2)
                self.work[:, column + 1 : stop].addcmul_(rest, error.unsqueeze(1), value=-1)
            self._change(begin, errors[:, begin - first : stop - first], stop, end)
            begin = stop
        return errors

    def _column(self, column: int, error: Tensor) -> None:
        """Round a column and write its error, divided by the diagonal of U."""
        values, steps = self.work[:, column], self.steps[:, column]
        scale, inverse, zero = self._grid(column)
        qmin, qmax = self.weights.range
        torch.mul(values, inverse, out=steps).round_()
        if self.weights.symmetric:
            steps.clamp_(qmin, qmax)
        else:
            steps.clamp_(qmin - zero, qmax - zero)
        torch.mul(steps, scale, out=error)
        torch.sub(values, error, out=error).div_(self.pivots[:, column, None])

    def _grid(self, column: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, its inverse and zero point ``[G, n]`` of a column."""
        tensors = (self.scale, self.inverse, self.zero)
        if len(self.parts) == 1:
            scale, inverse, zero = (tensor[:, 0] for tensor in tensors)
        elif self.in_order:
            scale, inverse, zero = (tensor[:, self.group_of[column]] for tensor in tensors)
        else:
            size = self.parts[0].stop
            group = self.problem.place[:, column] // size
            each = torch.arange(len(group), device=group.device)
            scale, inverse, zero = (tensor[each, group] for tensor in tensors)
        return scale, inverse, zero

    def _set(self, group: int, parameters: Parameters) -> None:
        self.scale[:, group], self.zero[:, group] = parameters
        self.inverse[:, group] = reciprocal(self.scale[:, group])

    def _change(self, first: int, errors: Tensor, begin: int, end: int | None) -> None:
        """Let columns from ``begin`` on make up for the errors of columns from ``first`` on."""
        later = self.work[:, begin:end]
        if later.shape[1]:
            rows = self.factor[:, first : first + errors.shape[1], begin:end]
            later.baddbmm_(rows.transpose(1, 2), errors, alpha=-1)


def _blocks(parts: list[slice], block_size: int) -> list[tuple[int, int]]:
    """First column and end of blocks; none begins inside of a group that is smaller than it.

    The columns of a group that begins in a block are therefore either all in this block, or the
    group begins with the block, so that they have changed as far as they can by then.
    """
    blocks: list[tuple[int, int]] = []
    for part in parts:
        if blocks and part.stop - blocks[-1][0] <= block_size:
            blocks[-1] = blocks[-1][0], part.stop
            continue
        for first in range(part.start, part.stop, block_size):
            blocks.append((first, min(first + block_size, part.stop)))
    return blocks


def _integer_weight(steps: Tensor, scale: Tensor, zero: Tensor, weights: Weights) -> IntegerWeight:
    """Integers ``[N, K]`` from columns ``[G, K, n]``, and parameters from ``[G, groups, n]``."""
    granularity = weights.granularity
    size = getattr(granularity, "group_size", None)
    spread = zero if size is None else zero.repeat_interleave(size, 1)[:, : steps.shape[1]]
    qmin, qmax = weights.range
    numbers = (steps + spread).nan_to_num(0.0).clamp(qmin, qmax)
    qweight = numbers.transpose(1, 2).flatten(0, 1).to(torch.int8).contiguous()
    pair = [tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (scale, zero)]
    if size is None:
        pair = [tensor.squeeze(1) for tensor in pair]
    zeros = None if weights.symmetric else pair[1].to(torch.int8)
    return IntegerWeight(qweight, pair[0], zeros, size)


def _best(
    problem: Problem, plain: IntegerWeight, others: list[IntegerWeight], shared: bool
) -> GPTQResult:
    """The best integers of each output, or of all outputs if they share a scale."""
    best, least = plain, problem.errors(plain.dequantize())
    nearest_error = float(least.sum())
    for found in others:
        error = problem.errors(found.dequantize())
        better = (error <= least) & ~(problem.failed | problem.zero)[:, None]
        if shared:
            better = (error.sum() <= least.sum()).expand_as(better)
        best, least = _mixed(best, found, better.flatten()), torch.where(better, error, least)
    return GPTQResult(
        best,
        float(problem.damping.max()),
        int(problem.dead.sum()),
        nearest_error,
        float(least.sum()),
        bool(problem.failed.any() | problem.zero.all()),
    )


def _mixed(first: IntegerWeight, other: IntegerWeight, rows: Tensor) -> IntegerWeight:
    """The other integers for some rows."""
    wide = rows.view(-1, *[1] * (other.scale.dim() - 1))
    zero = other.zero_point
    if zero is not None and first.zero_point is not None:
        zero = torch.where(wide, zero, first.zero_point)
    return IntegerWeight(
        torch.where(rows[:, None], other.qweight, first.qweight),
        torch.where(wide, other.scale, first.scale),
        zero,
        other.group_size,
    )


def _check(weight: Tensor, hessian: Tensor, weights: Weights) -> None:
    check_weights("gptq", weight, weights)
    outputs, terms = weight.shape
    if not bool(weight.isfinite().all()):
        raise ValueError("gptq: weight must be finite, got NaN or infinities")
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        got = hessian.dtype if isinstance(hessian, Tensor) else type(hessian).__name__
        raise TypeError(f"gptq: hessian must be a float tensor, got {got}")
    shape = tuple(hessian.shape)
    fits = shape[-2:] == (terms, terms) and len(shape) in (2, 3)
    if not fits or (len(shape) == 3 and (not shape[0] or outputs % shape[0])):
        raise ValueError(
            f"gptq: hessian must have shape [{terms}, {terms}], or [G, {terms}, {terms}] with G "
            f"a divisor of the {outputs} outputs, got {list(shape)}"
        )


def _check_options(
    damping: float, block_size: int, order: str, static_groups: bool | None, sweeps: int
) -> None:
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"gptq: damping must be a finite number of at least 0, got {damping!r}")
    for name, value, least in (("block_size", block_size, 1), ("sweeps", sweeps, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"gptq: {name} must be an integer of at least {least}, got {value!r}")
    if order not in ("given", "activations"):
        raise ValueError(f"gptq: order must be 'given' or 'activations', got {order!r}")
    if order == "activations" and static_groups is False:
        raise ValueError(
            "gptq: static_groups must be True or None with order='activations', got False: the "
            "inputs of a group do not follow one another then"
        )
