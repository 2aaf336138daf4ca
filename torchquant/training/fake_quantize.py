"""`FakeQuantize`: quantize and dequantize with a straight-through gradient, at any granularity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchquant import ops
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    require_device,
    require_dtype,
    require_range,
    scale_tensor,
    zero_point_tensor,
)
from torchquant.scheme import PER_TENSOR, Granularity, PerAxis, PerGroup

WHO = "FakeQuantize"


class FakeQuantize(torch.autograd.Function):
    """``y = FakeQuantize.apply(x, scale, zero_point, qmin, qmax)``: rounding with a gradient.

    Forward: ``(clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``, the bits of
    :func:`torchquant.functional.fake_quantize`. Backward: the gradient of ``y`` where the rounded
    value is within [qmin, qmax], 0 elsewhere. One bit per element is saved for it.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape.
        scale: number, or float32 tensor that broadcasts against x: ``[1]`` per tensor, ``[C, 1]``
            or ``[1, C, 1, 1]`` per channel, ``[..., 1]`` per token. Positive and finite, at least
            2^-126.
        zero_point: integer, int32 tensor that broadcasts against x, or None for 0; a float32 tensor
            is a real-valued zero point.
        qmin, qmax: the integer range.
        group_size: elements per group along the last axis; scale is then
            ``[..., ceil(K / group_size)]``.

    Returns:
        Tensor of x's shape and dtype. Only x gets a gradient; see
        :func:`torchquant.ops.fake_quantize_learned` for learned scales.

    Raises:
        TypeError: x is not a float32, bfloat16 or float16 tensor, scale is not a number or a
            float32 tensor, or zero_point is not a number or an int32 or float32 tensor.
        ValueError: a scale is below 2^-126 or not finite, scale or zero_point does not broadcast or
            is on another device, or ``qmin >= qmax``.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 3; the straight-through estimator is Bengio
    et al.'s (2013).

    Example:
        >>> x = torch.tensor([[-1.0, 0.26], [0.5, 9.0]], requires_grad=True)
        >>> y = FakeQuantize.apply(x, torch.tensor([[0.05], [0.5]]), 0, -8, 7)
        >>> y.sum().backward()
        >>> y.tolist() == torch.tensor([[-0.4, 0.25], [0.5, 3.5]]).tolist(), x.grad
        (True, tensor([[0., 1.],
                [1., 0.]]))
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor | None,
        qmin: int,
        qmax: int,
        group_size: int | None = None,
    ) -> Tensor:
        """Fake-quantize; see the class for the arguments."""
        require_dtype(WHO, "x", x, FLOAT_DTYPES)
        require_range(WHO, qmin, qmax)
        s = _checked_scale(x, scale)
        z = _checked_zero_point(x, zero_point, qmin, qmax)
        rows, s, z, granularity = _arranged(x, s, z, group_size)
        if not ctx.needs_input_grad[0]:
            y = ops.fake_quantize(rows, s, z, qmin=qmin, qmax=qmax, granularity=granularity)
        else:
            y, bits = ops.fake_quantize_mask(
                rows, s, z, qmin=qmin, qmax=qmax, granularity=granularity
            )
            ctx.save_for_backward(bits)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; it can be differentiated again."""
        (bits,) = ctx.saved_tensors
        return ops.mask_gradient(grad, bits), None, None, None, None, None


def _checked_scale(x: Tensor, scale: float | Tensor) -> Tensor:
    """The scale as a tensor; its values are checked if that needs no synchronisation."""
    if not isinstance(scale, Tensor):
        return scale_tensor(WHO, "scale", scale, x.device, (1,))
    require_dtype(WHO, "scale", scale, (torch.float32,))
    require_device(WHO, "scale", scale, x.device)
    # The operators check everything except NaN, which they propagate for rows without a range.
    if scale.device.type == "cpu" and not torch.compiler.is_compiling() and scale.isnan().any():
        raise ValueError(f"{WHO}: scale must be finite and at least 2^-126, got nan")
    return scale


def _checked_zero_point(
    x: Tensor, zero_point: int | Tensor | None, qmin: int, qmax: int
) -> Tensor | None:
    if zero_point is None:
        return None
    if not isinstance(zero_point, Tensor):
        return zero_point_tensor(
            WHO, "zero_point", zero_point, x.device, qmin, qmax, (1,), allow_real=True
        )
    require_dtype(WHO, "zero_point", zero_point, (torch.int32, torch.float32))
    require_device(WHO, "zero_point", zero_point, x.device)
    return zero_point


def _arranged(
    x: Tensor, s: Tensor, z: Tensor | None, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Granularity]:
    """x and its parameters in shapes that an operator's granularity describes."""
    if group_size is not None:
        return x, s, z, PerGroup(group_size)
    if z is not None and z.numel() != 1 and z.shape != s.shape:
        try:
            s, z = torch.broadcast_tensors(s, z)
        except RuntimeError:
            raise ValueError(
                f"{WHO}: zero_point must broadcast against scale {list(s.shape)}, got {describe(z)}"
            ) from None
    if z is not None and z.numel() == 1:
        z = z.reshape(1)
    if s.numel() == 1:
        return x, s.reshape(1), z, PER_TENSOR
    first, last = _varying(x, s)
    rows = x.reshape(
        math.prod(x.shape[:first]), math.prod(x.shape[first:last]), math.prod(x.shape[last:])
    )
    # If s varies along axes that are not adjacent, it is expanded over all axes between them.
    shape = x.shape[first:last]
    s = _without_outer(s, x.dim(), last).expand(shape).reshape(-1)
    if z is not None and z.numel() != 1:
        z = _without_outer(z, x.dim(), last).expand(shape).reshape(-1)
    return rows, s, z, PerAxis(1)


def _varying(x: Tensor, s: Tensor) -> tuple[int, int]:
    """First axis of x along which s varies, and the last one plus 1."""
    missing = x.dim() - s.dim()
    axes = [axis for axis, size in enumerate(s.shape) if size != 1]
    if any(axis + missing < 0 or s.shape[axis] != x.shape[axis + missing] for axis in axes):
        raise ValueError(
            f"{WHO}: scale must be a number or broadcast against x {list(x.shape)}, "
            f"got {describe(s)}; pass group_size for groups along the last axis"
        )
    return axes[0] + missing, axes[-1] + missing + 1


def _without_outer(parameter: Tensor, dimensions: int, last: int) -> Tensor:
    """A broadcasting parameter without the axes before and after those along which it varies."""
    inner = dimensions - last
    sizes = parameter.shape[: parameter.dim() - inner] if inner else parameter.shape
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    return parameter.reshape(sizes)
