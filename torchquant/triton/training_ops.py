"""Operators of training, of affine quantization and of what runs element by element, in Triton.

The functions have the operators' signatures (csrc/ops.cpp). Where a call is not covered, or is an
error, they return ``NotImplemented``: the ATen fallback does it, or says what is wrong. Values
inside tensors are never read on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchquant.functional.activations import ACTIVATIONS
from torchquant.triton import elementwise, norms, tiles
from torchquant.triton import fake_quantize as kernels
from torchquant.triton.launch import launch, next_power_of_2
from torchquant.triton.tiles import Spans, Tiles, spans_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.int8, torch.uint8)
_LIMIT = 2**20  # with zero points up to 2^22 the limits stay below 2^23 (round_within)
_STEP = 1024  # elements that a program of a second step takes at once


_BYTES = 256  # of a mask in a program: one for each of its threads
_ROW_STEPS = 16  # steps of a norm whose loads are under way together: 64 registers


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    zero = _kind_of_zero(zero_point, scale)
    if spans is None or zero is None or input.dtype not in FLOATS or dtype not in BYTES:
        return NotImplemented
    limits = torch.iinfo(dtype)
    if not limits.min <= qmin < qmax <= limits.max:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    scale = scale.contiguous()
    launch(
        elementwise.quantize_kernel,
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        out,
        _step_of_zero(zero_point, scale),
        float(qmin),
        float(qmax),
        ZERO=zero,
        **tiling.arguments(),
    )
    return out


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    zero = _kind_of_zero(zero_point, scale)
    if spans is None or zero is None or input.dtype not in BYTES or dtype not in FLOATS:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=dtype, device=input.device)
    scale = scale.contiguous()
    launch(
        elementwise.dequantize_kernel,
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        out,
        _step_of_zero(zero_point, scale),
        ZERO=zero,
        **tiling.arguments(),
    )
    return out


def activation(input: Tensor, activation: str, dtype: torch.dtype | None = None) -> Any:
    return _activation(input, None, activation, input.dtype if dtype is None else dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Any:
    if up.dtype != gate.dtype or up.shape != gate.shape or up.device != gate.device:
        return NotImplemented
    return _activation(gate, up, activation, gate.dtype)


def rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, cast_before_weight: bool = False
) -> Any:
    return _norm(input, weight, None, eps, None, centered=False, cast=cast_before_weight)


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Any:
    return _norm(input, weight, bias, eps, residual, centered=True)


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    result = _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size, bits=False)
    return result if result is NotImplemented else result[0]


def fake_quantize_mask(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    return _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size)


def in_range(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    result = _fake_quantize(input, scale, zero_point, qmin, qmax, axis, group_size, out=False)
    return result if result is NotImplemented else result[1]


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_factor: float,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    if spans is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
        return NotImplemented
    if not _like_scale(offset, scale, torch.float32):
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    zero = "none" if offset is None else "offset"
    _run_fake_quantize(tiling, input, scale, offset, zero, qmin, qmax, out, None, learned=True)
    return out


def fake_quantize_learned_backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    if spans is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
        return NotImplemented
    if not _like_scale(zero_point, scale, torch.int32):
        return NotImplemented
    if grad.dtype != input.dtype or grad.shape != input.shape or grad.device != input.device:
        return NotImplemented
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    scale = scale.contiguous()
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    grad_scale, grad_offset = torch.empty_like(scale), torch.empty_like(scale)
    parts, programs = _division(tiling)
    scale_sums, offset_sums = grad_scale, grad_offset
    if parts > 1:
        scale_sums, offset_sums = scale.new_empty((2, parts, spans.channels)).unbind()
    launch(
        kernels.learned_backward_kernel,
        (programs,),
        input.device,
        grad.contiguous(),
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        grad_input,
        scale_sums,
        offset_sums,
        tiling.turns,
        float(qmin),
        float(qmax),
        ZERO="none" if zero_point is None else "integer",
        **tiling.arguments(),
    )
    if parts > 1:
        channels, block = _second_step(parts, spans.channels)
        launch(
            kernels.add_parts_kernel,
            (-(-spans.channels // channels),),
            input.device,
            scale_sums,
            offset_sums,
            grad_scale,
            grad_offset,
            parts,
            spans.channels,
            PARTS=block,
            CHANNELS=channels,
        )
    return grad_input, grad_scale, grad_offset


def positive(input: Tensor) -> Any:
    n = input.numel()
    if n == 0 or input.dtype not in FLOATS:
        return NotImplemented
    bits = torch.empty(((n + 7) // 8,), dtype=torch.uint8, device=input.device)
    launch(
        elementwise.positive_kernel,
        (-(-bits.numel() // _BYTES),),
        input.device,
        input.contiguous(),
        bits,
        n,
        BYTES=_BYTES,
        num_warps=_BYTES // 32,
    )
    return bits


def mask_gradient(grad: Tensor, bits: Tensor) -> Any:
    n = grad.numel()
    if n == 0 or grad.dtype not in FLOATS or bits.dtype != torch.uint8:
        return NotImplemented
    if tuple(bits.shape) != ((n + 7) // 8,) or bits.device != grad.device:
        return NotImplemented
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    launch(
        elementwise.mask_gradient_kernel,
        (-(-bits.numel() // _BYTES),),
        grad.device,
        grad.contiguous(),
        bits.contiguous(),
        out,
        n,
        BYTES=_BYTES,
        num_warps=_BYTES // 32,
    )
    return out


def mm_fake_quantized(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
) -> Any:
    if weight.dim() != 2 or grad.dim() != 2 or grad.shape[1] != weight.shape[0]:
        return NotImplemented
    if grad.dtype != torch.float32 or weight.dtype != torch.float32 or grad.device != weight.device:
        return NotImplemented
    n = (weight.shape[0],)
    for tensor, dtype in ((scale, torch.float32), (zero_point, torch.int32)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape not in ((), (1,), n)):
            return NotImplemented
    if not -128 <= qmin <= 0 < qmax <= 127:
        return NotImplemented
    if zero_point is not None and zero_point.numel() == 1:
        zero_point = zero_point.reshape(1)
    values = fake_quantize(weight, scale.expand(n), zero_point, qmin, qmax, axis=0)
    if values is NotImplemented or grad.shape[0] == 0:
        return NotImplemented
    # The operators' own calls would pass autograd and autocast once more.
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        return torch.mm(grad, values)


def minmax(input: Tensor, axis: int | None = None, group_size: int | None = None) -> Any:
    found = spans_of(input, axis, group_size)
    if found is None or input.dtype not in FLOATS:
        return NotImplemented
    spans, shape = found
    tiling = tiles.tiles_of(spans)
    assert tiling is not None
    least = torch.empty(shape, dtype=torch.float32, device=input.device)
    greatest = torch.empty_like(least)
    nonfinite = torch.empty((1,), dtype=torch.int64, device=input.device)
    parts, programs = _division(tiling)
    lows, highs = least.new_empty((2, parts, spans.channels)).unbind()
    counts = torch.empty((programs,), dtype=torch.int32, device=input.device)
    launch(
        kernels.minmax_kernel,
        (programs,),
        input.device,
        input.contiguous(),
        lows,
        highs,
        counts,
        tiling.turns,
        **tiling.arguments(),
    )
    channels, block = _second_step(parts, spans.channels)
    launch(
        kernels.combine_ranges_kernel,
        (-(-spans.channels // channels) + 1,),
        input.device,
        lows,
        highs,
        counts,
        least,
        greatest,
        nonfinite,
        parts,
        spans.channels,
        programs,
        PARTS=block,
        CHANNELS=channels,
        COUNTS=_STEP,
    )
    return least, greatest, nonfinite


def _fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    out: bool = True,
    bits: bool = True,
) -> Any:
    spans = _scaled(input, scale, axis, group_size)
    zero = _kind_of_zero(zero_point, scale)
    if spans is None or zero is None or input.dtype not in FLOATS or not _is_range(qmin, qmax):
        return NotImplemented
    tiling = tiles.tiles_of(spans, bits)
    if tiling is None:
        return NotImplemented
    values = mask = None
    if out:
        values = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if bits:
        mask = torch.empty(((input.numel() + 7) // 8,), dtype=torch.uint8, device=input.device)
    _run_fake_quantize(tiling, input, scale, zero_point, zero, qmin, qmax, values, mask)
    return values, mask


def _run_fake_quantize(
    tiling: Tiles,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    zero: str,
    qmin: int,
    qmax: int,
    out: Tensor | None,
    bits: Tensor | None,
    learned: bool = False,
) -> None:
    scale = scale.contiguous()
    launch(
        kernels.fake_quantize_kernel,
        (tiling.programs,),
        input.device,
        input.contiguous(),
        scale,
        scale if zero_point is None else zero_point.contiguous(),
        input if out is None else out,  # not written
        scale if bits is None else bits,
        _step_of_zero(zero_point, scale),
        float(qmin),
        float(qmax),
        ZERO=zero,
        LEARNED=learned,
        WANT_OUT=out is not None,
        WANT_BITS=bits is not None,
        **tiling.arguments(),
    )


def _activation(gate: Tensor, up: Tensor | None, activation: str, dtype: torch.dtype) -> Any:
    known = gate.dtype in FLOATS and dtype in FLOATS and activation in ACTIVATIONS
    if not known or gate.numel() == 0:
        return NotImplemented
    # Memory is read as it lies: a dense tensor, in any order of dimensions, is one run of elements;
    # rows further apart than they are long (a half of a fused projection) are read row by row.
    out = torch.empty_like(gate, dtype=dtype)
    n = out.numel()
    sources = [_elementwise_source(t, out) for t in (gate, gate if up is None else up)]
    count, length = 1, n
    if any(stride is not None for _, stride in sources):
        length = out.shape[-1]
        count = n // length
    (x, x_stride), (y, y_stride) = ((t, length if s is None else s) for t, s in sources)
    if count >= tiles.MOST_SPANS:
        return NotImplemented
    tiling = tiles.tiles_of(Spans("span", count, length, length, 1, count))
    assert tiling is not None
    launch(
        elementwise.activation_kernel,
        (tiling.programs,),
        gate.device,
        x,
        y,
        out,
        count,
        length,
        x_stride,
        y_stride,
        ACTIVATION=activation,
        GATED=up is not None,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        num_warps=tiling.warps,
    )
    return out


def _elementwise_source(input: Tensor, out: Tensor) -> tuple[Tensor, int | None]:
    """Elements in the order of ``out``'s memory, and the distance of rows that lie apart."""
    if input.stride() == out.stride() or (input.is_contiguous() and out.is_contiguous()):
        return input, None
    if out.is_contiguous() and (stride := row_stride(input)) is not None:
        return input, stride
    return torch.empty_like(out, dtype=input.dtype).copy_(input.detach()), None


