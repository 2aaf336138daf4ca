"""Numbers as words: bytes, percentages, and how the size of a model changed."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Format a number of bytes with units that are powers of 1024.

    Example:
        >>> human_bytes(700), human_bytes(2_400_000)
        ('700 B', '2.29 MiB')
    """
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.2f} {unit}"


def percent(part: int, whole: int) -> str:
    """A part as a rounded percentage; 0 % and 100 % are exact.

    Example:
        >>> percent(1, 3), percent(1, 1000), percent(999, 1000), percent(4, 4)
        ('33 %', '<1 %', '>99 %', '100 %')
    """
    value = 100 * part / whole if whole else 0.0
    if 0 < value < 1:
        return "<1 %"
    if 99 < value < 100:
        return ">99 %"
    return f"{value:.0f} %"


def size_change(before: int, after: int) -> str:
    """How a size changed, in words that fit the numbers.

    Example:
        >>> size_change(400, 100), size_change(100, 116), size_change(0, 0)
        ('4.00x smaller', '1.16x larger', 'same size')
    """
    if not before or not after:
        return "same size" if before == after else "all of it" if before else "new"
    ratio = f"{max(before, after) / min(before, after):.2f}x"
    if ratio == "1.00x":
        return "same size"
    return f"{ratio} {'smaller' if after < before else 'larger'}"
