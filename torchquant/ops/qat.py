"""Operators of a quantized layer in training; see :mod:`torchquant.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.ops._arguments import packed_shape
from torchquant.ops._register import fake


def quantize_rows(
    input: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations row by row to the integers that a linear layer computes with.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        scale: float32 ``[1]``, the scale of all rows; None: each row gets its own from its range.
        zero_point: int32 ``[1]`` within [qmin, qmax], with ``scale`` only; None is 0.
        qmin, qmax: least and greatest integer, within -128 .. 127, with qmin <= 0 < qmax.
        symmetric: without ``scale``: rows have zero point 0, and qmin is at most -qmax.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, float32 ``[..., 1]``, int32 ``[..., 1]``. A
        row has scale NaN where it holds NaN or, with a scale of its own, an infinity.

    Raises:
        TypeError: ``input`` is not float32, bfloat16 or float16, ``scale`` not float32 or
            ``zero_point`` not int32.
        ValueError: the range is not allowed, ``scale`` or ``zero_point`` does not hold one value,
            or ``zero_point`` is given without ``scale``.

    Example:
        >>> q, scale, zero_point = quantize_rows(torch.tensor([[-3.0, 1.0]]), qmin=-2, qmax=1)
        >>> q, scale
        (tensor([[-2,  1]], dtype=torch.int8), tensor([[1.3333]]))
    """
    return torch.ops.torchquant.quantize_rows.default(  # type: ignore[no-any-return]
        input, scale, zero_point, qmin, qmax, symmetric
    )


