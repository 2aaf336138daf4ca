"""The progress of a computation, for a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

# Called with a description of the next step, and the completed fraction of all work, 0 to 1.
Listener: TypeAlias = Callable[[str, float], None]


@dataclass
class Steps:
    """Counts steps of about equal length and calls a listener when a step begins.

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
        """Announce a step; all steps before it are complete."""
        if self.listener is not None:
            self.listener(description, self.done / self.total)
        self.done += 1
