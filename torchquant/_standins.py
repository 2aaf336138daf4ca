"""Plain-torch stand-ins for the operators of training, until those are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.functional.affine import _expand
from torchquant.functional.qparams import group_range
from torchquant.scheme import Granularity, PerAxis, PerGroup, PerTensor


def _granularity(axis: int | None, group_size: int | None) -> Granularity:
    if axis is not None:
        return PerAxis(axis)
    return PerTensor() if group_size is None else PerGroup(group_size)


def minmax(
    input: Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.detach().float()
    finite = x.isfinite()
    granularity = _granularity(axis, group_size)
    if x.numel() == 0:
        shape = granularity.scale_shape(x.shape)
        return (
            x.new_full(shape, torch.inf),
            x.new_full(shape, -torch.inf),
            torch.zeros(1, dtype=torch.int64, device=x.device),
        )
    least, _ = group_range("minmax", torch.where(finite, x, torch.inf), granularity)
    _, greatest = group_range("minmax", torch.where(finite, x, -torch.inf), granularity)
    return least, greatest, (~finite).sum().reshape(1)


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    granularity = _granularity(axis, group_size)
    s = _expand(scale, input, granularity)
    z = torch.zeros_like(s) if zero_point is None else _expand(zero_point, input, granularity)
    x = input.float()
    r = torch.round(x * (1.0 / s)).detach()
    q = torch.minimum(torch.maximum(r, qmin - z), qmax - z)
    out = (q * s).detach()
    inside = (r >= qmin - z) & (r <= qmax - z)
    passed = torch.where(inside, x, x.detach())
    return (out + (passed - passed.detach()) * 1.0).to(input.dtype)


def _reduce(t: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return t.sum(dtype=torch.float64).float().reshape(scale.shape)
    dims = [d for d in range(t.dim()) if d != axis % t.dim()]
    return (t.sum(dims, dtype=torch.float64) if dims else t).float()


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        grad_factor: float,
        axis: int | None,
    ) -> Tensor:
        granularity = _granularity(axis, None)
        used = scale.clamp(min=2.0**-126)
        if offset is None:
            zero = torch.zeros_like(used)
        else:
            zero = torch.clamp(torch.round(-offset / used), qmin, qmax)
        s, z = _expand(used, input, granularity), _expand(zero, input, granularity)
        ctx.save_for_backward(input, s, z, scale)
        ctx.rest = qmin, qmax, grad_factor, axis, offset is not None
        r = torch.round(input.float() * (1.0 / s))
        return (torch.minimum(torch.maximum(r, qmin - z), qmax - z) * s).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, s, z, scale = ctx.saved_tensors
        qmin, qmax, factor, axis, has_offset = ctx.rest
        v, low, high = input.float() * (1.0 / s), qmin - z, qmax - z
        below, above = v <= low, v >= high
        inside = ~(below | above)
        g = grad.float()
        slope = torch.where(below, low, torch.where(above, high, torch.round(v) - v))
        grad_input = torch.where(inside, grad, torch.zeros_like(grad))
        grad_scale = _reduce(g * slope, scale, axis) * factor
        grad_offset = None
        if has_offset:
            grad_offset = _reduce(torch.where(inside, 0.0, g), scale, axis) * factor
        return grad_input, grad_scale, grad_offset, None, None, None, None


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return _Learned.apply(input, scale, offset, qmin, qmax, grad_factor, axis)  # type: ignore[no-any-return]
