"""Weights of steps and real minimums, in integers with an integer zero point.

A group of GGUF's types has the values ``step * q + minimum``. Ours have ``scale * (Q - z)``, all
multiples of the scale. With ``scale = step / k`` for a whole number k, the multiples hit the grid
of steps, and all values of the group are off by one number: what separates the minimum from the
nearest multiple. Of all k whose integers fit in the bits, the one with the least error is taken;
8 bits hold 16 steps for k up to 17, and the error is then a small part of a step. It is 0 where the
minimum is a multiple of ``step / k``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.configs import Weights
from torchquant.integrations.checkpoints.gguf_blocks import Blocks
from torchquant.integrations.checkpoints.nearest import least_error, squared_errors
from torchquant.scheme import PerGroup, quant_range


def values_of_blocks(blocks: Blocks, group: int) -> Tensor:
    """The float32 values of blocks.

    Example:
        >>> q = torch.tensor([[0, 3]], dtype=torch.int8)
        >>> values_of_blocks(Blocks(q, torch.tensor([[0.5]]), torch.tensor([[-1.0]])), 2)
        tensor([[-1.0000,  0.5000]])
    """
    values = blocks.q.float().unflatten(1, (-1, group)) * blocks.step.unsqueeze(2)
    if blocks.minimum is not None:
        values += blocks.minimum.unsqueeze(2)
    flat: Tensor = values.flatten(1)
    return flat


def exact_zero_points(blocks: Blocks, bits: int) -> Tensor | None:
    """Zero points ``-minimum / step`` of at most ``bits`` bits without sign, if all are integers.

    Example:
        >>> q, step = torch.zeros(1, 2, dtype=torch.int8), torch.tensor([[0.5]])
        >>> exact_zero_points(Blocks(q, step, torch.tensor([[-1.0]])), 4)
        tensor([[2.]])
        >>> exact_zero_points(Blocks(q, step, torch.tensor([[-1.1]])), 4)
    """
    assert blocks.minimum is not None
    usual = torch.where(blocks.step == 0, 1.0, blocks.step)
    zeros = -(blocks.minimum / usual).round()
    exact = (-zeros * blocks.step == blocks.minimum) & (zeros >= 0) & (zeros < 1 << bits)
    return zeros if bool(exact.all()) else None


def fit(blocks: Blocks, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points of ``bits`` bits near the values of blocks.

    Returns:
        int8 ``[R, K]``, float32 ``[R, groups]``, int8 ``[R, groups]``.

    Example:
        >>> q = torch.tensor([[0, 15]], dtype=torch.int8)
        >>> blocks = Blocks(q, torch.tensor([[0.3]]), torch.tensor([[-1.0]]))
        >>> Q, scale, zero = fit(blocks, 8, 2)
        >>> (Q.int() - zero) * scale
        tensor([[-1.0000,  3.5000]])
    """
    least, greatest = quant_range(bits)
    q, step, minimum = _positive_steps(blocks, group)
    grouped = q.unflatten(1, (-1, group))
    low, high = (end.float() for end in torch.aminmax(grouped, dim=2))
    error = torch.full_like(step, float("inf"))
    factor, zero, shift = torch.ones_like(step), torch.zeros_like(step), torch.zeros_like(step)
    for k in range(1, greatest - least + 1):
        room = greatest - least - k * (high - low)
        if bool((room < 0).all()):
            break
        multiple = (minimum * k / step).round()
        start = torch.minimum((k * low + multiple).clamp_min(0), room)
        found = least + start - k * low - multiple
        off = (multiple * (step / k) - minimum).abs()
        better = (room >= 0) & (least <= found) & (found <= greatest) & (off < error)
        error = torch.where(better, off, error)
        factor = torch.where(better, k, factor)
        zero = torch.where(better, found, zero)
        shift = torch.where(better, least + start - k * low, shift)
    integers = grouped * factor.unsqueeze(2) + shift.unsqueeze(2)
    fitted = integers.clamp_(least, greatest).to(torch.int8).flatten(1)
    scale, zeros = step / factor, zero.to(torch.int8)
    impossible = error.isinf()
    if bits == 8 and not bool(impossible.any()):
        return fitted, scale, zeros
    # Few bits, or a minimum far from 0: the range of the values may give a smaller error.
    weights = Weights(bits, symmetric=False, granularity=PerGroup(group))
    values = values_of_blocks(blocks, group)
    others = least_error(values, weights, group)
    ours = squared_errors(values, fitted, scale, zeros, weights, group)
    better = impossible | (squared_errors(values, *others, weights, group) < ours)
    columns = better.repeat_interleave(group, 1)
    return (
        torch.where(columns, others[0], fitted),
        torch.where(better, others[1], scale),
        torch.where(better, others[2], zeros),
    )


def _positive_steps(blocks: Blocks, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (float), steps above 0, and minimums with the same values.

    A group of one value becomes a multiple of its amount.
    """
    assert blocks.minimum is not None
    q, step, minimum = blocks.q.float(), blocks.step, blocks.minimum
    negative = step < 0
    if bool(negative.any()):  # count from the other end
        top = q.unflatten(1, (-1, group)).amax(2)
        turned = top.repeat_interleave(group, 1) - q
        q = torch.where(negative.repeat_interleave(group, 1), turned, q)
        minimum = torch.where(negative, minimum + step * top, minimum)
        step = step.abs()
    flat = step == 0
    if bool(flat.any()):
        q = q.masked_fill(flat.repeat_interleave(group, 1), 0)
        step = torch.where(flat, torch.where(minimum == 0, 1.0, minimum.abs()), step)
    return q, step, minimum


__all__ = ["exact_zero_points", "fit", "values_of_blocks"]
