"""Quantize, dequantize and fake-quantize: the mapping between real numbers and integers.

With scale s (fp32) and integer zero point z::

    q  = clamp(rint(x * (1/s)) + z, qmin, qmax)
    x' = fl(float(q - z) * s)

``1/s`` is one division per scale, the product one multiplication, ``rint`` rounds half to even. The
clamp happens in fp32 *before* the conversion to an integer, as ``clamp(., qmin - z, qmax - z)``,
because x86 converts everything out of range to INT_MIN. NaN becomes the zero point.

With a real-valued zero point zp (fp32), the value that the integer 0 represents::

    q  = clamp(rint((x - zp) * (1/s)), qmin, qmax)
    x' = fl(fl(q * s) + zp)
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant.functional._arithmetic import reciprocal
from torchquant.functional._checks import (
    FLOAT_DTYPES,
    describe,
    dtype_name,
    require_dtype,
    require_range,
    scale_tensor,
    zero_point_tensor,
)
from torchquant.functional.qparams import qparams_from_range
from torchquant.scheme import (
    PER_TENSOR,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)

INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)
_GRANULARITIES = (PerTensor, PerAxis, PerGroup, PerToken)


def quantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Map real numbers to integers: ``clamp(rint(x * (1/scale)) + zero_point, qmin, qmax)``.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape; half types are widened to fp32, exactly.
        scale: fp32 tensor of the shape that ``granularity`` gives (PerTensor ``[1]``, PerAxis
            ``[C]``, PerGroup ``[..., ceil(K/group_size)]``, PerToken ``[..., 1]``), or a float
            for PerTensor. At least 2^-126; NaN turns its elements into the zero point.
        zero_point: integer in [qmin, qmax] or int32 tensor of scale's shape (or ``[1]``); None is
            0. A *float32* tensor is a real-valued zero point: the value that the integer 0
            represents.
        qmin, qmax: range of the result.
        granularity: which elements share a scale.
        dtype: int8, uint8, int16 or int32; by default the first of int8, uint8, int32 that holds
            [qmin, qmax].

    Returns:
        Integer tensor of input's shape. NaN gives the zero point (with a real-valued one the
        integer nearest 0), +-inf the ends of the range.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device, range, or a number outside its bounds.

    Example:
        >>> quantize(torch.tensor([-1.0, 0.26, 9.0]), 0.05, 3)
        tensor([-17,   8, 127], dtype=torch.int8)
    """
    who = "quantize"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    target = _integer_dtype(who, dtype, qmin, qmax)
    s, z = _broadcastable(who, input, scale, zero_point, granularity, qmin, qmax)
    steps = torch.nan_to_num(_steps(input, s, z, qmin, qmax), nan=0.0)
    if z.is_floating_point():
        return steps.clamp(qmin, qmax).to(target)
    numbers = steps.to(torch.int32) + z
    # Only a NaN together with a zero point outside the range still needs the clamp.
    return numbers.clamp(qmin, qmax).to(target)


def dequantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    granularity: Granularity = PER_TENSOR,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Map integers back to real numbers: ``float(input - zero_point) * scale``.

    Args:
        input: int8, uint8, int16 or int32 tensor of any shape.
        scale, zero_point, granularity: as in :func:`quantize`.
        dtype: float32, bfloat16 or float16; the fp32 result is rounded to it once.

    Returns:
        Tensor of input's shape and of ``dtype``.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device, or a number outside its bounds.

    Example:
        >>> dequantize(torch.tensor([-17, 8], dtype=torch.int8), 0.05, 3)
        tensor([-1.0000,  0.2500])
    """
    who = "dequantize"
    require_dtype(who, "input", input, INTEGER_DTYPES)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{who}: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        )
    limits = torch.iinfo(torch.int32)
    s, z = _broadcastable(who, input, scale, zero_point, granularity, limits.min, limits.max)
    if z.is_floating_point():
        return (input.to(torch.float32) * s + z).to(dtype)
    # int64: neither the difference of two int32 nor its conversion may wrap or round twice.
    return ((input.to(torch.int64) - z).to(torch.float32) * s).to(dtype)


def fake_quantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None = None,
    *,
    qmin: int = -128,
    qmax: int = 127,
    granularity: Granularity = PER_TENSOR,
) -> Tensor:
    """``dequantize(quantize(x))`` in one step, except that NaN stays NaN.

    For ``|x / scale| < 2^31`` this equals ``torch.fake_quantize_per_tensor_affine`` and
    ``torch.fake_quantize_per_channel_affine`` bit for bit; beyond, torch wraps and this saturates.

    Args:
        input: fp32, bf16 or fp16 tensor of any shape.
        scale, zero_point, qmin, qmax, granularity: as in :func:`quantize`.

    Returns:
        Tensor of input's shape and dtype (rounded to it once, from fp32). No gradient passes
        through the rounding.

    Raises:
        TypeError: wrong dtype of an argument.
        ValueError: wrong shape, device, range, or a number outside its bounds.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.26, 9.0, float("nan")]), 0.05, 3)
        tensor([-1.0000,  0.2500,  6.2000,     nan])
    """
    who = "fake_quantize"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    require_range(who, qmin, qmax)
    s, z = _broadcastable(who, input, scale, zero_point, granularity, qmin, qmax)
    steps = _steps(input, s, z, qmin, qmax)
    # The integer path has no negative zero: adding +0 turns -0 into +0 and changes nothing else.
    values = (steps + 0.0) * s
    return (values + z if z.is_floating_point() else values).to(input.dtype)


def quantize_per_token(
    input: Tensor, *, symmetric: bool = True, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row to integers with a scale of its own, computed from the row.

    A row's result depends on no other row: it is the same alone and in any batch.

    Args:
        input: fp32, bf16 or fp16 tensor ``[..., K]``.
        symmetric: True: range [-127, 127] and zero point 0; False: [-128, 127], and the row's
            range is widened to contain 0.
        bits: 2 to 8; below 8 the range is the whole signed one.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, fp32 ``[..., 1]``, int32 ``[..., 1]``.
        A row that holds NaN or +-inf gets scale NaN, zero point 0 and q 0 throughout: every result
        computed from it is NaN, so the problem stays visible.

    Raises:
        TypeError: ``input`` is not a float tensor.
        ValueError: ``input`` has no dimension.

    Example:
        >>> q, scale, zero_point = quantize_per_token(torch.tensor([[1.0, -2.54], [0.0, 0.0]]))
        >>> q.tolist(), scale.tolist() == [[torch.tensor(0.02).item()], [1.0]], zero_point.tolist()
        ([[50, -127], [0, 0]], True, [[0], [0]])
    """
    who = "quantize_per_token"
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.dim() == 0:
        raise ValueError(f"{who}: input must have shape [..., K], got a 0-dimensional tensor")
    x = input.to(torch.float32)
    if x.shape[-1] == 0:
        least = greatest = x.new_zeros((*x.shape[:-1], 1))
    else:
        least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    qmin, qmax = quant_range(bits, narrow_range=symmetric and bits == 8)
    scale, zero_point = qparams_from_range(
        least, greatest, qmin=qmin, qmax=qmax, symmetric=symmetric
    )
    q = quantize(
        x, scale, zero_point, qmin=qmin, qmax=qmax, granularity=PerToken(), dtype=torch.int8
    )
    return q, scale, zero_point


def _steps(input: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int) -> Tensor:
    """``q - z`` (with a real-valued zero point: ``q``) as fp32; NaN stays NaN."""
    x = input.to(torch.float32)
    if z.is_floating_point():
        return torch.clamp(torch.round((x - z) * reciprocal(s)), qmin, qmax)
    low, high = (qmin - z).to(torch.float32), (qmax - z).to(torch.float32)
    return torch.clamp(torch.round(x * reciprocal(s)), low, high)


def _integer_dtype(who: str, dtype: torch.dtype | None, qmin: int, qmax: int) -> torch.dtype:
    require_range(who, qmin, qmax)
    candidates = (torch.int8, torch.uint8, torch.int32) if dtype is None else (dtype,)
    for candidate in candidates:
        if candidate not in INTEGER_DTYPES:
            raise TypeError(
                f"{who}: dtype must be int8, uint8, int16 or int32, got {dtype_name(candidate)}"
            )
        if torch.iinfo(candidate).min <= qmin and qmax <= torch.iinfo(candidate).max:
            return candidate
    raise ValueError(
        f"{who}: dtype must hold [qmin, qmax] = [{qmin}, {qmax}], got {dtype_name(candidates[-1])}"
    )


def _broadcastable(
    who: str,
    data: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor | None,
    granularity: Granularity,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    """Checked scale (fp32) and zero point (int32, or fp32 if real) that broadcast against data."""
    if not isinstance(granularity, _GRANULARITIES):
        raise TypeError(
            f"{who}: granularity must be PerTensor(), PerAxis(axis), PerGroup(group_size) or "
            f"PerToken(), got {describe(granularity)}"
        )
    shape = granularity.scale_shape(data.shape)
    who = f"{who} with {granularity}"
    s = scale_tensor(who, "scale", scale, data.device, shape)
    z = zero_point_tensor(
        who, "zero_point", zero_point, data.device, low, high, shape, (1,), allow_real=True
    )
    return _expand(s, data, granularity), _expand(z, data, granularity)


def _expand(parameter: Tensor, data: Tensor, granularity: Granularity) -> Tensor:
    if parameter.shape == (1,) and not isinstance(granularity, PerToken):
        return parameter.reshape(())  # broadcasts against 0-dimensional data too
    if isinstance(granularity, PerAxis):
        axis = granularity.normalized_axis(data.shape)
        return parameter.reshape(-1, *([1] * (data.dim() - 1 - axis)))
    if isinstance(granularity, PerGroup):
        wide = parameter.repeat_interleave(granularity.group_size, dim=-1)
        return wide[..., : data.shape[-1]]
    return parameter
