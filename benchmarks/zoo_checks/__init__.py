"""The checks of the zoo: a column of the table each, and what they make of one architecture."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType

from architectures import Architecture

from . import files, inference, training
from .case import Case, FloatFails, Outcome
from .known import KNOWN

__all__ = ["COLUMNS", "KNOWN", "LIMIT", "Outcome", "Row", "examine", "missing_package"]

COLUMNS: dict[str, Callable[[Case], Outcome]] = {
    "runs": inference.runs,
    "int8": inference.share,
    "cosine": inference.cosine_fp32,
    "bf16": inference.cosine_bf16,
    "load": files.load,
    "load meta": files.load_meta,
    "copies": files.copies,
    "ties": inference.ties,
    "pretrained": inference.pretrained,
    "generate": inference.generation,
    "QAT int8": training.qat_int8,
    "QAT LSQ": training.qat_lsq,
    "QAT static": training.qat_static,
    "fusion": inference.fusion,
    "norms": inference.norms,
    "attention": inference.attention,
}


LIMIT = 300.0  # seconds per architecture
AS_FIRST = "the same error"  # as in the first column


@dataclass(frozen=True)
class Row:
    """What the checks found in one architecture.

    Attributes:
        architecture: the architecture.
        outcomes: the outcome of each column.
        seconds: how long each column took.
        limit: the seconds after which the remaining columns were given up.
    """

    architecture: Architecture
    outcomes: dict[str, Outcome]
    seconds: dict[str, float]
    limit: float

    @property
    def failures(self) -> dict[str, str]:
        """Columns that failed without being in the list of known exceptions, with the text."""
        return {
            column: outcome.text
            for column, outcome in self.outcomes.items()
            if outcome.ok is False and (self.architecture.name, column) not in KNOWN
        }

    @property
    def needless(self) -> list[str]:
        """Columns that did not fail although they are in the list of known exceptions."""
        return [
            column
            for column, outcome in self.outcomes.items()
            if outcome.ok and (self.architecture.name, column) in KNOWN
        ]


def missing_package(architecture: Architecture) -> str | None:
    """The package that an architecture needs, if it is not installed."""
    package = architecture.package
    return package if package and find_spec(package) is None else None


class TimeLimit(BaseException):
    """The time of one architecture is over; no handler of a check catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeLimit` in this thread after some seconds, where the system can."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def examine(
    architecture: Architecture, columns: tuple[str, ...] | None = None, limit: float = LIMIT
) -> Row:
    """Run the checks on one architecture; a failure is an outcome and is not raised."""
    outcomes: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    case = Case(architecture)
    chosen = columns or tuple(COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited(limit):
                for column in chosen:
                    start = time.monotonic()
                    found = _outcome(COLUMNS[column], case)
                    first = next(iter(outcomes.values()), None)
                    if found.ok is False and first is not None and found.text == first.text:
                        found = Outcome(AS_FIRST, False)
                    outcomes[column] = found
                    seconds[column] = time.monotonic() - start
        except TimeLimit:
            text = f"not done after {limit:g} s"
            outcomes |= {c: Outcome(text, False) for c in chosen if c not in outcomes}
    return Row(architecture, outcomes, seconds, limit)


def _outcome(check: Callable[[Case], Outcome], case: Case) -> Outcome:
    try:
        return check(case)
    except FloatFails:
        return Outcome("float fails", None)
    except Exception as error:
        text = " ".join(str(error).split())
        return Outcome(f"{type(error).__name__}: {text[:160]}", False)
