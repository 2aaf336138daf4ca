"""Facts about GPUs and Triton, for :mod:`torchquant.cuda.dispatch`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

# The operators that Triton's kernels run, by family: torchquant.triton.ops.<family> has a function
# of the operator's name. ATen's kernels run all others.
FAMILIES = {
    "affine": ("quantize", "dequantize", "quantize_per_token", "quantize_rows", "quantize_pack"),
    "linear": ("int8_mm", "linear_dynamic", "linear_dynamic_split", "linear_static"),
    "activations": ("activation", "gated_activation"),
    "norms": ("rms_norm", "layer_norm"),
    "fake_quantize": (
        "fake_quantize",
        "fake_quantize_mask",
        "in_range",
        "positive",
        "mask_gradient",
        "fake_quantize_learned",
        "fake_quantize_learned_backward",
        "minmax",
    ),
    "qat": ("mm_fake_quantized",),
}
FAMILY_OF = {operator: family for family, operators in FAMILIES.items() for operator in operators}

LEAST_CAPABILITY = (8, 0)  # Ampere: int8 tensor cores that Triton's tl.dot compiles to

Kernel = Callable[..., Any]

# Triton's launcher reports errors of the driver as plain text. After these errors the process can
# no longer use the device, and ATen would raise the same error.
_LOST_DEVICE = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "hardware stack error",
    "uncorrectable",
    "launch timed out",
)


@dataclass(frozen=True)
class Device:
    """A GPU as CUDA describes it; ``memory`` in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int

    def __str__(self) -> str:
        major, minor = self.capability
        return f"cuda:{self.index} ({self.name}, compute capability {major}.{minor})"


class Host(Protocol):
    """The environment of a :class:`Dispatcher`; tests provide one without CUDA."""

    def device(self, index: int) -> Device:
        """The device with that index."""
        ...

    def missing(self) -> str | None:
        """Why Triton is not available; None if it is."""
        ...

    def kernel(self, name: str) -> Kernel:
        """The operator's function in torchquant.triton; imports Triton."""
        ...

    def capturing(self) -> bool:
        """True if the current stream records a CUDA graph."""
        ...

    def aside(self, index: int) -> AbstractContextManager[None]:
        """A block on that device which may wait for it."""
        ...

    def check(self, name: str, kernel: Kernel, aten: Kernel, index: int) -> str | None:
        """Compare small cases of both; None if all bits agree, else the difference."""
        ...


class CudaHost:
    """The :class:`Host` of real GPUs."""

    def device(self, index: int) -> Device:
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        return Device(index, properties.name, capability, properties.total_memory)

    def missing(self) -> str | None:
        if torch.version.cuda is None:
            return "this torch is not built for CUDA"
        return None if triton_installed() else "triton is not installed (pip install triton)"

    def kernel(self, name: str) -> Kernel:
        family = FAMILY_OF[name]
        module = importlib.import_module(f"torchquant.triton.ops.{family}")
        if family == "linear":
            importlib.import_module("torchquant.triton.gemm.tuning").install()
        kernel: Kernel = getattr(module, name)
        return kernel

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def aside(self, index: int) -> AbstractContextManager[None]:
        from torchquant.triton.tuning.choose import aside

        return aside(torch.device("cuda", index))

    def check(self, name: str, kernel: Kernel, aten: Kernel, index: int) -> str | None:
        from torchquant.triton import selftest

        return selftest.check(name, kernel, aten, torch.device("cuda", index))


def triton_installed() -> bool:
    """True if triton is installed; imports nothing."""
    return importlib.util.find_spec("triton") is not None


def triton_version() -> str | None:
    """Triton's version from its package's metadata; imports nothing."""
    if not triton_installed():
        return None
    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_device_error(error: BaseException) -> bool:
    """True if the device, its memory or the host's memory caused the error, not a kernel.

    >>> is_device_error(RuntimeError("Triton Error [CUDA]: an illegal memory access ..."))
    True
    >>> is_device_error(RuntimeError("PTX JIT compilation failed"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return True
    text = str(error)
    if text.startswith("CUDA error"):
        return True
    return text.startswith("Triton Error [CUDA]") and any(word in text for word in _LOST_DEVICE)
