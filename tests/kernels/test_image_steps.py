"""The int8 steps between convolutions: the core's bits are the specification's.

Every step runs under every instruction set, alone and with the work divided at random places, on
slices of wider images, with odd numbers of channels and with numbers at the ends of their ranges.
"""

import itertools
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int64
from typing import Any

import pytest
import torch
from support import assert_same_bits, generator
from support.core import (
    ACTIVATION,
    Divided,
    Qparams,
    Window,
    call,
    channels_last,
    empty,
    float_image,
    image,
    placed,
    pointer,
)
from torch import Tensor

from torchquant import cpu, functional

CHANNELS = (1, 3, 15, 17, 64, 100)
SIZES = ((1, 1, 1), (2, 1, 7), (1, 9, 8), (3, 5, 4))  # n, h, w
QPARAMS = (
    (0.02, 0, -128, 127),
    (0.013, -128, -128, 127),
    (0.05, 127, -128, 127),
    (0.031, 5, -127, 127),
    (2.0**-126, 3, -128, 127),  # all results saturate
    (1e30, -3, -8, 7),
)


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    """int8 [N, C, H, W] of all values, with both ends often."""
    q = torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)
    ends = torch.randint(0, 8, shape, generator=generator(seed + 1))
    return torch.where(ends == 0, -128, torch.where(ends == 1, 127, q)).to(torch.int8)


def output(qparams: tuple[float, int, int, int]) -> dict[str, float]:
    names = ("scale", "zero_point", "qmin", "qmax")
    return {f"output_{name}": value for name, value in zip(names, qparams, strict=True)}


class Out:
    """Stands for the result among the arguments of a call."""


def check(
    name: str,
    *arguments: Any,
    expected: Tensor,
    gap: int = 0,
    like: Tensor | None = None,
    what: object = "",
) -> int:
    """The call's result has ``expected``'s bits on every path.

    Args:
        name: of the function; where an argument is ``Out`` it gets the result's image.
        gap: between the result's pixels.
        like: a float tensor; the result gets its strides.

    Returns:
        How often the core asked for threads.
    """
    asked = 0
    for number, isa in enumerate(cpu.available_isas()):
        for parallel in (None, Divided(number)):
            if like is None:
                out = empty(tuple(expected.shape), expected.dtype, gap)
                struct: object = image(out)
            else:
                out = placed(torch.empty_like(like))
                struct = float_image(out)
            given = [struct if argument is Out else argument for argument in arguments]
            with cpu.use_isa(isa):
                call(name, *given, parallel=parallel)
            path = f"{name}, {isa}, {'one thread' if parallel is None else 'divided'}, {what}"
            assert_same_bits(out, expected, path)
            asked += 0 if parallel is None else parallel.calls
    return asked


def cases() -> list[tuple[int, tuple[int, int, int, int], tuple[float, int, int, int], int]]:
    """(number, shape [N, C, H, W], parameters of a result, gap between pixels)"""
    shapes = [(n, c, h, w) for c in CHANNELS for n, h, w in SIZES] + [(2, 64, 30, 17)]
    rotation = zip(shapes, itertools.cycle(QPARAMS), itertools.cycle((0, 0, 4)), strict=False)
    return [(number, *case) for number, case in enumerate(rotation)]


# ---------------------------------------------------------------- floats and integers


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice of channels_last": lambda x: channels_last(x, 5),
    "slice of contiguous": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every second column": lambda x: torch.stack([x, -x], 4).flatten(3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_and_dequantize(layout: str, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 0.05, -0.03])
    asked = 0
    for number, shape, qparams, gap in cases():
        scale, zero_point, qmin, qmax = qparams
        x = torch.randn(shape, generator=generator(number)) * scale * 60
        x.view(-1)[: len(special)] = special[: x.numel()]
        x = placed(LAYOUTS[layout](x.to(dtype)))
        q = functional.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, dtype=torch.int8)
        arguments = float_image(x), Qparams(*qparams), Out
        asked += check("tq_image_quantize", *arguments, expected=q, gap=gap, what=(shape, qparams))

        q = channels_last(integers(shape, number), gap)
        y = functional.dequantize(q, scale, zero_point, dtype=dtype)
        arguments = image(q), Qparams(*qparams), Out
        asked += check("tq_image_dequantize", *arguments, expected=y, like=x, what=(shape, qparams))
    assert asked > 0


