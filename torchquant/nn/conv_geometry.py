"""The sizes of a convolution: checked arguments, padding for the operators, inputs that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# The arguments of nn.Conv1d and nn.Conv2d; convolutions of all forms have attributes of these
# names. Those that depend on the number of dimensions are tuples, as torch's are.
SIZES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def set_sizes(
    layer: Any,
    who: str,
    dimensions: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
) -> None:
    """Check the arguments of a convolution and set them as attributes of a layer.

    Args:
        layer: the layer.
        who: the name of the layer's class, with which messages start.
        dimensions: 1 or 2.
        in_channels, out_channels, groups, padding_mode: as for nn.Conv2d.
        kernel_size, stride, dilation: an int, or one for each dimension.
        padding: an int, one for each dimension, "same" or "valid".

    Raises:
        ValueError: an argument is not valid, or two exclude each other.
    """
    layer.in_channels = _size(who, "in_channels", in_channels)
    layer.out_channels = _size(who, "out_channels", out_channels)
    layer.groups = _size(who, "groups", groups)
    for name in ("in_channels", "out_channels"):
        if getattr(layer, name) % layer.groups:
            raise ValueError(
                f"{who}: {name} must be a multiple of groups = {groups}, got {getattr(layer, name)}"
            )
    layer.kernel_size = _sizes(who, "kernel_size", kernel_size, dimensions)
    layer.stride = _sizes(who, "stride", stride, dimensions)
    layer.dilation = _sizes(who, "dilation", dilation, dimensions)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{who}: padding must be integers, 'same' or 'valid', got {padding!r}")
        if padding == "same" and set(layer.stride) != {1}:
            raise ValueError(
                f"{who}: padding='same' must come with stride 1, got stride {layer.stride}"
            )
        layer.padding = padding
    else:
        layer.padding = _sizes(who, "padding", padding, dimensions, least=0)
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{who}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )
    layer.padding_mode = padding_mode


def weight_shape(layer: Any) -> tuple[int, ...]:
    """``(out_channels, in_channels / groups, *kernel_size)``."""
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def before_and_after(layer: Any) -> list[int]:
    """The padding before and after each dimension: top, bottom, left, right in two dimensions.

    Example:
        >>> before_and_after(nn.Conv2d(1, 1, (2, 4), padding="same"))
        [0, 1, 1, 2]
    """
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    both: list[int] = []
    if layer.padding == "same":  # as torch: the larger half comes after
        for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True):
            total = dilation * (size - 1)
            both += [total // 2, total - total // 2]
        return both
    for padding in layer.padding:
        both += [padding, padding]
    return both


def padded(layer: Any, input: Tensor) -> tuple[Tensor, list[int]]:
    """The input with the padding that is no zero, and the padding that the operator is to add.

    Padding that repeats values of the input does not change the range of a sample, and commutes
    with quantization.

    Args:
        layer: a convolution.
        input: ``[N, C, H, W]`` or ``[N, C, L]``.
    """
    both = before_and_after(layer)
    if layer.padding_mode == "zeros" or not any(both):
        return input, both
    last_first = [
        both[2 * place + side] for place in reversed(range(len(both) // 2)) for side in (0, 1)
    ]
    result = nn.functional.pad(input, last_first, mode=layer.padding_mode)
    if is_channels_last(input):
        result = result.contiguous(memory_format=torch.channels_last)
    return result, [0] * len(both)


def check_input(layer: Any, input: Any, device: torch.device, remedy: str) -> None:
    """Raise unless a convolution can compute with an input.

    Args:
        layer: the convolution.
        input: its input, which may be no tensor.
        device: the device of the layer.
        remedy: what to do about an input on another device.

    Raises:
        TypeError: input is not a tensor.
        ValueError: the number of dimensions, the channels or the device are wrong, or input is
            smaller than the kernel.
    """
    who = type(layer).__name__
    if not isinstance(input, Tensor):
        raise TypeError(f"{who}: input must be a tensor, got {type(input).__name__}")
    dimensions = len(layer.kernel_size)
    if input.dim() not in (dimensions + 1, dimensions + 2):
        sample = "C, H, W" if dimensions == 2 else "C, L"
        raise ValueError(
            f"{who}: input must be [N, {sample}] or [{sample}], got {list(input.shape)}"
        )
    shape = input.shape[-dimensions - 1 :]
    if shape[0] != layer.in_channels:
        raise ValueError(
            f"{who}: input must have in_channels = {layer.in_channels} channels, got "
            f"{list(input.shape)}"
        )
    both = before_and_after(layer)
    for place in range(dimensions):
        size = shape[1 + place] + both[2 * place] + both[2 * place + 1]
        needed = layer.dilation[place] * (layer.kernel_size[place] - 1) + 1
        if size < needed or shape[1 + place] == 0:
            raise ValueError(
                f"{who}: input must be at least as large as the kernel, got {list(input.shape)} "
                f"with padding {layer.padding} for a kernel of {layer.kernel_size} with dilation "
                f"{layer.dilation}"
            )
    if input.device != device:
        raise ValueError(
            f"{who}: input must be on the layer's device {device}, got one on {input.device}; "
            f"{remedy}"
        )


def is_channels_last(input: Tensor) -> bool:
    """True if the channels of an image are adjacent in memory, and not its rows.

    Example:
        >>> is_channels_last(torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last))
        True
    """
    if input.dim() != 4 or input.is_contiguous():
        return False
    return input.is_contiguous(memory_format=torch.channels_last)


def random_input(layer: Any, rows: int, generator: torch.Generator) -> Tensor:
    """``rows`` random float32 samples on the CPU, about as small as the layer permits."""
    both = before_and_after(layer)
    sizes = [
        # Padding that repeats values needs a sample that is larger than the padding.
        max(dilation * (size - 1) + 1, both[2 * place] + 1, both[2 * place + 1] + 1) + stride
        for place, (size, dilation, stride) in enumerate(
            zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        )
    ]
    shape = (rows, layer.in_channels, *sizes)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def sizes_text(layer: Any) -> str:
    """The sizes of a convolution as torch prints them.

    Example:
        >>> sizes_text(nn.Conv2d(3, 8, 3, padding=1))
        '3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)'
    """
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}"
    text += f", stride={layer.stride}"
    ones = (1,) * len(layer.kernel_size)
    for name, default in (
        ("padding", (0,) * len(ones)),
        ("dilation", ones),
        ("groups", 1),
        ("padding_mode", "zeros"),
    ):
        value = getattr(layer, name)
        if value != default:
            text += f", {name}={value!r}" if name == "padding_mode" else f", {name}={value}"
    return text


def plain_value(value: Any) -> Any:
    """A size as JSON stores it: a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def _size(who: str, name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")
    return value


def _sizes(who: str, name: str, value: Any, count: int, least: int = 1) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count:
        number = "an integer" if count == 1 else f"an integer or {count} of them"
        raise ValueError(f"{who}: {name} must be {number}, got {value!r}")
    return tuple(_size(who, name, one, least) for one in values)


__all__ = ["before_and_after", "is_channels_last", "sizes_text"]
