"""Integer ranges and granularities.

A *granularity* determines which elements of a tensor share one scale. It is one of several small
frozen dataclasses instead of a string with additional parameters, so that invalid combinations,
such as a group size without groups, cannot be written. Each class documents the shape of the scales
for a shape of the input and computes it in ``scale_shape``. ``axis_and_group_size`` returns the two
arguments that operators take for a granularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

MIN_BITS = 2
MAX_BITS = 8

AxisAndGroupSize: TypeAlias = tuple[int | None, int | None]


def quant_range(bits: int, *, signed: bool = True, narrow_range: bool = False) -> tuple[int, int]:
    """Least and greatest integer of a type with ``bits`` bits.

    Args:
        bits: 2 to 8.
        signed: whether the range is ``[-2^(bits-1), 2^(bits-1) - 1]`` or ``[0, 2^bits - 1]``.
        narrow_range: exclude the least signed integer, so that the range is symmetric around 0.

    Returns:
        ``(qmin, qmax)``.

    Raises:
        ValueError: bits is not an integer from 2 to 8, or narrow_range is True although signed is
            False.

    Example:
        >>> quant_range(8), quant_range(8, narrow_range=True), quant_range(4, signed=False)
        ((-128, 127), (-127, 127), (0, 15))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"quant_range: bits must be an integer from 2 to 8, got {bits!r}")
    if not signed:
        if narrow_range:
            raise ValueError(
                "quant_range: narrow_range must be False for an unsigned range, got True; "
                "it excludes the least signed integer, so pass signed=True with it"
            )
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + int(narrow_range), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    Input ``[...]`` -> scale ``[1]``.

    Example:
        >>> PerTensor().scale_shape((8, 16))
        (1,)
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales for an input of ``shape``."""
        return (1,)

    def axis_and_group_size(self, shape: Sequence[int]) -> AxisAndGroupSize:
        """The operators' arguments for an input of ``shape``: neither an axis nor a group size."""
        return None, None


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index along ``axis`` (per channel); a negative axis counts from the end.

    Input ``[..., C, ...]`` with C at ``axis`` -> scale ``[C]``. For a key/value cache
    ``[batch, heads, tokens, head_dim]``, ``PerAxis(1)`` is one scale per head.

    Example:
        >>> PerAxis(0).scale_shape((8, 16)), PerAxis(-1).scale_shape((8, 16))
        ((8,), (16,))
    """

    axis: int

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise ValueError(f"PerAxis: axis must be an integer, got {self.axis!r}")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales for an input of ``shape``; ValueError if it lacks the axis."""
        return (shape[self.normalized_axis(shape)],)

    def axis_and_group_size(self, shape: Sequence[int]) -> AxisAndGroupSize:
        """The operators' arguments for an input of ``shape``: an axis from 0, no group size."""
        return self.normalized_axis(shape), None

    def normalized_axis(self, shape: Sequence[int]) -> int:
        """``axis`` as a non-negative number; ValueError if ``shape`` lacks the axis."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"PerAxis: axis must be from {-len(shape)} to {len(shape) - 1} for an input of "
                f"shape {list(shape)}, got {self.axis}"
            )
        return self.axis % len(shape)


@dataclass(frozen=True)
class PerGroup:
    """One scale for each group of ``group_size`` adjacent elements along the last axis.

    Input ``[..., K]`` -> scale ``[..., ceil(K / group_size)]``. If K is not a
    multiple of ``group_size``, the last group is shorter; it is not padded.

    Example:
        >>> PerGroup(32).scale_shape((8, 80))
        (8, 3)
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"PerGroup: group_size must be a positive integer, got {size!r}")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales for an input of ``shape``; ValueError if it is 0-dimensional."""
        _require_last_axis("PerGroup", shape)
        return (*shape[:-1], -(-shape[-1] // self.group_size))

    def axis_and_group_size(self, shape: Sequence[int]) -> AxisAndGroupSize:
        """The operators' arguments for an input of ``shape``: no axis, the group size."""
        return None, self.group_size


@dataclass(frozen=True)
class PerToken:
    """One scale for each row; a row is a slice along the last axis.

    Input ``[..., K]`` -> scale ``[..., 1]``.

    Example:
        >>> PerToken().scale_shape((2, 5, 16))
        (2, 5, 1)
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales for an input of ``shape``; ValueError if it is 0-dimensional."""
        _require_last_axis("PerToken", shape)
        return (*shape[:-1], 1)

    def axis_and_group_size(self, shape: Sequence[int]) -> AxisAndGroupSize:
        """The operators' arguments for an input of ``shape``: no axis, one group per row."""
        _require_last_axis("PerToken", shape)
        return None, max(1, shape[-1])


Granularity: TypeAlias = PerTensor | PerAxis | PerGroup | PerToken

PER_TENSOR: Final = PerTensor()  # default arguments
PER_CHANNEL: Final = PerAxis(0)


def _require_last_axis(who: str, shape: Sequence[int]) -> None:
    if len(shape) == 0:
        raise ValueError(f"{who}: input must have at least 1 dimension, got a 0-dimensional tensor")
