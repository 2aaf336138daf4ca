"""A progress bar for work that takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import monotonic
from typing import TypeVar

from rich.console import Console

Item = TypeVar("Item")

_PATIENCE = 2.0  # seconds without a bar


def track(
    items: Iterable[Item], text: str, shown: bool | None = None, total: int | None = None
) -> Iterator[Item]:
    """Iterate over items, with a progress bar if that takes longer than two seconds.

    The bar is written to standard error and disappears at the end. Short work costs one reading of
    the clock per item. Items are taken one at a time.

    Args:
        items: what to work on.
        text: what the work is, for example "quantize_".
        shown: None shows the bar in a terminal and in a notebook, after two seconds. True shows it
            at once, wherever standard error goes. False never shows it.
        total: the number of items, if it is known; None asks a sequence for its length.

    Example:
        >>> list(track([1, 2, 3], "count"))
        [1, 2, 3]
    """
    if total is None and isinstance(items, Sequence):
        total = len(items)
    start, done = monotonic(), 0
    rest = iter(items)
    while not shown and (shown is False or monotonic() - start < _PATIENCE):
        try:
            item = next(rest)
        except StopIteration:
            return
        yield item
        done += 1
    console = Console(stderr=True, force_terminal=shown)
    if done == total or not (shown or console.is_terminal or console.is_jupyter):
        yield from rest
        return
    from rich.progress import Progress  # takes time to import, and short work does without it

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(text, total=total, completed=done)
        for item in rest:
            yield item
            bar.advance(task)


__all__ = ["track"]
