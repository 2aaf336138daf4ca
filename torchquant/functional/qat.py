"""A linear layer in training, forward and backward, in plain torch.

Forward is the deployed layer: integers, :func:`torchquant.functional.quantized_linear`. Backward is
the straight-through estimator (Bengio et al., 2013) with, for learned scales, LSQ's gradients
(Esser et al., 2020). With g the gradient of the output, masked by relu, and with Xq, Wq the values
that the integers represent::

    grad_x = (g @ Wq), 0 where x is outside a fixed range
    grad_w = (g.T @ Xq), 0 where w is outside a fixed range
    grad_s = factor * sum(grad_v * d),  d = rint(v/s) - v/s inside, -Qn below, Qp above

The formulas also accept float64: as an oracle, whose own rounding does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import FLOAT_DTYPES, MIN_SCALE, require_dtype
from torchquant.functional.affine import fake_quantize, quantize
from torchquant.functional.fake_quantize import learned_zero_point
from torchquant.functional.qparams import qparams_from_range
from torchquant.functional.quantized_linear import quantized_linear
from torchquant.scheme import PerAxis


class Quantized(NamedTuple):
    """Integers, and the parameters of each row."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor


class LinearGradients(NamedTuple):
    """The gradients of :func:`qat_linear`; None for a scale or offset that is not learned."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None
    input_offset: Tensor | None
    weight_scale: Tensor | None


def quantize_rows(
    input: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    symmetric: bool = False,
) -> Quantized:
    """Each row ``[..., K]`` as int8 with a scale and zero point ``[..., 1]``.

    Args: those of :func:`torchquant.ops.quantize_rows`.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, float32 ``[..., 1]``, int32 ``[..., 1]``. A
        row has scale NaN where it holds NaN or, with a scale of its own, an infinity.

    Example:
        >>> quantize_rows(torch.tensor([[-3.0, 1.0]]), qmin=-2, qmax=1).q
        tensor([[-2,  1]], dtype=torch.int8)
    """
    require_dtype("quantize_rows", "input", input, FLOAT_DTYPES)
    _check_symmetric("quantize_rows", scale, qmin, qmax, symmetric)
    x = input.to(torch.float32)
    token = (*x.shape[:-1], 1)
    if scale is None:
        if x.shape[-1] == 0:
            least = greatest = x.new_zeros(token)
        else:
            least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scales, zeros = qparams_from_range(
            least, greatest, qmin=qmin, qmax=qmax, symmetric=symmetric
        )
    else:
        used = scale.reshape(1).clamp(min=MIN_SCALE)
        scales = torch.where(x.isnan().any(-1, keepdim=True), float("nan"), used)
        zeros = torch.zeros(token, dtype=torch.int32, device=x.device)
        if zero_point is not None:
            zeros = zeros + zero_point
    # A row that must give NaN has scale NaN; with a static scale its integers are computed anyway.
    own = scales if scale is None else used.expand(token)
    low, high = (qmin - zeros).float(), (qmax - zeros).float()
    steps = torch.clamp(torch.round(x * reciprocal(own)), low, high)
    q = torch.where(steps.isnan(), 0.0, steps).to(torch.int32) + zeros
    return Quantized(q.to(torch.int8), scales, zeros)


def quantize_pack(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
    symmetric: bool = True,
) -> Quantized:
    """A weight ``[N, K]`` as int8 with a scale and zero point for each output channel, ``[N]``.

    Args: those of :func:`torchquant.ops.quantize_pack`, which packs the integers too.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[N, K]``, float32 ``[N]``, int32 ``[N]``. A channel that
        holds NaN, or without ``scale`` an infinity, has scale NaN and zeros.

    Example:
        >>> quantize_pack(torch.tensor([[0.5, -1.27], [0.0, 2.54]])).q
        tensor([[  50, -127],
                [   0,  127]], dtype=torch.int8)
    """
    require_dtype("quantize_pack", "weight", weight, FLOAT_DTYPES)
    _check_symmetric("quantize_pack", scale, qmin, qmax, symmetric)
    w = weight.to(torch.float32)
    if scale is None:
        scales, zeros = qparams_from_range(
            w.amin(1), w.amax(1), qmin=qmin, qmax=qmax, symmetric=symmetric
        )
    else:
        used = scale.clamp(min=MIN_SCALE).expand(w.shape[0])
        scales = torch.where(w.isnan().any(1), float("nan"), used)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
    q = quantize(w, scales, zeros, qmin=qmin, qmax=qmax, granularity=PerAxis(0), dtype=torch.int8)
    return Quantized(q, scales, zeros)


def mm_fake_quantized(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
) -> Tensor:
    """``grad @ fake_quantize(weight)``, per output channel: the gradient of a layer's input.

    Args: those of :func:`torchquant.ops.mm_fake_quantized`; grad may be float64.

    Returns:
        ``[M, K]`` in grad's dtype. The order of the sums is not promised.

    Example:
        >>> mm_fake_quantized(torch.ones(1, 1), torch.tensor([[0.26, 9.0]]), torch.ones(1) / 2)
        tensor([[0.5000, 9.0000]])
    """
    require_dtype("mm_fake_quantized", "grad", grad, (torch.float32, torch.float64))
    channels = (weight.shape[0],)
    values = fake_quantize(
        weight,
        scale.expand(channels),
        None if zero_point is None else zero_point.expand(channels),
        qmin=qmin,
        qmax=qmax,
        granularity=PerAxis(0),
    )
    return grad @ values.to(grad.dtype)


def qat_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_offset: Tensor | None = None,
    input_qmin: int = -128,
    input_qmax: int = 127,
    input_symmetric: bool = False,
    weight_scale: Tensor | None = None,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
    weight_symmetric: bool = True,
    activation: str = "none",
    input_grad_factor: float = 0.0,
    weight_grad_factor: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Forward of :func:`torchquant.ops.qat_linear`, bit for bit; without gradients.

    Args: those of the operator. The two factors belong to the gradients
    (:func:`qat_linear_backward`): the result does not depend on them.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Example:
        >>> qat_linear(torch.ones(1, 2), torch.tensor([[1.0, -0.5]]))
        tensor([[0.4961]])
    """
    scale, zero_point = input_scale, input_zero_point
    # Unsigned integers beyond int8, 0 .. 255, are 128 lower; so is their zero point.
    shift = 128 if input_qmax > 127 else 0
    if scale is not None and zero_point is None:
        if input_offset is not None:
            zero_point = learned_zero_point(scale, input_offset, input_qmin, input_qmax)
            scale = torch.where(input_offset.isnan(), float("nan"), scale)  # integers have no NaN
        elif shift:
            zero_point = torch.full((1,), -shift, dtype=torch.int32, device=input.device)
    x = quantize_rows(
        input,
        scale,
        zero_point,
        qmin=input_qmin - shift,
        qmax=input_qmax - shift,
        symmetric=input_symmetric,
    )
    w = quantize_pack(
        weight, weight_scale, qmin=weight_qmin, qmax=weight_qmax, symmetric=weight_symmetric
    )
    return quantized_linear(
        x.q,
        w.q,
        None if bias is None else bias.to(torch.float32),
        input_scale=x.scale,
        input_zero_point=x.zero_point,
        weight_scale=w.scale,
        weight_zero_point=w.zero_point,
        output_dtype=output_dtype or input.dtype,
        activation=activation,
    )


