"""RMSNorm and LayerNorm with the same bits everywhere.

The result of a sum of floats depends on its order, which in libraries depends on vector width and
number of threads. Here the order is part of the definition: element i of a row belongs to lane
i mod 16; each lane adds its elements one after the other; then lanes 8 apart are added, then 4, 2
and 1. The kernels do the same with vectors of 16, 8 or 1 and never split a row.

Everything is computed in fp32; bfloat16 and float16 input is widened exactly, and the result is
rounded once, at the end. Against float64 the error of an output stays below
``(6 + K / 16) * 2^-24`` relative to its largest summand (the tests check the bound): the sum of K
squares has K / 16 roundings.

A NaN makes its whole row NaN. An infinity does the same in LayerNorm; in RMSNorm it gives NaN in
its own place and zeros elsewhere, as in the formula and in torch. Other rows do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchquant.functional._arithmetic import divide, fmaf, reciprocal
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    require_device,
    require_dtype,
)

_LANES = 16


def rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, cast_before_weight: bool = False
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        weight: float ``[K]`` or None.
        eps: added to the mean square, as float32.
        cast_before_weight: round ``x / rms`` to input's dtype before the weight multiplies, as the
            RMSNorm of Llama in transformers does; with float32 input there is no difference.

    Returns:
        Of input's shape and dtype.

    Raises:
        TypeError: ``input`` or ``weight`` is not float32, bfloat16 or float16.
        ValueError: a shape or a device does not fit, or ``eps`` is negative or not finite.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), None, 0.0)
        tensor([[0.8485, 1.1314]])
    """
    _check("rms_norm", input, eps, weight=weight)
    x = input.to(torch.float32)
    square = divide(_sum(x, squares=True), float(x.shape[-1]))
    y = x * _inverse_root(square, eps)
    if cast_before_weight:
        y = y.to(input.dtype).to(torch.float32)
    if weight is not None:
        y = y * weight.to(torch.float32)
    return y.to(input.dtype)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension.

    Mean first, then the squares of the differences from it: nothing cancels. The multiplication
    with the weight and the addition of the bias are one fused operation.

    Args:
        input: float32, bfloat16 or float16 ``[..., K]``.
        weight: float ``[K]`` or None.
        bias: float ``[K]`` or None; only with a weight.
        eps: added to the variance, as float32.
        residual: of input's shape and dtype, added to it first, in float32; or None.

    Returns:
        Of input's shape and dtype.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16, or ``residual`` has another dtype
            than ``input``.
        ValueError: a shape or a device does not fit, ``bias`` is given without ``weight``, or
            ``eps`` is negative or not finite.

    Source: Ba, Kiros & Hinton, "Layer Normalization" (2016).

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), None, None, 0.0)
        tensor([[-1.,  1.]])
    """
    _check("layer_norm", input, eps, weight=weight, bias=bias)
    if bias is not None and weight is None:
        raise ValueError("layer_norm: bias must come with a weight, got bias alone")
    x = input.to(torch.float32)
    if residual is not None:
        require_dtype("layer_norm", "residual", residual, (input.dtype,))
        require_device("layer_norm", "residual", residual, input.device)
        if residual.shape != input.shape:
            raise ValueError(
                f"layer_norm: residual must have input's shape {list(input.shape)}, "
                f"got {describe(residual)}"
            )
        x = x + residual.to(torch.float32)
    size = float(x.shape[-1])
    centered = x - divide(_sum(x), size)
    variance = divide(_sum(centered, squares=True), size)
    y = centered * _inverse_root(variance, eps)
    if weight is not None:
        w = weight.to(torch.float32)
        y = y * w if bias is None else fmaf(y, w, bias.to(torch.float32))
    return y.to(input.dtype)


def _sum(terms: Tensor, squares: bool = False) -> Tensor:
    """Sum over the last dimension, ``[..., 1]``: of ``terms`` or of their squares."""
    values = pad(terms, (0, -terms.shape[-1] % _LANES))
    lanes = torch.zeros(*values.shape[:-1], _LANES, dtype=torch.float32, device=values.device)
    for part in values.split(_LANES, dim=-1) if values.shape[-1] else ():
        lanes = fmaf(part, part, lanes) if squares else lanes + part
    while (half := lanes.shape[-1] // 2) >= 1:
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def _inverse_root(mean: Tensor, eps: float) -> Tensor:
    total = mean + torch.tensor(eps, dtype=torch.float32, device="cpu")
    # torch's fp32 square root (MKL's on the CPU) is not always rounded correctly. The float64 root,
    # exact to its last bit or two, rounds correctly: no fp32 root is that close to a midpoint.
    root = torch.sqrt(total.to(torch.float64)).to(torch.float32)
    return reciprocal(root)


def _check(who: str, input: Tensor, eps: float, **channels: Tensor | None) -> None:
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() < 1:
        raise ValueError(f"{who}: input must have at least 1 dimension, got {describe(input)}")
    if not 0.0 <= eps <= torch.finfo(torch.float32).max:
        raise ValueError(f"{who}: eps must be finite and not negative, got {eps}")
    for name, tensor in channels.items():
        if tensor is None:
            continue
        require_dtype(who, name, tensor, FLOAT_DTYPES)
        require_device(who, name, tensor, input.device)
        if list(tensor.shape) != [input.shape[-1]]:
            raise ValueError(
                f"{who}: {name} must be [{input.shape[-1]}], one value per element of input's "
                f"last dimension, got {describe(tensor)}"
            )
