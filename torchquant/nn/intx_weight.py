"""Float weights to integers of 2 to 8 bits, with a scale for each output channel or group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant import functional, ops
from torchquant.configs import QuantizationConfig, Weights
from torchquant.nn.weight import IntxFormat
from torchquant.scheme import PerAxis, PerGroup

_CHUNK = 1 << 20  # weights that are rounded at once, so that no second float weight is needed


def group_size_of(weights: Any) -> int | None:
    """The group size of weights in groups; None for one scale per output channel.

    Example:
        >>> group_size_of(Weights(granularity=PerGroup(32))), group_size_of(Weights())
        (32, None)
    """
    granularity = weights.granularity
    return granularity.group_size if isinstance(granularity, PerGroup) else None


def format_of(weights: Weights) -> IntxFormat:
    """The format in which weights are packed.

    Example:
        >>> format_of(Weights(bits=4))
        IntxFormat(bits=4, group_size=None, has_zero_point=False)
    """
    return IntxFormat(weights.bits, group_size_of(weights), not weights.symmetric)


def most_inputs(bits: int) -> int:
    """The inputs that may share a scale (csrc/formats/intx_tiles.h: sums fit in int32).

    Example:
        >>> most_inputs(4), most_inputs(8)
        (65793, 33025)
    """
    return 33025 if bits == 8 else 65793


def weights_refusal(config: QuantizationConfig, what: str) -> str | None:
    """The reason why the weights of ``config`` cannot be packed in :class:`IntxFormat`, or None.

    Example:
        >>> weights_refusal(QuantizationConfig(Weights(granularity=PerAxis(1))), "linear")
        'linear weights need PerAxis(0) or PerGroup(group_size), not PerAxis(axis=1)'
    """
    granularity = config.weights.granularity
    if granularity == PerAxis(0) or isinstance(granularity, PerGroup):
        return None
    return f"{what} weights need PerAxis(0) or PerGroup(group_size), not {granularity}"


def shape_refusal(
    config: QuantizationConfig, shape: Sequence[int], inputs_name: str = "in_features"
) -> str | None:
    """The reason why a weight of ``shape`` cannot be packed as ``config`` says, or None.

    ``inputs_name`` is what messages call the second size.

    Example:
        >>> shape_refusal(QuantizationConfig(Weights(4, granularity=PerGroup(128))), (32, 64))
        'group_size must be at most in_features = 64, got 128'
    """
    inputs, size = shape[1], group_size_of(config.weights)
    if size is not None and size > inputs:
        return f"group_size must be at most {inputs_name} = {inputs}, got {size}"
    most, together = most_inputs(config.weights.bits), inputs if size is None else size
    if together > most:
        return (
            f"at most {most} inputs can share a scale of {config.weights.bits} bits, got "
            f"{together}; choose a smaller group_size"
        )
    return None


@torch.no_grad()
def integers_of(
    weight: Tensor,
    weights: Weights,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a float weight to integers.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        weights: bits, groups, and whether there are zero points.
        scale: float32 ``[N]``, or ``[N, groups]``; None derives scales and zero points from the
            range of each group.
        zero_point: int8 of scale's shape, which goes with ``scale``; None for symmetric weights.

    Returns:
        ``(integers, scale, zero_point)``: int8 ``[N, K]``, float32, int8 or None.

    Example:
        >>> w = torch.tensor([[7.0, -3.4, 1.0, 0.6]])
        >>> integers_of(w, Weights(4, granularity=PerGroup(2)))[:2]
        (tensor([[ 7, -3,  7,  4]], dtype=torch.int8), tensor([[1.0000, 0.1429]]))
    """
    weight = weight.detach()
    (qmin, qmax), outputs = weights.range, weight.shape[0]
    granularity = weights.granularity
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = zeros = None
    if scale is None:
        size = granularity.scale_shape(weight.shape)
        scales = torch.empty(size, dtype=torch.float32, device=weight.device)
        if not weights.symmetric:
            zeros = torch.empty(size, dtype=torch.int8, device=weight.device)
    else:
        scales, zeros = scale, zero_point
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for first in range(0, outputs, step):
        rows = slice(first, min(outputs, first + step))
        if scale is None:
            least, greatest = _ranges(weight[rows], group_size_of(weights))
            found, zero = functional.qparams_from_range(
                least, greatest, qmin=qmin, qmax=qmax, symmetric=weights.symmetric
            )
            scales[rows] = found
            if zeros is not None:
                zeros[rows] = zero.to(torch.int8)
        integers[rows] = ops.quantize(
            weight[rows],
            scales[rows],
            None if zeros is None else zeros[rows].to(torch.int32),
            qmin=qmin,
            qmax=qmax,
            granularity=granularity,
        )
    return integers, scales, zeros


def values_of(
    integers: Tensor, scale: Tensor, zero_point: Tensor | None, weights: Weights
) -> Tensor:
    """The float32 weight that integers represent.

    Example:
        >>> integers = torch.tensor([[7, -3]], dtype=torch.int8)
        >>> values_of(integers, torch.tensor([0.5]), None, Weights())
        tensor([[ 3.5000, -1.5000]])
    """
    zero = None if zero_point is None else zero_point.to(torch.int32)
    return ops.dequantize(integers, scale, zero, granularity=weights.granularity)


def _ranges(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each channel or group, float32."""
    if group_size is None:
        least, greatest = torch.aminmax(weight, dim=1)
        return least.float(), greatest.float()
    whole = weight.shape[1] // group_size * group_size
    parts = [weight[:, :whole].unflatten(1, (-1, group_size))]
    if whole < weight.shape[1]:
        parts.append(weight[:, whole:].unsqueeze(1))
    ends = [torch.aminmax(part, dim=2) for part in parts]
    least = torch.cat([end.min for end in ends], 1)
    return least.float(), torch.cat([end.max for end in ends], 1).float()


__all__ = [
    "format_of",
    "group_size_of",
    "integers_of",
    "most_inputs",
    "shape_refusal",
    "values_of",
    "weights_refusal",
]