def qat_linear_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    x: Quantized,
    w: Quantized,
    *,
    input_range: tuple[int, int],
    weight_range: tuple[int, int],
    static: bool = False,
    weight_given: bool = False,
    activation: str = "none",
    input_grad_factor: float = 0.0,
    weight_grad_factor: float = 0.0,
    learned_offset: bool = False,
) -> LinearGradients:
    """Backward of :func:`torchquant.ops.qat_linear`, in ``grad``'s dtype.

    Args:
        grad: ``[M, N]``, usually float64.
        output: of the forward, ``[M, N]``.
        input, weight: ``[M, K]`` and ``[N, K]``, those of the forward.
        x, w: the results of :func:`quantize_rows` and :func:`quantize_pack` for them; the integers
            do not depend on ``grad``'s dtype.
        input_range, weight_range: qmin and qmax.
        static: True if the activations have a fixed range.
        weight_given: True if the weight's scales are given.
        activation: "none" or "relu".
        input_grad_factor, weight_grad_factor: above 0, these scales are learned.
        learned_offset: True if the activations' zero point comes from an offset in real units. The
            offset does not change with the scale, and Qn, Qp are -qmin, qmax. Otherwise the zero
            point does not change, and Qn, Qp are zero_point - qmin, qmax - zero_point.

    Returns:
        The gradients of input, weight and bias, and of the scales and the offset that are learned;
        None for the others.

    Example:
        >>> x, w = torch.ones(1, 2), torch.tensor([[1.0, -0.5]])
        >>> xq, wq = quantize_rows(x), quantize_pack(w)
        >>> ranges = {"input_range": (-128, 127), "weight_range": (-127, 127)}
        >>> qat_linear_backward(torch.ones(1, 1), torch.ones(1, 1), x, w, xq, wq, **ranges).weight
        tensor([[1., 1.]])
    """
    dtype = grad.dtype
    if activation == "relu":
        grad = torch.where(output > 0, grad, 0.0)
    xq = (x.q.to(dtype) - x.zero_point.to(dtype)) * x.scale.to(dtype)
    channel = (-1, 1)
    w_zero, w_scale = w.zero_point.reshape(channel), w.scale.reshape(channel)
    wq = (w.q.to(dtype) - w_zero.to(dtype)) * w_scale.to(dtype)
    grad_input, grad_weight = grad @ wq, grad.t() @ xq
    input_scale = input_offset = weight_scale = None
    if static and input_grad_factor > 0:
        grad_input, slope, clipped = _learned(
            grad_input, input, x.scale, x.zero_point, input_range, learned_offset
        )
        input_scale = slope.sum().reshape(1) * input_grad_factor
        input_offset = clipped.sum().reshape(1) * input_grad_factor
    elif static:
        grad_input = _inside(grad_input, input, x.scale, x.zero_point, input_range)
    if weight_given and weight_grad_factor > 0:
        grad_weight, slope, _ = _learned(grad_weight, weight, w_scale, w_zero, weight_range)
        weight_scale = slope.sum(1) * weight_grad_factor
    elif weight_given:
        grad_weight = _inside(grad_weight, weight, w_scale, w_zero, weight_range)
    return LinearGradients(
        grad_input, grad_weight, grad.sum(0), input_scale, input_offset, weight_scale
    )


