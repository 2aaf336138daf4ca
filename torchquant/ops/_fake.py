"""What fake kernels share: shapes and devices, no values."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def require_one_device(who: str, input: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors lie on input's device; for fake kernels.

    The dispatcher prefers the meta device over the CPU: a CPU tensor among meta tensors arrives in
    the fake kernel, and the result would be memory that nobody wrote.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{who}: {name} must be on the input's device {input.device}, got {tensor.device}; "
                "move it with .to(device)"
            )


def packed_shape(out_features: Any, in_features: Any) -> tuple[Any, Any]:
    """Shape of :func:`pack_weight`'s result; also for symbolic sizes."""
    tiles = (out_features + 15) // 16
    return tiles, (in_features + 63) // 64 * 64 * 16 + 128