@fake("quantize_rows")
def _(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    token = (*input.shape[:-1], 1)
    return (
        torch.empty(input.shape, dtype=torch.int8, device=input.device),
        torch.empty(token, dtype=torch.float32, device=input.device),
        torch.empty(token, dtype=torch.int32, device=input.device),
    )


def quantize_pack(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a float weight per output channel and pack it for the kernels, in one pass.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        scale: float32 ``[N]`` or ``[1]``; None: each channel's is computed from its range. Scales
            below 2^-126 count as 2^-126.
        qmin, qmax: least and greatest integer, within -128 .. 127, with qmin <= 0 < qmax.
        symmetric: without ``scale``: channels have zero point 0, and qmin is at most -qmax.

    Returns:
        ``(packed, scale, zero_point)``: the packed weight (:func:`torchquant.ops.pack_weight`),
        float32 ``[N]``, int32 ``[N]``. A channel that holds NaN, or without ``scale`` an
        infinity, has scale NaN and zeros.

    Raises:
        TypeError: ``weight`` is not float32, bfloat16 or float16, or ``scale`` not float32.
        ValueError: the range is not allowed, or a shape does not fit.

    Example:
        >>> packed, scale, _ = quantize_pack(torch.tensor([[0.5, -1.27], [0.0, 2.54]]))
        >>> from torchquant.ops import unpack_weight
        >>> unpack_weight(packed, 2, 2), scale
        (tensor([[  50, -127],
                [   0,  127]], dtype=torch.int8), tensor([0.0100, 0.0200]))
    """
    return torch.ops.torchquant.quantize_pack.default(  # type: ignore[no-any-return]
        weight, scale, qmin, qmax, symmetric
    )


@fake("quantize_pack")
def _(
    weight: Tensor, scale: Tensor | None, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    channels, shape = (
        weight.shape[:1],
        packed_shape(weight.shape[0], weight.shape[1], weight.device),
    )
    return (
        torch.empty(shape, dtype=torch.int8, device=weight.device),
        torch.empty(channels, dtype=torch.float32, device=weight.device),
        torch.empty(channels, dtype=torch.int32, device=weight.device),
    )


def mm_fake_quantized(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    qmin: int = -127,
    qmax: int = 127,
) -> Tensor:
    """Compute ``grad @ fake_quantize(weight)``, the gradient of a layer's input.

    The weight is quantized per output channel.

    Args:
        grad: float32 ``[M, N]``.
        weight: float32 ``[N, K]``.
        scale: float32 ``[N]`` or ``[1]``, at least 2^-126.
        zero_point: int32 ``[N]`` or ``[1]`` within [qmin, qmax], or None.
        qmin, qmax: as for :func:`quantize_pack`.

    Returns:
        float32 ``[M, K]``. Not differentiable. No tensor of the weight's size is allocated.

    Raises:
        TypeError: ``grad``, ``weight`` or ``scale`` is not float32, or ``zero_point`` not int32.
        ValueError: the shapes do not fit, the range is not allowed, or a scale is below 2^-126.

    Example:
        >>> mm_fake_quantized(torch.ones(1, 1), torch.tensor([[0.26, 9.0]]), torch.ones(1) / 2)
        tensor([[0.5000, 9.0000]])
    """
    return torch.ops.torchquant.mm_fake_quantized.default(  # type: ignore[no-any-return]
        grad, weight, scale, zero_point, qmin, qmax
    )


@fake("mm_fake_quantized")
def _(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    return torch.empty((grad.shape[0], weight.shape[1]), dtype=grad.dtype, device=grad.device)


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
    """Run a trainable linear layer on integers; float input and weight are quantized inside.

    Forward gives the bits of the deployed layer. Backward passes the gradient straight through the
    rounding and stops it where a value is outside a fixed range. It saves int8 activations and one
    bit per element; the float input is saved only where ``input_scale`` is learned.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        weight: float32, bfloat16 or float16 ``[N, K]``.
        bias: float ``[N]`` or None.
        input_scale: float32 ``[1]`` for static activations; None: each row has its own scale, and
            ``input_qmax`` is 2^(bits - 1) - 1.
        input_zero_point: int32 ``[1]``, with ``input_scale`` only. None: 0, or computed from
            ``input_offset``.
        input_offset: float32 ``[1]``, LSQ+'s learned offset in real units: zero point
            ``clamp(rint(-offset / scale))``.
        input_qmin, input_qmax, input_symmetric: as for :func:`quantize_rows`; a static range
            without zero point and offset may be unsigned, 0 to at most 255.
        weight_scale: float32 ``[N]``; None: each channel's is computed from its range.
        weight_qmin, weight_qmax, weight_symmetric: as for :func:`quantize_pack`.
        activation: "none" or "relu", applied after the bias.
        input_grad_factor: above 0, ``input_scale`` and ``input_offset`` are learned by LSQ's rule
            and their gradients are multiplied by this factor.
        weight_grad_factor: the same for ``weight_scale``.
        output_dtype: float32, bfloat16 or float16; input's when None.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a tensor or ``output_dtype`` has a wrong dtype.
        ValueError: the shapes do not fit, the devices differ, a range is not allowed, or two
            arguments exclude each other.
        NotImplementedError: in backward with ``create_graph=True``.

    Source: Jacob et al. (2018), section 3; Esser et al., "Learned Step Size Quantization" (2020).

    Example:
        >>> x, w = torch.ones(1, 2), torch.tensor([[1.0, -0.5]], requires_grad=True)
        >>> y = qat_linear(x, w)
        >>> y.sum().backward()
        >>> y, w.grad
        (tensor([[0.4961]], grad_fn=<...>), tensor([[1., 1.]]))
    """
    return torch.ops.torchquant.qat_linear.default(  # type: ignore[no-any-return]
        input,
        weight,
        bias,
        input_scale,
        input_zero_point,
        input_offset,
        input_qmin,
        input_qmax,
        input_symmetric,
        weight_scale,
        weight_qmin,
        weight_qmax,
        weight_symmetric,
        activation,
        input_grad_factor,
        weight_grad_factor,
        output_dtype,
    )


@fake("qat_linear")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    input_offset: Tensor | None,
    input_qmin: int,
    input_qmax: int,
    input_symmetric: bool,
    weight_scale: Tensor | None,
    weight_qmin: int,
    weight_qmax: int,
    weight_symmetric: bool,
    activation: str = "none",
    input_grad_factor: float = 0.0,
    weight_grad_factor: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (*input.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=output_dtype or input.dtype, device=input.device)
