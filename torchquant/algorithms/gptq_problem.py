"""What GPTQ works on: columns of a weight, and the Cholesky factor of the inverse of a Hessian.

Dead inputs, which were always 0, get the weight 0. Damping makes a singular Hessian regular; it is
raised step by step where that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Problem", "cholesky_of_inverse"]

_RAISE = 10.0  # how many times the damping grows after a failure
_COMPARABLE = 1e-12  # of the greatest unit; a smaller one would make the Hessian of its group 0
_SMALL = 64  # of a matrix that is inverted as a whole
_LEAST, _MOST = 1e-4, 1e3  # damping after a failure without any, and the last that is tried


def cholesky_of_inverse(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """U, the upper Cholesky factor of the inverse: ``inverse(H) = U^T U``.

    U is the inverse of the upper triangular R with ``H = R R^T``, which one factorization of the
    reversed matrix gives. This is the factor of the inverse without the loss of digits that the
    inverse has.

    Args:
        hessian: float64 ``[G, K, K]``.

    Returns:
        U, and int32 ``[G]``, which is not 0 where a matrix is not positive definite.

    Example:
        >>> factor, failed = cholesky_of_inverse(torch.tensor([[[4.0, 0.0], [0.0, 0.25]]]))
        >>> factor, failed
        (tensor([[[0.5000, 0.0000],
                 [0.0000, 2.0000]]]), tensor([0], dtype=torch.int32))
    """
    with _one_thread():
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
        factor = factor.flip(-1, -2)
        return _inverse(factor), failed


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK sums in another order with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of upper triangular matrices, half by half, which skips the zeros."""
    half = upper.shape[-1] // 2
    if half < _SMALL:
        one = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
        whole: Tensor = torch.linalg.solve_triangular(upper, one.expand_as(upper), upper=True)
        return whole
    found = torch.zeros_like(upper)
    first = found[:, :half, :half] = _inverse(upper[:, :half, :half])
    second = found[:, half:, half:] = _inverse(upper[:, half:, half:])
    found[:, :half, half:] = -(first @ upper[:, :half, half:]) @ second
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight and a Hessian in units of the mean of its diagonal.

    ``G`` are the groups of a convolution, each with n of the N outputs.

    Attributes:
        original: float32 ``[G, K, n]``, the weight.
        columns: the same, and 0 for dead inputs.
        hessian: float32 ``[G, K, K]``.
        unit: float64 ``[G]``, the mean of the diagonal over the inputs that are not dead; NaN if
            the Hessian is not finite.
        place: int64 ``[G, K]``, the inputs in the order in which they are rounded.
        factor: float32 ``[G, K, K]``, U of the damped Hessian in this order.
        damping: float64 ``[G]``, what was added to the diagonal.
        dead: bool ``[G, K]``.
        zero: bool ``[G]``, where the Hessian is 0: no integers are better than the nearest ones.
        failed: bool ``[G]``, where the Hessian is not finite, or could not be factored.

    Example:
        >>> hessian = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
        >>> problem = Problem.of(torch.ones(3, 2), hessian, damping=0.0)
        >>> problem.unit, problem.columns[0, :, 0], problem.dead
        (tensor([4.], dtype=torch.float64), tensor([1., 0.]), tensor([[False,  True]]))
    """

    original: Tensor
    columns: Tensor
    hessian: Tensor
    unit: Tensor
    place: Tensor
    factor: Tensor
    damping: Tensor
    dead: Tensor
    zero: Tensor
    failed: Tensor

    @classmethod
    def of(
        cls, weight: Tensor, hessian: Tensor, *, damping: float, by_activations: bool = False
    ) -> Problem:
        """The problem for a weight ``[N, K]`` and a Hessian ``[K, K]`` or ``[G, K, K]``."""
        terms = weight.shape[1]
        wide = hessian.detach().to(weight.device, torch.float64, copy=True).view(-1, terms, terms)
        original = weight.detach().float().reshape(len(wide), -1, terms).transpose(1, 2)
        diagonal = wide.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        unit = diagonal.sum(1) / (~dead).sum(1).clamp(min=1)
        unit = torch.where(wide.isfinite().all(2).all(1), unit, torch.nan)
        zero = unit == 0
        failed = ~(unit >= 0)
        useless = zero | failed
        dead = dead & ~useless[:, None]
        # One matrix of so many bytes at a time: everything below changes this one.
        wide.div_(unit[:, None, None]).masked_fill_(useless[:, None, None], 0.0)
        diagonal.masked_fill_(useless[:, None], 1.0)
        place = torch.arange(terms, device=wide.device).expand(dead.shape)
        if by_activations:
            place = diagonal.argsort(dim=1, descending=True, stable=True)
        kept = wide.float()
        diagonal.masked_fill_(dead, 1.0)
        del diagonal
        if by_activations:
            wide = _ordered(wide, place)
        factor, used, hopeless = _factored(wide, damping)
        return cls(
            original.contiguous(),
            original.masked_fill(dead.unsqueeze(2), 0.0).contiguous(),
            kept,
            unit,
            place,
            factor,
            used,
            dead,
            zero,
            failed | hopeless,
        )

    def damped(self) -> Tensor:
        """The Hessian with its damping, and 1 in the diagonal of dead inputs."""
        found = self.hessian.clone()
        diagonal = found.diagonal(dim1=1, dim2=2).masked_fill_(self.dead, 1.0)
        diagonal.add_(self.damping.float()[:, None])
        return found

    def weights_of_groups(self) -> Tensor:
        """What makes the Hessians of the groups comparable, float32 ``[G]``: at most 1, never 0."""
        unit = self.unit.nan_to_num(0.0)
        return (unit / unit.max()).nan_to_num(1.0).clamp(min=_COMPARABLE).float()

    def errors(self, weight: Tensor) -> Tensor:
        """``D H D^T`` of each output, float64 ``[G, n]``, for a changed weight ``[N, K]``.

        NaN where the Hessian is not finite.
        """
        change = weight.view(len(self.unit), -1, weight.shape[1]).transpose(1, 2) - self.original
        found = (self.hessian @ change * change).sum(1, dtype=torch.float64)
        return found * self.unit[:, None]


def _ordered(hessian: Tensor, place: Tensor) -> Tensor:
    """The Hessian of the inputs in another order."""
    group = torch.arange(len(place), device=place.device)[:, None, None]
    return hessian[group, place[:, :, None], place[:, None, :]]


def _factored(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The factors U, float32; the dampings; and where no damping was enough.

    The damping is left in the diagonal.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    plain = diagonal.clone()
    used = torch.full(hessian.shape[:1], damping, dtype=torch.float64, device=hessian.device)
    while True:
        diagonal.copy_(plain + used[:, None])
        factor, failure = cholesky_of_inverse(hessian)
        small = factor.float()
        del factor
        bad = (failure != 0) | ~small.isfinite().all(2).all(1)
        again = bad & (used < _MOST)
        if not bool(again.any()):
            small.masked_fill_(bad[:, None, None], 0.0)
            small.diagonal(dim1=1, dim2=2).masked_fill_(bad[:, None], 1.0)
            return small, used, bad
        used = torch.where(again, (used * _RAISE).clamp(min=_LEAST), used)
