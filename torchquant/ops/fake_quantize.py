"""Operators of fake quantization in training; see :mod:`torchquant.ops`.

A mask holds one bit per element: uint8 ``[ceil(numel / 8)]``, element i of the contiguous tensor is
bit ``i % 8`` of byte ``i // 8`` (:func:`torchquant.functional.pack_bits`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._checks import require_range, require_tensor
from torchquant.ops._arguments import layout_arguments, numbers_to_tensors
from torchquant.ops._register import fake
from torchquant.scheme import PER_TENSOR, Granularity


def _empty_bits(input: Tensor) -> Tensor:
    size = (input.numel() + 7) // 8
    return torch.empty((size,), dtype=torch.uint8, device=input.device)


def fake_quantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """Quantize and dequantize in one pass: the value of the integer that each element becomes.

    Args:
        input: float32, bfloat16 or float16 ``[...]``; widened to float32 exactly.
        scale: float32 of ``granularity``'s shape, or a number for PerTensor; at least 2^-126. NaN
            makes its elements NaN.
        zero_point: int32 of scale's shape or ``[1]``, within [-2^22, 2^22], or a number; float32
            for a real-valued zero point; None is 0.
        qmin, qmax: the integer range, within [-2^22, 2^22].
        granularity: which elements share a scale.

    Returns:
        Of input's shape and dtype, contiguous; the bits of
        :func:`torchquant.functional.fake_quantize` on every device. NaN stays NaN, infinities
        saturate.

    Raises:
        TypeError: ``input``, ``scale``, ``zero_point`` or ``granularity`` has a wrong type.
        ValueError: a shape, an axis, a device, the range, or a number is not allowed.

    Gradients: to ``input``, passed on where the rounded value is in [qmin, qmax] and +0 elsewhere,
    including gradients of gradients. One bit per element is saved for them. Scale and zero point
    get no gradients; :func:`fake_quantize_learned` has those.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 3.

    Example:
        >>> x = torch.tensor([-1.0, 0.26, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, 0.05, qmin=-8, qmax=7)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-0.4000,  0.2500,  0.3500]), tensor([0., 1., 0.]))
    """
    require_tensor("fake_quantize", "input", input)
    require_range("fake_quantize", qmin, qmax)
    scale, zero_point = numbers_to_tensors("fake_quantize", scale, zero_point, input, qmin, qmax)
    layout = layout_arguments("fake_quantize", granularity, input)
    return torch.ops.torchquant.fake_quantize.default(  # type: ignore[no-any-return]
        input, scale, zero_point, qmin, qmax, **layout
    )


@fake("fake_quantize")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def fake_quantize_mask(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize` and the mask of its gradient, :func:`in_range`, in one pass.

    Args:
        input, scale, zero_point, qmin, qmax, granularity: as in :func:`fake_quantize`.

    Returns:
        ``(output, bits)``. Not differentiable; save ``bits`` for your own backward.

    Raises:
        TypeError, ValueError: as :func:`fake_quantize`.

    Example:
        >>> fake_quantize_mask(torch.tensor([-1.0, 0.26, 9.0]), 0.05, qmin=-8, qmax=7)
        (tensor([-0.4000,  0.2500,  0.3500]), tensor([2], dtype=torch.uint8))
    """
    require_tensor("fake_quantize_mask", "input", input)
    require_range("fake_quantize_mask", qmin, qmax)
    scale, zero_point = numbers_to_tensors(
        "fake_quantize_mask", scale, zero_point, input, qmin, qmax
    )
    layout = layout_arguments("fake_quantize_mask", granularity, input)
    return torch.ops.torchquant.fake_quantize_mask.default(  # type: ignore[no-any-return]
        input, scale, zero_point, qmin, qmax, **layout
    )


@fake("fake_quantize_mask")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(input.shape, dtype=input.dtype, device=input.device),
        _empty_bits(input),
    )


