"""The public functions of :mod:`torchquant.cuda`, which describes the paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from torchquant._extension import load
from torchquant.cuda.dispatch import PATHS, Dispatcher
from torchquant.cuda.host import CudaHost

load()

ENVIRONMENT_VARIABLE = "TORCHQUANT_CUDA_PATH"
AUTOTUNE_VARIABLE = "TORCHQUANT_AUTOTUNE"

__all__ = [
    "AUTOTUNE_VARIABLE",
    "ENVIRONMENT_VARIABLE",
    "GPU",
    "active_path",
    "available_paths",
    "chosen_path",
    "gpus",
    "no_gpu_reason",
    "use_path",
]

_dispatcher = Dispatcher(CudaHost())


@dataclass(frozen=True)
class GPU:
    """A GPU and its path.

    ``memory`` is in bytes. ``reason``: why the path is not Triton's. ``left_to_aten``: the
    operators that failed with Triton, with the reasons.
    """

    index: int
    name: str
    capability: str
    memory: int
    path: str
    reason: str | None
    left_to_aten: dict[str, str]


def chosen_path() -> str:
    """The chosen path: ``"auto"``, ``"triton"`` or ``"aten"``.

    Example:
        >>> chosen_path() in ("auto", "triton", "aten")
        True
    """
    return _dispatcher.path


def gpus(*, probe: bool = False) -> tuple[GPU, ...]:
    """The GPUs that torch can use, in CUDA's order; initializes CUDA if there is one.

    Args:
        probe: first compile and check one kernel, to detect a GPU or a compiler that fails.

    Example:
        >>> [gpu.name for gpu in gpus() if gpu.path not in ("triton", "aten")]
        []
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = range(torch.cuda.device_count())
    if probe and _dispatcher.path != "aten":
        for index in found:
            _dispatcher.probe(index)
    return tuple(_describe(index) for index in found)


def _describe(index: int) -> GPU:
    device = _dispatcher.host.device(index)
    reason = _dispatcher.reason(index)
    if reason is None and _dispatcher.path == "aten":
        reason = "chosen"
    return GPU(
        index=index,
        name=device.name,
        capability="{}.{}".format(*device.capability),
        memory=device.memory,
        path="triton" if reason is None else "aten",
        reason=reason,
        left_to_aten=_dispatcher.failures(index),
    )


def available_paths() -> tuple[str, ...]:
    """The paths that at least one GPU supports, best first; empty without a GPU.

    Example:
        >>> available_paths() in (("triton", "aten"), ("aten",), ())
        True
    """
    found = gpus()
    if not found:
        return ()
    served = any(_dispatcher.reason(gpu.index) is None for gpu in found)
    return ("triton", "aten") if served else ("aten",)


def active_path(device: torch.device | str | int | None = None) -> str | None:
    """The active path, "triton" or "aten", of ``device`` (default: the current GPU).

    None without a GPU.

    Raises:
        ValueError: ``device`` is not one of the GPUs here.

    Example:
        >>> active_path() in ("triton", "aten", None)
        True
    """
    found = gpus()
    if not found:
        return None
    index = _device_index(device)
    if not 0 <= index < len(found):
        raise ValueError(
            f"active_path: device must be a CUDA device from cuda:0 to cuda:{len(found) - 1}, "
            f"got {device!r}"
        )
    return found[index].path


def _device_index(device: torch.device | str | int | None) -> int:
    if isinstance(device, int):
        return device
    if device is not None:
        device = torch.device(device)
        if device.type != "cuda":
            return -1
        if device.index is not None:
            return device.index
    return torch.cuda.current_device()


def use_path(name: str) -> AbstractContextManager[None]:
    """Use another path for CUDA tensors in the whole process, until the block ends.

    For tests and measurements. CUDA graphs that were captured before keep their kernels.

    Args:
        name: ``"auto"``, ``"aten"``, or ``"triton"`` if :func:`available_paths` has it.

    Raises:
        ValueError: the name is unknown, or Triton cannot run here; the message has the reason.

    Example:
        >>> with use_path("auto"):
        ...     chosen_path()
        'auto'
    """
    _check_path("use_path: name", name)
    if name == "triton" and name not in available_paths():
        raise ValueError(f"use_path: 'triton' cannot run here: {_why_no_triton()}")
    return _switched_to(name)


@contextmanager
def _switched_to(name: str) -> Iterator[None]:
    before = _dispatcher.path
    _choose(name)
    try:
        yield
    finally:
        _choose(before)


def _choose(name: str) -> None:
    # Without the registration a call runs in C++ only. A torch without CUDA needs none.
    if name != "aten" and torch.version.cuda is not None:
        _dispatcher.register()
    _dispatcher.set_path(name)


def _check_path(who: str, name: str) -> None:
    if name not in PATHS:
        raise ValueError(f"{who} must be one of {', '.join(PATHS)}, got {name!r} (unknown)")


def _why_no_triton() -> str:
    found = gpus()
    if not found:
        return no_gpu_reason()
    return _dispatcher.reason(0) or "unknown"


def no_gpu_reason() -> str:
    """Why torch finds no GPU, as text, for when :func:`gpus` is empty.

    Example:
        >>> gpus() != () or no_gpu_reason() != ""
        True
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device"


def _apply_environment() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    _check_path(f"the environment variable {ENVIRONMENT_VARIABLE}", name)
    autotune = os.environ.get(AUTOTUNE_VARIABLE) or "1"
    if autotune not in ("0", "1"):  # torchquant.triton.tuning reads it, too late for errors
        raise ValueError(
            f"the environment variable {AUTOTUNE_VARIABLE} must be 0 or 1, got {autotune!r}"
        )
    _choose(name)


_apply_environment()