def _check_symmetric(who: str, scale: Tensor | None, qmin: int, qmax: int, symmetric: bool) -> None:
    if symmetric and scale is None and qmin > -qmax:
        raise ValueError(
            f"{who}: qmin must be at most -qmax = {-qmax} with symmetric=True and no scale, got "
            f"{qmin}; pass symmetric=False for a range like this"
        )


def _inside(
    grad: Tensor, v: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]
) -> Tensor:
    """The rounded rule: keep the gradient where the rounded value is in the range."""
    steps = torch.round(v.to(torch.float32) * reciprocal(scale))
    low, high = limits[0] - zero, limits[1] - zero
    return torch.where((steps < low) | (steps > high), 0.0, grad)


def _learned(
    grad: Tensor,
    v: Tensor,
    scale: Tensor,
    zero: Tensor,
    limits: tuple[int, int],
    learned_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ's rule: the gradient of the value, and the summands of those of scale and offset."""
    low, high = limits[0] - zero, limits[1] - zero
    steps = v.to(torch.float32) * reciprocal(scale)
    below, above = steps <= low, steps >= high
    slope = (torch.round(steps).to(grad.dtype) - steps.to(grad.dtype)) * grad
    shift = zero if learned_offset else torch.zeros_like(zero)
    slope = torch.where(below, (low + shift).to(grad.dtype) * grad, slope)
    slope = torch.where(above, (high + shift).to(grad.dtype) * grad, slope)
    clipped = torch.where(below | above, grad, 0.0)
    return torch.where(below | above, 0.0, grad), slope, clipped


__all__ = [
    "LinearGradients",
    "Quantized",
    "mm_fake_quantized",
    "qat_linear",
    "qat_linear_backward",
    "quantize_pack",
    "quantize_rows",
]
