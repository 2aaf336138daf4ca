"""A linear layer in training whose weight has 2 to 8 bits, forward and backward, in plain torch.

The weight has one scale for each output channel, or for each group of inputs of a channel. Forward
is the deployed layer, :func:`torchquant.functional.linear_dynamic_intx`, or where activations stay
float :func:`torchquant.functional.linear_intx`. Backward is that of
:func:`torchquant.functional.qat_linear`, with a scale for each group. With g the gradient of the
output, masked by relu, and Xq, Wq the values that the layer multiplies::

    grad_x = g @ Wq
    grad_w = (g.T @ Xq), 0 where w is outside the range of given scales
    grad_s = factor * sum over the group of (grad_w * d),  d = rint(w/s) - w/s inside, -Qn below,
             Qp above

The formulas also accept float64: as an oracle, whose own rounding does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import FLOAT_DTYPES, MIN_SCALE, describe, require_dtype
from torchquant.functional.affine import quantize
from torchquant.functional.intx import linear_dynamic_intx, linear_intx
from torchquant.functional.qat import Quantized, quantize_rows
from torchquant.functional.qparams import qparams_from_range
from torchquant.scheme import PER_CHANNEL, Granularity, PerGroup, quant_range


class IntxGradients(NamedTuple):
    """The gradients of :func:`qat_linear_intx`; None for a scale that is not learned."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    weight_scale: Tensor | None


def quantize_pack_intx(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    qmin: int | None = None,
    qmax: int | None = None,
    symmetric: bool = True,
) -> Quantized:
    """A weight ``[N, K]`` as integers, with a scale and zero point for each channel or group.

    Args: those of :func:`torchquant.ops.quantize_pack_intx`, which packs the integers, too.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[N, K]``, float32 and int8 ``[N]`` or ``[N, groups]``. A
        group that holds NaN, or without ``scale`` an infinity, has scale NaN and zeros.

    Raises:
        TypeError: weight is not float32, bfloat16 or float16.
        ValueError: group_size or the range is not allowed, or scale has another shape.

    Example:
        >>> w = torch.tensor([[0.5, -0.7, 0.0, 2.1]])
        >>> q, scale, _ = quantize_pack_intx(w, bits=4, group_size=2)
        >>> q, scale
        (tensor([[ 5, -7,  0,  7]], dtype=torch.int8), tensor([[0.1000, 0.3000]]))
    """
    who = "quantize_pack_intx"
    require_dtype(who, "weight", weight, FLOAT_DTYPES)
    qmin, qmax = intx_range(bits, symmetric, qmin, qmax)
    if symmetric and scale is None and qmin > -qmax:
        raise ValueError(
            f"{who}: qmin must be at most -qmax = {-qmax} with symmetric=True and no scale, got "
            f"{qmin}; pass symmetric=False for a range like this"
        )
    outputs, inputs = weight.shape
    if group_size is not None and not 1 <= group_size <= inputs:
        raise ValueError(
            f"{who}: group_size must be None (one scale per output channel) or between 1 and "
            f"in_features = {inputs}, got {group_size}"
        )
    granularity = _granularity(group_size)
    shape = tuple(granularity.scale_shape(weight.shape))
    size = inputs if group_size is None else group_size
    # The last weight fills up a shorter last group, whose range does not change.
    missing = -inputs % size
    w = weight.to(torch.float32)
    filled = torch.cat([w, w[:, -1:].expand(outputs, missing)], 1) if missing else w
    groups = filled.reshape(outputs, -1, size)
    if scale is None:
        scales, zeros = qparams_from_range(
            groups.amin(-1), groups.amax(-1), qmin=qmin, qmax=qmax, symmetric=symmetric
        )
        scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    else:
        if tuple(scale.shape) != shape:
            raise ValueError(f"{who}: scale must be float32 {list(shape)}, got {describe(scale)}")
        nan = groups.isnan().any(-1).reshape(shape)
        scales = torch.where(nan, float("nan"), scale.clamp(min=MIN_SCALE))
        zeros = torch.zeros_like(scales, dtype=torch.int32)
    q = quantize(w, scales, zeros, qmin=qmin, qmax=qmax, granularity=granularity, dtype=torch.int8)
    return Quantized(q, scales, zeros.to(torch.int8))


