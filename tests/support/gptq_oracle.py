"""GPTQ written down plainly, in float64: the algorithm, and the program of its authors.

With ``fault`` it makes a mistake that has been seen in other programs, so that tests can show that
they would notice it.

The authors' program differs from the algorithm in two ways: the scales of a group that begins
inside of a block follow from weights that the errors of this block have not changed yet, and its
symmetric scale divides twice the greatest magnitude by the number of steps.
"""

from typing import Any

import torch
from torch import Tensor


def problem(
    outputs: int = 24, terms: int = 80, samples: int = 400, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs with a few strong directions and large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(terms, terms // 4, generator=generator)
    x = mix @ torch.randn(terms // 4, samples, generator=generator)
    x += torch.randn(terms, samples, generator=generator)
    x *= torch.randn(terms, 1, generator=generator).exp()
    weight = torch.randn(outputs, terms, generator=generator)
    return weight, 2 / samples * x @ x.t()


def our_parameters(columns: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[N, 1]`` of weights ``[N, size]``, as numerics.md has them."""
    qmin, qmax = -(2 ** (bits - 1)) + (symmetric and bits == 8), 2 ** (bits - 1) - 1
    if symmetric:
        scale = columns.abs().amax(1, keepdim=True) / qmax
        return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    least, greatest = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True)
    scale = (greatest.clamp(min=0) - least) / (qmax - qmin)
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (qmin - least / scale).round().clamp(qmin, qmax)


def authors_parameters(columns: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The same with the integers of the authors' program, moved to our range."""
    qmin, levels = -(2 ** (bits - 1)), 2**bits - 1
    least, greatest = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True)
    greatest = greatest.clamp(min=0)
    if symmetric:
        greatest = torch.maximum(-least, greatest)
        least = torch.where(least < 0, -greatest, least)
    empty = (least == 0) & (greatest == 0)
    least, greatest = torch.where(empty, -1.0, least), torch.where(empty, 1.0, greatest)
    scale = (greatest - least) / levels
    zero = torch.full_like(scale, (levels + 1) / 2) if symmetric else (-least / scale).round()
    return scale, zero + qmin


def gptq_oracle(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    stale: bool = False,
    parameters: Any = our_parameters,
    order: Tensor | None = None,
    fault: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers, scales, zero points and the weight that they represent, float64.

    ``order`` are the inputs in the order of rounding; the scales of all groups are then chosen
    first.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    terms = w.shape[1]
    size = group_size or terms
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h[dead, dead] = mean
    w[:, dead] = 0
    if fault != "no damping":
        h.diagonal().add_(mean if fault == "damping of 1" else damping * mean)
    first_parameters = [
        parameters(w[:, s : s + size], bits, symmetric) for s in range(0, terms, size)
    ]
    place = torch.arange(terms) if order is None else order
    w, h = w[:, place], h[place][:, place]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    if fault == "inverse instead of its factor":
        upper = inverse
    if fault == "lower factor":
        upper = torch.linalg.cholesky(inverse)
    if fault == "factor of the Hessian":
        upper = torch.linalg.cholesky(h, upper=True)
    qmin, qmax = -(2 ** (bits - 1)) + (symmetric and bits == 8), 2 ** (bits - 1) - 1
    integers, values = torch.zeros_like(w), torch.zeros_like(w)
    scales: dict[int, tuple[Tensor, Tensor]] = dict(enumerate(first_parameters))
    old = w.clone()
    for column in range(terms):
        if column % block_size == 0:
            old = w.clone()  # what the authors' program has outside of its block
        group = int(place[column]) // size
        if order is None and column % size == 0:
            source = old if stale else w
            scales[group] = parameters(source[:, column : column + size], bits, symmetric)
        scale, zero = (tensor[:, 0] for tensor in scales[group])
        q = ((w[:, column] / scale).round() + zero).clamp(qmin, qmax)
        value = (q - zero) * scale
        begun = weight.double()[:, place[column]] if fault == "stale weights" else w[:, column]
        error = begun - value
        if fault != "no division by the diagonal":
            error = error / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, column:]
        integers[:, place[column]], values[:, place[column]] = q, value
    scale, zero = (
        torch.cat([scales[group][part] for group in sorted(scales)], 1) for part in (0, 1)
    )
    return integers, scale, zero, values


def layer_error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """``trace(D H D^T)`` with the change D of the weight, in float64."""
    change = weight.double() - values.double()
    return float((change @ hessian.double() * change).sum())
