"""Instruction sets: list them, see which one is active, and choose another.

All instruction sets give the same bits. Choosing one is for tests, for measurements, and for
machines where the widest one slows down other programs. The choice applies to the whole process
with all its threads. The environment variable ``TORCHQUANT_ISA`` makes it before the first call.

Example:
    >>> "scalar" in available_isas()
    True
    >>> with use_isa("scalar"):
    ...     active_isa()
    'scalar'
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torchquant._extension import load

_C = load()

ENVIRONMENT_VARIABLE = "TORCHQUANT_ISA"

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "active_isa",
    "available_isas",
    "built_isas",
    "cpu_name",
    "use_isa",
]


def built_isas() -> tuple[str, ...]:
    """Return the instruction sets that this build has kernels for, best first.

    Example:
        >>> built_isas()[-1]
        'scalar'
    """
    return tuple(_C.built_isas())


def available_isas() -> tuple[str, ...]:
    """Return the built instruction sets that this CPU and operating system support, best first.

    Example:
        >>> set(available_isas()) <= set(built_isas())
        True
    """
    return tuple(_C.usable_isas())


def active_isa() -> str:
    """Return the active instruction set.

    Example:
        >>> active_isa() in available_isas()
        True
    """
    return str(_C.active_isa())


def cpu_name() -> str:
    """Return the processor's name as reported by the CPU.

    Example:
        >>> len(cpu_name()) > 0
        True
    """
    return str(_C.cpu_name())


def use_isa(name: str) -> AbstractContextManager[None]:
    """Run the whole process with another instruction set until the block ends.

    Args:
        name: one of :func:`available_isas`.

    Raises:
        ValueError: the name is unknown or this CPU does not support it; the message lists the valid
            names.

    Example:
        >>> with use_isa(available_isas()[-1]):
        ...     active_isa()
        'scalar'
    """
    check_isa("use_isa: name", name)
    return _switched_to(name)


@contextmanager
def _switched_to(name: str) -> Iterator[None]:
    before = active_isa()
    _C.set_active_isa(name)
    try:
        yield
    finally:
        _C.set_active_isa(before)


def check_isa(who: str, name: str) -> None:
    """Raise ValueError unless ``name`` is an instruction set that can run here."""
    if name in available_isas():
        return
    reason = "this CPU does not support" if name in built_isas() else "unknown"
    raise ValueError(
        f"{who} must be one of {', '.join(available_isas())}, got {name!r} ({reason}"
        f"{'' if reason == 'unknown' else ' it'})"
    )


def _apply_environment() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        check_isa(f"the environment variable {ENVIRONMENT_VARIABLE}", name)
        _C.set_active_isa(name)


_apply_environment()
