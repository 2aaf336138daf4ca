"""The C interface of the core (csrc/core/torchquant_core.h) called from Python, by ctypes.

Images are torch tensors in torch's logical order, [N, C, H, W], with any strides that the interface
takes; the structs here repeat the header's.
"""

import ctypes
import itertools
import os
import random
from collections.abc import Callable
from ctypes import Structure, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from support.holes import strided_beside_a_hole
from torchquant import _C, functional

LIBRARY = ctypes.CDLL(_C.__file__)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ACTIVATION = {name: number for number, name in enumerate(functional.ACTIVATIONS)}


class Image(Structure):
    """tq_image."""

    _fields_ = (
        ("data", c_void_p),
        ("type", c_int),
        *((name, c_int64) for name in ("n", "h", "w", "c")),
        *((f"{name}_stride", c_int64) for name in ("image", "row", "pixel")),
    )


class FloatImage(Structure):
    """tq_image_float."""

    _fields_ = (*Image._fields_, ("channel_stride", c_int64))


class Qparams(Structure):
    """tq_qparams."""

    _fields_ = (
        ("scale", c_float),
        *((name, c_int32) for name in ("zero_point", "qmin", "qmax")),
    )


class ConvCall(Structure):
    """tq_conv_call."""

    _fields_ = (
        ("input", Image),
        ("input_scale", c_void_p),
        ("input_zero_point", c_void_p),
        ("per_image", c_bool),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, c_int64) for name in ("pad_top", "pad_left", "dilation_h", "dilation_w")),
        ("groups", c_int64),
        ("packed", c_void_p),
        ("weight_scale", c_void_p),
        ("bias", c_void_p),
        ("activation", c_int),
        ("residual", c_void_p),
        ("residual_qparams", Qparams),
        ("out", Image),
        ("out_qparams", Qparams),
    )


class Window(Structure):
    """tq_window."""

    _fields_ = tuple(
        (f"{name}_{dim}", c_int64)
        for name in ("kernel", "stride", "pad", "dilation")
        for dim in "hw"
    )


BODY = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int64)
THREADS = ctypes.CFUNCTYPE(c_int64, c_void_p)
RUN = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_int64, c_int64, BODY, c_void_p)


class Parallel(Structure):
    """tq_parallel."""

    _fields_ = (("context", c_void_p), ("threads", THREADS), ("run", RUN))


class Divided:
    """Threads that divide the work at random places, one part after the other in random order.

    Attributes:
        calls: how often the core has asked for threads.
    """

    def __init__(self, seed: int = 0) -> None:
        self.calls = 0
        self._random = random.Random(seed)
        self._kept = THREADS(lambda _: 5), RUN(self._run)
        self.struct = Parallel(None, *self._kept)

    def _run(
        self, _: object, begin: int, end: int, grain: int, body: Callable[..., None], argument: int
    ) -> None:
        self.calls += 1
        cuts = sorted(self._random.randint(begin, end) for _ in range(3))
        edges = [begin, *cuts, end]
        parts = [(a, b) for a, b in itertools.pairwise(edges) if a < b]
        self._random.shuffle(parts)
        for first, last in parts:
            body(argument, first, last)


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of image, row, pixel and channel."""
    n, c, h, w = x.stride()
    return n, h, w, c


def image(x: Tensor) -> Image:
    """An int8 or float tensor [N, C, H, W] whose channels are contiguous."""
    n, c, h, w = x.shape
    assert c == 1 or x.stride(1) == 1 or x.numel() == 0
    return Image(x.data_ptr(), TYPES[x.dtype], n, h, w, c, *strides(x)[:3])


def float_image(x: Tensor) -> FloatImage:
    """A float tensor [N, C, H, W] with any strides."""
    n, c, h, w = x.shape
    return FloatImage(x.data_ptr(), TYPES[x.dtype], n, h, w, c, *strides(x))


def call(name: str, *arguments: Any, parallel: Divided | None = None) -> None:
    """Call a function of the interface; structs that are Images or Windows go by reference."""
    by_reference = (Image, FloatImage, Window, ConvCall)
    given = [ctypes.byref(a) if isinstance(a, by_reference) else a for a in arguments]
    function = getattr(LIBRARY, name)
    function.restype = c_int
    status = function(*given, ctypes.byref(parallel.struct) if parallel else None)
    assert status == 0, f"{name}: status {status}"


def pointer(x: Tensor) -> c_void_p:
    """To the first element."""
    return c_void_p(x.data_ptr())


# "before" or "behind": where an unmapped page is beside images and their parameters.
HOLE = os.environ.get("TORCHQUANT_TEST_HOLE")


def placed(x: Tensor) -> Tensor:
    """The tensor itself, or its values beside an unmapped page; its strides stay."""
    return x if HOLE is None else strided_beside_a_hole(x, before=HOLE == "before")


def channels_last(x: Tensor, gap: int = 0) -> Tensor:
    """The same values with contiguous channels, as a slice of the channels of a wider image."""
    n, c, h, w = x.shape
    wide = torch.full((n, h, w, c + gap), 77, dtype=x.dtype)
    wide[..., gap // 2 : gap // 2 + c] = x.permute(0, 2, 3, 1)
    return placed(wide[..., gap // 2 : gap // 2 + c].permute(0, 3, 1, 2))


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.int8, gap: int = 0) -> Tensor:
    """A result [N, C, H, W] with contiguous channels, filled with a pattern."""
    return channels_last(torch.full(shape, 55, dtype=dtype), gap)
