"""Specimen: copies of a norm with random parameters, which a probe can run without a trace."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ANY_SIZE = 48  # for norms without a parameter or attribute that gives a size
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"}
_MARKS = frozenset({"_is_hf_initialized"})  # attributes that no forward reads
_DEPTH = 4  # of attributes that are compared before and after a run


class RefusedError(Exception):
    """A norm cannot be replaced; the text is the reason."""


@dataclass(frozen=True)
class Call:
    """How a norm's forward is called.

    Attributes:
        argument: the name of the input; None if the forward does not name it.
        optional: the names of all other arguments.
        closed: a call with another keyword fails.
    """

    argument: str | None
    optional: tuple[str, ...]
    closed: bool


def call_of(cls: type[nn.Module]) -> Call:
    """The arguments of the forward of a class of norms.

    Raises:
        RefusedError: an input alone is not enough.

    Example:
        >>> call_of(nn.LayerNorm)
        Call(argument='input', optional=(), closed=True)
    """
    parameters = list(inspect.signature(cls.forward).parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        parameters = parameters[1:]  # self
    if not parameters:
        raise RefusedError("its forward takes no input")
    first, others = parameters[0], parameters[1:]
    if first.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise RefusedError("its forward takes no positional input")
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in others if p.default is p.empty and p.kind not in variable]
    if needed:
        raise RefusedError(f"its forward needs {' and '.join(needed)} besides the input")
    return Call(
        first.name if first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None,
        tuple(p.name for p in others if p.kind not in variable),
        all(p.kind not in variable for p in parameters),
    )


class Specimen:
    """A norm as a pattern for copies of a class.

    Raises:
        RefusedError: the norm has state that a copy cannot have, or a parameter that is not
            ``[K]``.

    Attributes:
        names: the names of its parameters.
        own_dtypes: their dtypes.
        device: where the parameters are.
        size: K, the length of the last dimension.
        any_size: K is arbitrary.
    """

    def __init__(self, norm: nn.Module, cls: type[nn.Module]) -> None:
        self._norm = norm
        self._class = cls
        present = {name: p for name, p in norm._parameters.items() if p is not None}
        self.names = tuple(present)
        self.own_dtypes = {name: p.dtype for name, p in present.items()}
        self.device = next((p.device for p in present.values()), torch.device("cpu"))
        sizes = {tuple(p.shape) for p in present.values()}
        if any(buffer is not None for buffer in norm._buffers.values()):
            raise RefusedError("it has buffers, which its forward may read or change")
        if len(sizes) > 1 or any(len(size) != 1 for size in sizes):
            shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in present.items())
            raise RefusedError(
                f"its parameters must have one dimension of one length, not {shapes}"
            )
        if any(not p.is_floating_point() for p in present.values()):
            raise RefusedError("its parameters must be of a float type")
        known = next(iter(sizes), None) or _size_by_attributes(norm)
        self.any_size = known is None
        self.size = _ANY_SIZE if known is None else known[0]
        if self.size == 0:
            raise RefusedError("its last dimension has length 0")
        self._attributes = {
            name: value
            for name, value in norm.__dict__.items()
            if name not in _MODULE_STATE and name not in _MARKS | {"training"}
        }
        for name, value in self._attributes.items():
            if isinstance(value, nn.Module):
                raise RefusedError(f"it refers to another module ({name})")
        self._copies: list[tuple[nn.Module, Any]] = []
        self._class_values = {n: v for n, v in vars(cls).items() if _is_plain(v)}

    def copy(
        self,
        dtypes: dict[str, torch.dtype] | torch.dtype,
        *,
        training: bool = False,
        device: torch.device | None = None,
    ) -> nn.Module:
        """A module of the norm's class and attributes with random parameters, without hooks."""
        result: nn.Module = object.__new__(self._class)
        nn.Module.__init__(result)
        result.__dict__.update(copy.deepcopy(self._attributes))
        generator = torch.Generator("cpu").manual_seed(7)
        for name, parameter in self._norm._parameters.items():
            values = None
            if parameter is not None:
                dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
                random_values = torch.randn(self.size, generator=generator, device="cpu")
                values = nn.Parameter((0.7 + 0.4 * random_values).to(device or self.device, dtype))
            result._parameters[name] = values
        result.training = training
        self._copies.append((result, _fingerprint(_state(result))))
        return result

    def changed(self) -> str:
        """The name of an attribute that a run of a copy has changed; empty without one.

        Numbers and texts in the class, which the norm shares, get their value back.
        """
        now = {name: value for name, value in vars(self._class).items() if _is_plain(value)}
        for name in [n for n, value in self._class_values.items() if now.get(n) != value]:
            setattr(self._class, name, self._class_values[name])
            return name
        for module, before in self._copies:
            after = _state(module)
            if _fingerprint(after) != before:
                old = dict(before[1])
                names = [n for n in after if old.get(n) != _fingerprint(after[n])]
                return names[0] if names else "an attribute"
        return ""

    def key(self) -> Any:
        """Equal for norms that compute the same; hashable."""
        dtypes = tuple(self.own_dtypes.items())
        absent = tuple(self._norm._parameters)
        attributes = _fingerprint(self._attributes)
        return self._class, dtypes, absent, str(self.device), self.size, attributes


def _state(module: nn.Module) -> dict[str, Any]:
    """All attributes but the hooks."""
    hooks = _MODULE_STATE - {"_parameters", "_buffers", "_modules"}
    return {name: value for name, value in module.__dict__.items() if name not in hooks}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _size_by_attributes(norm: nn.Module) -> tuple[int, ...] | None:
    shape = norm.__dict__.get("normalized_shape")
    if isinstance(shape, int):
        return (shape,)
    if isinstance(shape, (tuple, list)) and len(shape) == 1 and isinstance(shape[0], int):
        return (shape[0],)
    return None


def _fingerprint(value: Any, depth: int = _DEPTH) -> Any:
    """A hashable value that changes if ``value`` is changed in place."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return kind, id(value), value._version
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        return kind, value
    if depth == 0:
        return kind, id(value)
    if isinstance(value, dict):
        items = [(name, _fingerprint(item, depth - 1)) for name, item in value.items()]
        return kind, tuple(items)
    if isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "maxlen"):
        return kind, tuple(_fingerprint(item, depth - 1) for item in value)
    if hasattr(value, "__dict__") and not callable(value):
        return kind, id(type(value)), _fingerprint(vars(value), depth - 1)
    return kind, id(value)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Run the block, then give Python's, NumPy's and torch's generators their state back."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" and torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def watch_random_numbers() -> Callable[[], bool]:
    """A function that tells whether numbers were drawn since this call."""
    before = torch.get_rng_state()
    python_state = random.getstate()

    def drawn() -> bool:
        return python_state != random.getstate() or not torch.equal(before, torch.get_rng_state())

    return drawn
