"""Operators of a linear layer in training whose weight has 2 to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional.qat_intx import intx_range
from torchquant.ops._register import fake
from torchquant.ops.intx import packed_intx_shape

__all__ = ["qat_linear_intx", "quantize_pack_intx"]


def quantize_pack_intx(
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    qmin: int | None = None,
    qmax: int | None = None,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a float weight to 2 to 8 bits and pack it for the kernels, in one pass.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        scale: float32 ``[N]``, with ``group_size`` ``[N, ceil(K / group_size)]``; None: each is
            computed from the range of its weights. Scales below 2^-126 count as 2^-126.
        bits: 2 to 8.
        group_size: inputs that share a scale, 1 to K; None: one scale per output channel.
        qmin, qmax: least and greatest integer, within those of ``bits`` bits, with qmin <= 0 <
            qmax; None: all integers, but symmetric ones of 8 bits without -128.
        symmetric: without ``scale``: there are no zero points, and qmin is at most -qmax.

    Returns:
        ``(packed, scale, zero_point)``: the packed weight
        (:func:`torchquant.ops.pack_intx_weight`, with zero points unless ``symmetric``), float32
        and int8 ``[N]`` or ``[N, groups]``. A group that holds NaN, or without ``scale`` an
        infinity, has scale NaN and zeros.

    Raises:
        TypeError: ``weight`` is not float32, bfloat16 or float16, or ``scale`` not float32.
        ValueError: bits, group_size or the range is not allowed, or a shape does not fit.

    Example:
        >>> w = torch.tensor([[0.5, -0.7, 0.0, 2.1]])
        >>> packed, scale, _ = quantize_pack_intx(w, bits=4, group_size=2)
        >>> from torchquant.ops import unpack_intx_weight
        >>> unpack_intx_weight(packed, 1, 4, bits=4, group_size=2)[0], scale
        (tensor([[ 5, -7,  0,  7]], dtype=torch.int8), tensor([[0.1000, 0.3000]]))
    """
    qmin, qmax = intx_range(bits, symmetric, qmin, qmax)
    return torch.ops.torchquant.quantize_pack_intx.default(  # type: ignore[no-any-return]
        weight, scale, bits, group_size, qmin, qmax, symmetric
    )


@fake("quantize_pack_intx")
def _(
    weight: Tensor,
    scale: Tensor | None,
    bits: int,
    group_size: int | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape
    packed = packed_intx_shape(outputs, inputs, bits, group_size, not symmetric, weight.device)
    shape: tuple[int, ...] = (outputs,)
    if group_size is not None:
        shape = (outputs, (inputs + group_size - 1) // group_size)
    return (
        torch.empty(packed, dtype=torch.uint8, device=weight.device),
        torch.empty(shape, dtype=torch.float32, device=weight.device),
        torch.empty(shape, dtype=torch.int8, device=weight.device),
    )


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
    """Run a trainable linear layer whose float weight is quantized to 2 to 8 bits inside.

    Forward gives the bits of the deployed layer: :func:`torchquant.ops.linear_dynamic_intx`, or
    where activations stay float :func:`torchquant.ops.linear_intx`. Backward passes the gradient
    straight through the rounding and stops it where a weight is outside the range of its given
    scale. It saves int8 activations (the input itself, if it stays float), and one bit for each
    output of a ReLU.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        weight: float32, bfloat16 or float16 ``[N, K]``.
        bias: float ``[N]`` or None.
        weight_scale: float32 ``[N]``, with ``group_size`` ``[N, ceil(K / group_size)]``; None: each
            is computed from the range of its weights.
        group_size: inputs that share a scale, 1 to K; None: one scale per output channel.
        weight_qmin, weight_qmax, weight_symmetric: as for :func:`quantize_pack_intx`; the number of
            bits is the least for this range.
        activation_bits: 2 to 8: each row of the input is quantized with a scale of its own; None:
            activations stay float.
        activation_symmetric: if True, rows have no zero points.
        activation: "none" or "relu", applied after the bias.
        weight_grad_factor: above 0, ``weight_scale`` is learned by LSQ's rule and its gradient is
            multiplied by this factor.
        output_dtype: float32, bfloat16 or float16; input's when None.

    Returns:
        ``[..., N]`` of ``output_dtype``.

    Raises:
        TypeError: a tensor or ``output_dtype`` has a wrong dtype.
        ValueError: the shapes do not fit, the devices differ, or a number is not allowed.
        NotImplementedError: in backward with ``create_graph=True``.

    Source: Jacob et al. (2018), section 3; Esser et al., "Learned Step Size Quantization" (2020).

    Example:
        >>> x, w = torch.ones(1, 2), torch.tensor([[1.4, -0.1]], requires_grad=True)
        >>> y = qat_linear_intx(x, w, group_size=1)
        >>> y.sum().backward()
        >>> y, w.grad
        (tensor([[1.3000]], grad_fn=<...>), tensor([[1., 1.]]))
    """
    return torch.ops.torchquant.qat_linear_intx.default(  # type: ignore[no-any-return]
        input,
        weight,
        bias,
        weight_scale,
        group_size,
        weight_qmin,
        weight_qmax,
        weight_symmetric,
        activation_bits,
        activation_symmetric,
        activation,
        weight_grad_factor,
        output_dtype,
    )


@fake("qat_linear_intx")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    group_size: int | None,
    weight_qmin: int,
    weight_qmax: int,
    weight_symmetric: bool = True,
    activation_bits: int | None = 8,
    activation_symmetric: bool = False,
    activation: str = "none",
    weight_grad_factor: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (*input.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=output_dtype or input.dtype, device=input.device)
