"""Instruction sets: which there are, which one runs, and how to choose another.

All instruction sets give the same bits; choosing one is for tests, for measuring, and for machines
where the widest one slows its neighbours. The choice holds for the whole process, all threads.

The environment variable ``TORCHQUANT_ISA`` sets it before the first call.

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
    """Instruction sets that this build holds kernels for, best first.

    Example:
        >>> built_isas()[-1]
        'scalar'
    """
    return tuple(_C.built_isas())


def available_isas() -> tuple[str, ...]:
    """Instruction sets that are built and that this CPU and system support, best first.

    Example:
        >>> set(available_isas()) <= set(built_isas())
        True
    """
    return tuple(_C.usable_isas())


def active_isa() -> str:
    """The instruction set that runs now.

    Example:
        >>> active_isa() in available_isas()
        True
    """
    return str(_C.active_isa())


def cpu_name() -> str:
    """The processor's name, as it reports it.

    Example:
        >>> len(cpu_name()) > 0
        True
    """
    return str(_C.cpu_name())


def use_isa(name: str) -> AbstractContextManager[None]:
    """Run with another instruction set, in the whole process, until the block ends.

    Args:
        name: one of :func:`available_isas`.

    Raises:
        ValueError: the name is unknown, or this CPU does not support it; lists the valid ones.

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
