"""The launch of every kernel."""

from __future__ import annotations

from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> None:
    """Run ``kernel[grid](*args, **options)`` on ``device``, without fused multiply-adds.

    Triton launches on the current device, not on its arguments' device, and by default lets the
    assembler fuse multiplications with additions, which changes bits.

    Args:
        kernel: a ``triton.jit`` function.
        grid: number of programs along up to three axes.
        device: the tensors' device; the CPU works under Triton's interpreter.
        args, options: the kernel's arguments; num_warps, num_stages and the like.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        kernel[grid](*args, enable_fp_fusion=False, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, enable_fp_fusion=False, **options)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, for n >= 1."""
    return 1 << (n - 1).bit_length()