def test_results_do_not_write_between_pixels() -> None:
    """A part of a concatenation leaves the other channels alone."""
    for channels, isa in itertools.product((3, 17, 70), cpu.available_isas()):
        wide = torch.full((1, 4, 40, channels + 6), 77, dtype=torch.int8)
        out = wide[..., 3:-3].permute(0, 3, 1, 2)
        x, source = torch.randn(1, channels, 4, 40), empty((1, channels, 4, 40))
        with cpu.use_isa(isa):
            call("tq_image_quantize", float_image(x), Qparams(0.1, 0, -128, 127), image(out))
            call("tq_image_map", image(source), None, image(out))
            call("tq_image_max_pool", image(source), WHOLE, image(out))
        assert (wide[..., :3] == 77).all()
        assert (wide[..., -3:] == 77).all()
        assert (out == 55).all()


WHOLE = Window(1, 1, 1, 1, 0, 0, 1, 1)


# ---------------------------------------------------------------- element by element


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("step", ["add", "mul", "mul by a pixel"])
def test_add_and_mul(step: str, activation: str) -> None:
    asked = 0
    for number, shape, qparams, gap in cases():
        n, c, *_ = shape
        left = channels_last(integers(shape, number), gap)
        small = step == "mul by a pixel"
        right = channels_last(integers((n, c, 1, 1) if small else shape, number + 50), 2)
        a, b = QPARAMS[number % 4], QPARAMS[(number + 1) % 4]
        function = functional.int8_add if step == "add" else functional.int8_mul
        arguments = (
            image(left),
            Qparams(*a),
            image(right.expand(shape)),
            Qparams(*b),
            ACTIVATION[activation],
            Out,
            Qparams(*qparams),
        )
        for result in (output(qparams), {}):
            y = function(left, *a[:2], right, *b[:2], activation=activation, **result)
            what = shape, qparams, activation
            asked += check(f"tq_image_{step[:3]}", *arguments, expected=y, gap=gap, what=what)
    assert asked > 0


def test_map_and_copy() -> None:
    asked = 0
    tables = (
        torch.randint(-128, 128, (256,), generator=generator(1), dtype=torch.int8),
        functional.int8_table(0.05, 3, activation="silu", output_scale=0.03),
        functional.int8_table(0.05, 3, activation="tanh"),
    )
    tables = tuple(map(placed, tables))
    for number, shape, _, gap in cases():
        q = channels_last(integers(shape, number), gap)
        for table in tables:
            y = functional.int8_map(q, table)
            arguments = image(q), pointer(table), Out
            asked += check("tq_image_map", *arguments, expected=y, gap=gap, what=shape)
        asked += check("tq_image_map", image(q), None, Out, expected=q, gap=gap, what=shape)
    assert asked > 0


def test_every_value_is_mapped() -> None:
    every = channels_last(torch.arange(-128, 128).to(torch.int8).view(1, 256, 1, 1))
    for seed in range(20):
        table = torch.randint(-128, 128, (256,), generator=generator(seed), dtype=torch.int8)
        check("tq_image_map", image(every), pointer(table), Out, expected=table.view(1, 256, 1, 1))


# ---------------------------------------------------------------- windows

WINDOWS = (  # kernel, stride, padding, dilation
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 2), (1, 3), (1, 0), (2, 1)),
    ((5, 4), (1, 1), (2, 2), (1, 3)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
)
IMAGES = ((1, 1, 12, 11), (2, 3, 9, 13), (1, 17, 11, 12), (2, 64, 10, 9), (1, 100, 12, 10))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool(ceil_mode: bool) -> None:
    asked = 0
    for (number, shape), window in itertools.product(enumerate(IMAGES), WINDOWS):
        q = channels_last(integers(shape, number), 4)
        y = functional.int8_max_pool(q, *window, ceil_mode=ceil_mode)
        arguments = image(q), Window(*itertools.chain(*window)), Out
        what = shape, window
        asked += check("tq_image_max_pool", *arguments, expected=y, gap=number, what=what)
    assert asked > 0


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("count_include_pad", "divisor"), [(True, 0), (False, 0), (True, 5)])
def test_avg_pool(count_include_pad: bool, divisor: int, ceil_mode: bool) -> None:
    windows = [window for window in WINDOWS if window[3] == (1, 1)]
    for (number, shape), window in itertools.product(enumerate(IMAGES), windows):
        q, a = channels_last(integers(shape, number), 4), QPARAMS[number % 4]
        qparams = QPARAMS[(number + 2) % len(QPARAMS)]
        how = ceil_mode, count_include_pad, divisor or None
        arguments = (
            image(q),
            Qparams(*a),
            Window(*itertools.chain(*window)),
            c_bool(count_include_pad),
            c_int64(divisor),
            Out,
            Qparams(*qparams),
        )
        for result in (output(qparams), {}):
            y = functional.int8_avg_pool(q, *a[:2], *window[:3], *how, **result)
            what = shape, window, qparams
            check("tq_image_avg_pool", *arguments, expected=y, gap=number, what=what)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, None), (20, 25)])