def qat_linear_intx(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    group_size: int | None = None,
    weight_qmin: int = -8,
    weight_qmax: int = 7,
    weight_symmetric: bool = True,
    activation_bits: int | None = 8,
    activation_symmetric: bool = False,
    activation: str = "none",
    weight_grad_factor: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Forward of :func:`torchquant.ops.qat_linear_intx`, bit for bit; without gradients.

    Args: those of the operator. The factor belongs to the gradients
    (:func:`qat_linear_intx_backward`): the result does not depend on it.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Example:
        >>> qat_linear_intx(torch.ones(1, 2), torch.tensor([[1.4, -0.1]]), group_size=1)
        tensor([[1.3000]])
    """
    bits = intx_bits(weight_qmin, weight_qmax)
    w = quantize_pack_intx(
        weight,
        weight_scale,
        bits=bits,
        group_size=group_size,
        qmin=weight_qmin,
        qmax=weight_qmax,
        symmetric=weight_symmetric,
    )
    zero_point = None if weight_symmetric else w.zero_point
    if activation_bits is None:
        return linear_intx(
            input,
            w.q,
            w.scale,
            zero_point,
            bias,
            bits=bits,
            group_size=group_size,
            activation=activation,
            output_dtype=output_dtype,
        )
    return linear_dynamic_intx(
        input,
        w.q,
        w.scale,
        zero_point,
        bias,
        bits=bits,
        group_size=group_size,
        symmetric=activation_symmetric,
        activation=activation,
        output_dtype=output_dtype,
        activation_bits=activation_bits,
    )


def qat_linear_intx_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    w: Quantized,
    *,
    group_size: int | None = None,
    weight_range: tuple[int, int] = (-8, 7),
    weight_given: bool = False,
    activation_bits: int | None = 8,
    activation_symmetric: bool = False,
    activation: str = "none",
    weight_grad_factor: float = 0.0,
) -> IntxGradients:
    """Backward of :func:`torchquant.ops.qat_linear_intx`, in ``grad``'s dtype.

    Args:
        grad: ``[M, N]``, usually float64.
        output: of the forward, ``[M, N]``.
        input, weight: ``[M, K]`` and ``[N, K]``, those of the forward.
        w: the result of :func:`quantize_pack_intx`; the integers do not depend on ``grad``'s dtype.
        group_size: as in the forward.
        weight_range: qmin and qmax.
        weight_given: True if the weight's scales are given.
        activation_bits, activation_symmetric, activation: as in the forward.
        weight_grad_factor: above 0, given scales are learned.

    Returns:
        The gradients of input, weight and bias, and that of the scales, which is None unless they
        are learned.

    Example:
        >>> x, w = torch.ones(1, 2), torch.tensor([[1.4, -0.1]])
        >>> wq = quantize_pack_intx(w, bits=4, group_size=1)
        >>> one = torch.ones(1, 1)
        >>> qat_linear_intx_backward(one, one, x, w, wq, group_size=1).input
        tensor([[ 1.4000, -0.1000]])
    """
    dtype = grad.dtype
    if activation == "relu":
        grad = torch.where(output > 0, grad, 0.0)
    if activation_bits is None:
        xq = input.to(dtype)
    else:
        low, high = quant_range(activation_bits)
        x = quantize_rows(input, qmin=low, qmax=high, symmetric=activation_symmetric)
        xq = (x.q.to(dtype) - x.zero_point.to(dtype)) * x.scale.to(dtype)
    scale, zero = (_of_weights(t, group_size, weight.shape) for t in (w.scale, w.zero_point))
    wq = (w.q.to(dtype) - zero.to(dtype)) * scale.to(dtype)
    grad_input, grad_weight = grad @ wq, grad.t() @ xq
    weight_scale = None
    steps = weight.to(torch.float32) * reciprocal(scale)
    qmin, qmax = weight_range
    if weight_given and weight_grad_factor > 0:
        below, above = steps <= qmin, steps >= qmax
        slope = torch.round(steps).to(dtype) - steps.to(dtype)
        slope = torch.where(below, float(qmin), torch.where(above, float(qmax), slope))
        weight_scale = _sum_of_groups(slope * grad_weight, w.scale, group_size) * weight_grad_factor
        grad_weight = torch.where(below | above, 0.0, grad_weight)
    elif weight_given:
        rounded = torch.round(steps)
        grad_weight = torch.where((rounded < qmin) | (rounded > qmax), 0.0, grad_weight)
    return IntxGradients(grad_input, grad_weight, grad.sum(0), weight_scale)


def intx_bits(qmin: int, qmax: int) -> int:
    """The fewest bits, at least 2, whose integers include a range.

    Example:
        >>> intx_bits(-7, 7), intx_bits(-8, 7), intx_bits(-127, 127)
        (4, 4, 8)
    """
    return next(
        (bits for bits in range(2, 8) if -(2 ** (bits - 1)) <= qmin and qmax < 2 ** (bits - 1)), 8
    )


def intx_range(
    bits: int, symmetric: bool, qmin: int | None = None, qmax: int | None = None
) -> tuple[int, int]:
    """The range of a weight of ``bits`` bits; symmetric ones of 8 bits leave the least integer out.

    Example:
        >>> intx_range(4, True), intx_range(8, True), intx_range(8, False)
        ((-8, 7), (-127, 127), (-128, 127))
    """
    least, most = quant_range(bits, narrow_range=symmetric and bits == 8)
    return least if qmin is None else qmin, most if qmax is None else qmax


def _granularity(group_size: int | None) -> Granularity:
    return PER_CHANNEL if group_size is None else PerGroup(group_size)


def _of_weights(parameter: Tensor, group_size: int | None, shape: torch.Size) -> Tensor:
    """One value for each weight ``[N, K]`` from one for each channel or group."""
    if group_size is None:
        return parameter.unsqueeze(1).expand(shape)
    return parameter.repeat_interleave(group_size, 1)[:, : shape[1]]


def _sum_of_groups(values: Tensor, like: Tensor, group_size: int | None) -> Tensor:
    """The sums of values ``[N, K]`` over channels or groups."""
    if group_size is None:
        return values.sum(1)
    missing = -values.shape[1] % group_size
    filled = torch.nn.functional.pad(values, (0, missing))
    return filled.reshape(len(values), -1, group_size).sum(-1)


__all__ = ["IntxGradients", "qat_linear_intx", "qat_linear_intx_backward", "quantize_pack_intx"]
