"""Progress of a computation, for whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

# Called with what begins and the fraction of all work that is done, from 0 to 1.
Listener: TypeAlias = Callable[[str, float], None]


@dataclass
class Steps:
    """Counts steps of about equal length and tells a listener as each begins.

    Example:
        >>> from torchquant.demo.steps import Steps
        >>> steps = Steps(2, lambda description, done: print(f"{done:.0%} {description}"))
        >>> steps.begin("first")
        0% first
        >>> steps.begin("second")
        50% second
    """

    total: int
    listener: Listener | None = None
    done: int = 0

    def begin(self, description: str) -> None:
        """Announce a step; those before it are done."""
        if self.listener is not None:
            self.listener(description, self.done / self.total)
        self.done += 1