def test_adaptive_avg_pool(size: tuple[int | None, int | None]) -> None:
    asked = 0
    for number, shape in enumerate((*IMAGES, (2, 1280, 7, 7), (1, 15, 1, 1))):
        q, a = channels_last(integers(shape, number), 4), QPARAMS[number % 4]
        qparams = QPARAMS[(number + 2) % len(QPARAMS)]
        arguments = image(q), Qparams(*a), Out, Qparams(*qparams)
        for result in (output(qparams), {}):
            y = functional.int8_adaptive_avg_pool(q, *a[:2], size, **result)
            what = shape, size, qparams
            asked += check(
                "tq_image_adaptive_avg_pool", *arguments, expected=y, gap=number, what=what
            )
    assert asked > 0


# ---------------------------------------------------------------- bytes that move


@pytest.mark.parametrize("factors", [(2.0, 2.0), (1.5, 1.5), (0.7, 0.7), (3.0, 0.4)])
def test_upsample_nearest(factors: tuple[float, float]) -> None:
    asked = 0
    for number, shape in enumerate((*IMAGES, (2, 64, 30, 17), (1, 3, 3, 3))):
        q = channels_last(integers(shape, number), 4)
        new = [max(1, int(s * f)) for s, f in zip(shape[2:], factors, strict=True)]
        ratios = [float(torch.tensor(s / 1) / n) for s, n in zip(shape[2:], new, strict=True)]
        for sizes, scales in (
            ({"scale_factor": factors}, [1 / f for f in factors]),
            ({"size": new}, ratios),
        ):
            y = functional.int8_upsample_nearest(q, **sizes)
            arguments = image(q), *map(c_float, scales), Out
            what, gap = (shape, sizes), number % 2
            asked += check("tq_image_upsample_nearest", *arguments, expected=y, gap=gap, what=what)
    assert asked > 0


def test_flatten() -> None:
    asked = 0
    for number, shape in enumerate((*IMAGES, (2, 64, 30, 17), (3, 5, 1, 1), (2, 130, 12, 15))):
        q = channels_last(integers(shape, number), 4)
        for isa, parallel in itertools.product(cpu.available_isas(), (None, Divided(number))):
            wide = torch.full((shape[0], q[0].numel() + 3), 55, dtype=torch.int8)
            arguments = image(q), pointer(wide), c_int64(wide.shape[1])
            with cpu.use_isa(isa):
                call("tq_image_flatten", *arguments, parallel=parallel)
            assert torch.equal(wide[:, :-3], q.flatten(1)), (isa, shape)
            assert (wide[:, -3:] == 55).all()
            asked += 0 if parallel is None else parallel.calls
    assert asked > 0


def test_nothing_to_do() -> None:
    """Steps on images without an element succeed."""
    nothing, floats = image(torch.empty(0, 3, 4, 4, dtype=torch.int8)), torch.empty(0, 3, 4, 4)
    p = Qparams(0.1, 0, -128, 127)
    call("tq_image_quantize", float_image(floats), p, nothing)
    call("tq_image_dequantize", nothing, p, float_image(floats))
    call("tq_image_add", nothing, p, nothing, p, 0, nothing, p)
    call("tq_image_map", nothing, None, nothing)
    call("tq_image_max_pool", nothing, WHOLE, nothing)
    call("tq_image_avg_pool", nothing, p, WHOLE, c_bool(True), c_int64(0), nothing, p)
    call("tq_image_adaptive_avg_pool", nothing, p, nothing, p)
    call("tq_image_upsample_nearest", nothing, c_float(1), c_float(1), nothing)
    call("tq_image_flatten", nothing, None, c_int64(48))