def _norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    centered: bool,
    cast: bool = False,
) -> Any:
    if input.numel() == 0 or input.dim() == 0 or input.dtype not in FLOATS:
        return NotImplemented
    k = input.shape[-1]
    count = input.numel() // k
    for channels in (weight, bias):
        if channels is not None and not (
            channels.dtype in FLOATS
            and tuple(channels.shape) == (k,)
            and channels.device == input.device
        ):
            return NotImplemented
    if residual is not None and not (
        residual.dtype == input.dtype
        and residual.shape == input.shape
        and residual.device == input.device
    ):
        return NotImplemented
    known = 0.0 <= eps <= torch.finfo(torch.float32).max and (bias is None or weight is not None)
    if not known or count >= tiles.MOST_SPANS or k >= tiles.MOST_SPANS:
        return NotImplemented
    x, x_stride = _rows(input)
    second, second_stride = (x, x_stride) if residual is None else _rows(residual)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    blocks = -(-count // norms.ROWS)
    row_bytes = k * input.element_size() * (1 if residual is None else 2)
    cached = norms.CACHED_BYTES // (norms.ROWS * row_bytes)
    launch(
        norms.norm_kernel,
        (min(blocks, max(cached, norms.LEAST_PROGRAMS)),),
        input.device,
        x,
        second,
        out if weight is None else weight.contiguous(),
        out if bias is None else bias.contiguous(),
        out,
        count,
        k,
        x_stride,
        second_stride,
        float(k),
        eps,
        CENTERED=centered,
        RESIDUAL=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        CAST=cast,
        ROWS=norms.ROWS,
        COLUMNS=min(norms.COLUMNS, next_power_of_2(k)),
        STEPS=min(_ROW_STEPS, next_power_of_2((k + 15) // 16)),
        num_warps=1,
    )
    return out


def _rows(input: Tensor) -> tuple[Tensor, int]:
    """Rows that are contiguous each, and their distance."""
    stride = row_stride(input)
    return (input.contiguous(), input.shape[-1]) if stride is None else (input, stride)


def row_stride(input: Tensor) -> int | None:
    """The distance of the rows (along the last dimension), where each is contiguous and all have
    the same distance; else None.
    """
    if input.dim() == 0 or (input.shape[-1] != 1 and input.stride(-1) != 1):
        return None
    stride = None
    expected = 0
    for size, step in zip(reversed(input.shape[:-1]), reversed(input.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = expected = step
        elif step != expected:
            return None
        expected *= size
    return input.shape[-1] if stride is None else stride


def _scaled(input: Tensor, scale: Tensor, axis: int | None, group_size: int | None) -> Spans | None:
    """Input's spans, if scale fits them."""
    found = spans_of(input, axis, group_size)
    if found is None or scale.dtype != torch.float32 or scale.device != input.device:
        return None
    spans, shape = found
    if axis is None and group_size is None:
        return spans if scale.numel() == 1 else None
    return spans if tuple(scale.shape) == shape else None


def _kind_of_zero(zero_point: Tensor | None, scale: Tensor) -> str | None:
    """ "none", "integer" or "real"; None where it does not fit the scale."""
    if zero_point is None:
        return "none"
    if zero_point.device != scale.device:
        return None
    if not (zero_point.numel() == 1 and zero_point.dim() <= 1) and zero_point.shape != scale.shape:
        return None
    return {torch.int32: "integer", torch.float32: "real"}.get(zero_point.dtype)


def _step_of_zero(zero_point: Tensor | None, scale: Tensor) -> int:
    """0 where one zero point serves all scales."""
    return 0 if zero_point is None or zero_point.numel() < scale.numel() else 1


def _like_scale(tensor: Tensor | None, scale: Tensor, dtype: torch.dtype) -> bool:
    return tensor is None or (
        tensor.dtype == dtype and tensor.shape == scale.shape and tensor.device == scale.device
    )


def _is_range(qmin: int, qmax: int) -> bool:
    return -_LIMIT <= qmin < qmax <= _LIMIT


def _division(tiling: Tiles) -> tuple[int, int]:
    """Parts that the elements of a scale are divided into, and programs."""
    spans, turns = tiling.spans, tiling.turns
    if spans.layout == "column":
        parts = -(-tiling.down // turns)
        return parts, parts * tiling.across
    parts = -(-tiling.across // turns)
    return parts * (spans.count // spans.channels), parts * tiling.down


def _second_step(parts: int, channels: int) -> tuple[int, int]:
    """Channels and parts in a block of the kernels that combine ``[parts, channels]``."""
    width = min(32, next_power_of_2(channels))
    return width, min(_STEP // width, next_power_of_2(parts))


OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "activation": activation,
    "gated_activation": gated_activation,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "fake_quantize": fake_quantize,
    "fake_quantize_mask": fake_quantize_mask,
    "in_range": in_range,
    "positive": positive,
    "mask_gradient": mask_gradient,
    "fake_quantize_learned": fake_quantize_learned,
    "fake_quantize_learned_backward": fake_quantize_learned_backward,
    "minmax": minmax,
    "mm_fake_quantized": mm_fake_quantized,
}
