"""What a benchmark measures: a layer or a network, with one input."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class Case(Protocol):
    """One line of a table. Its text names it, and is what patterns match.

    A worker prepares the layer or network of `load_request`, then the input of `input_request`.
    """

    @property
    def operations(self) -> int:
        """Multiplications and additions, counted separately."""

    @property
    def limit_bytes(self) -> int:
        """The bytes that bound the time from below: every call has to read them."""

    @property
    def cycle_bytes(self) -> int:
        """The bytes that are read before the same ones are read again: a cache holds them or not.

        The same as `limit_bytes`, unless calls take copies of the layer in turn.
        """

    def load_request(self) -> dict[str, Any]:
        """The arguments of the worker's `load`; the same for cases that share a layer."""

    def input_request(self) -> dict[str, Any]:
        """The arguments of the worker's `input`."""

    def fields(self) -> dict[str, Any]:
        """The case in a results file."""


C = TypeVar("C", bound=Case)