def in_range(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """Compute the mask of the elements whose rounded value is in [qmin, qmax]; False for NaN.

    Args:
        input, scale, zero_point, qmin, qmax, granularity: as in :func:`fake_quantize`.

    Returns:
        uint8 ``[ceil(numel / 8)]``: :func:`torchquant.functional.in_range`, one bit per element.

    Raises:
        TypeError, ValueError: as :func:`fake_quantize`.

    Example:
        >>> in_range(torch.tensor([-1.0, 0.26, 9.0]), 0.05, qmin=-8, qmax=7)
        tensor([2], dtype=torch.uint8)
    """
    require_tensor("in_range", "input", input)
    require_range("in_range", qmin, qmax)
    scale, zero_point = numbers_to_tensors("in_range", scale, zero_point, input, qmin, qmax)
    layout = layout_arguments("in_range", granularity, input)
    return torch.ops.torchquant.in_range.default(  # type: ignore[no-any-return]
        input, scale, zero_point, qmin, qmax, **layout
    )


@fake("in_range")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return _empty_bits(input)


def positive(input: Tensor) -> Tensor:
    """Compute the mask of ``input > 0``, where a relu passes its gradient.

    Args:
        input: float32, bfloat16 or float16 ``[...]``.

    Returns:
        uint8 ``[ceil(numel / 8)]``.

    Raises:
        TypeError: input has another dtype.

    Example:
        >>> positive(torch.tensor([1.0, 0.0, -1.0, 2.0]))
        tensor([9], dtype=torch.uint8)
    """
    return torch.ops.torchquant.positive.default(input)  # type: ignore[no-any-return]


@fake("positive")
def _(input: Tensor) -> Tensor:
    return _empty_bits(input)


def mask_gradient(grad: Tensor, bits: Tensor) -> Tensor:
    """Keep ``grad`` where its bit is set; +0 elsewhere.

    Args:
        grad: float32, bfloat16 or float16 ``[...]``.
        bits: uint8 ``[ceil(numel / 8)]``, from :func:`in_range` or :func:`positive`.

    Returns:
        Of grad's shape and dtype, contiguous.

    Raises:
        TypeError: ``grad`` is not float32, bfloat16 or float16, or ``bits`` is not uint8.
        ValueError: ``bits`` has another size or is on another device.

    Gradients: to ``grad``, including gradients of gradients.

    Example:
        >>> mask_gradient(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5], dtype=torch.uint8))
        tensor([1., 0., 3.])
    """
    return torch.ops.torchquant.mask_gradient.default(grad, bits)  # type: ignore[no-any-return]


@fake("mask_gradient")
def _(grad: Tensor, bits: Tensor) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    grad_factor: float = 1.0,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """:func:`fake_quantize` with a learned step and an optional learned offset (LSQ, LSQ+).

    Args:
        input: float32, bfloat16 or float16 ``[...]``.
        scale: float32 of ``granularity``'s shape. Below 2^-126 it is used as 2^-126; NaN makes its
            elements NaN.
        offset: float32 of scale's shape, in input's units, or None. It acts through the integer
            ``zero_point = clamp(rint(-offset / scale), qmin, qmax)``
            (:func:`torchquant.functional.learned_zero_point`), which can be deployed.
        qmin, qmax: the integer range, within [-2^22, 2^22]; ``qmin=0`` for an unsigned one.
        grad_factor: multiplies the gradients of scale and offset. In LSQ it is
            ``1 / sqrt(N * qmax)`` with N the number of weights per step, or of a layer's features.
        granularity: which elements share a scale.

    Returns:
        Of input's shape and dtype, contiguous; the bits of :func:`fake_quantize` with that zero
        point.

    Raises:
        TypeError: ``input``, ``scale``, ``offset`` or ``granularity`` has a wrong type.
        ValueError: a shape, an axis, a device or the range is not allowed.
        RuntimeError: in backward with ``create_graph=True``.

    Gradients: to ``input``, ``scale`` and ``offset``, computed by
    :func:`fake_quantize_learned_backward`. Input is saved for them.

    Source: Esser et al., "Learned Step Size Quantization" (2020); Bhalgat et al., "LSQ+" (2020).

    Example:
        >>> step = torch.tensor([0.5], requires_grad=True)
        >>> y = fake_quantize_learned(torch.tensor([-1.0, 0.3, 9.0]), step, qmin=-4, qmax=3)
        >>> y.sum().backward()
        >>> y.detach(), step.grad
        (tensor([-1.0000,  0.5000,  1.5000]), tensor([3.4000]))
    """
    require_tensor("fake_quantize_learned", "input", input)
    require_tensor("fake_quantize_learned", "scale", scale)
    require_range("fake_quantize_learned", qmin, qmax)
    layout = layout_arguments("fake_quantize_learned", granularity, input)
    return torch.ops.torchquant.fake_quantize_learned.default(  # type: ignore[no-any-return]
        input, scale, offset, qmin, qmax, grad_factor, **layout
    )


@fake("fake_quantize_learned")
def _(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def fake_quantize_learned_backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a learned step in one pass, without LSQ's factor.

    With ``v = input / scale``, inside meaning ``qmin - zero_point < v < qmax - zero_point`` (before
    rounding): the gradient of input is ``grad`` inside and +0 outside; that of scale the sum of
    ``grad * (rint(v) - v)`` inside, ``grad * qmin`` below and ``grad * qmax`` above; that of offset
    the sum of ``grad`` outside.

    Args:
        grad: of input's shape and dtype.
        input, scale, qmin, qmax, granularity: as in :func:`fake_quantize_learned`.
        zero_point: int32 of scale's shape, within [qmin, qmax], or None.

    Returns:
        ``(grad_input, grad_scale, grad_offset)``: input's shape and dtype; float32 of scale's
        shape. Sums in a fixed order: the same bits on every CPU and with any number of threads.
        They are rounded from float64 sums of blocks of at most 4096 elements in float32. A GPU
        adds in another fixed order, so its sums may differ from the CPU's in the last bits.

    Raises:
        TypeError: ``grad`` has another dtype than ``input``, or another argument a wrong type.
        ValueError: a shape, an axis, a device or the range is not allowed.

    Example:
        >>> x, step = torch.tensor([-1.0, 0.3, 9.0]), torch.tensor([0.5])
        >>> fake_quantize_learned_backward(torch.ones(3), x, step, qmin=-4, qmax=3)
        (tensor([1., 1., 0.]), tensor([3.4000]), tensor([1.]))
    """
    require_tensor("fake_quantize_learned_backward", "input", input)
    require_range("fake_quantize_learned_backward", qmin, qmax)
    layout = layout_arguments("fake_quantize_learned_backward", granularity, input)
    return torch.ops.torchquant.fake_quantize_learned_backward.default(  # type: ignore[no-any-return]
        grad, input, scale, zero_point, qmin, qmax, **layout
    )


@fake("fake_quantize_learned_backward")
def _(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(input.shape, dtype=input.dtype, device=input.device),
        torch.empty(scale.shape, dtype=torch.float32, device=input.device),
        torch.empty(scale.shape, dtype=torch.float32, device=input.device),
    )


def minmax(
    input: Tensor, *, granularity: Granularity = PER_TENSOR
) -> tuple[Tensor, Tensor, Tensor]:
    """Find each scale's least and greatest finite element, and count the non-finite ones.

    Args:
        input: float32, bfloat16 or float16 ``[...]``.
        granularity: which elements share a scale.

    Returns:
        ``(least, greatest, nonfinite)``: float32 of the shape of granularity's scales, inf and -inf
        where there is no finite element; int64 ``[1]``. Not differentiable.

    Raises:
        TypeError: ``input`` is not float32, bfloat16 or float16, or ``granularity`` is not a
            granularity.
        ValueError: ``input`` has no such axis.

    Example:
        >>> minmax(torch.tensor([1.0, -2.0, float("nan")]))
        (tensor([-2.]), tensor([1.]), tensor([1]))
    """
    require_tensor("minmax", "input", input)
    layout = layout_arguments("minmax", granularity, input)
    return torch.ops.torchquant.minmax.default(input, **layout)  # type: ignore[no-any-return]


@fake("minmax")
def _(
    input: Tensor, axis: int | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if axis is not None:
        shape: tuple[int, ...] = (input.shape[axis],)
    elif group_size is not None:
        shape = (*input.shape[:-1], (input.shape[-1] + group_size - 1) // group_size)
    else:
        shape = (1,)
    return (
        torch.empty(shape, dtype=torch.float32, device=input.device),
        torch.empty(shape, dtype=torch.float32, device=input.device),
        torch.empty((1,), dtype=torch.int64, device=input.device),
    )
