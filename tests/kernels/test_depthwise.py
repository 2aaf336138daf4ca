"""The depthwise convolution of the core: the bits of functional.conv_static on every path."""

import ctypes
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_same_bits, generator
from support.core import (
    ACTIVATION,
    LIBRARY,
    ConvCall,
    Divided,
    Image,
    Qparams,
    call,
    channels_last,
    empty,
    image,
    placed,
    pointer,
)
from torch import Tensor

from torchquant import cpu, functional


class Shape(NamedTuple):
    """Of a depthwise convolution; padding as top, bottom, left, right."""

    n: int
    c: int
    h: int
    w: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1


SHAPES = (
    *(Shape(1, c, 9, 11, (3, 3), padding=(1, 1, 1, 1)) for c in (2, 3, 15, 17, 31, 32, 33)),
    *(Shape(1, c, 9, 12, (3, 3), (2, 2), (1, 1, 1, 1)) for c in (16, 48, 63, 64, 65, 96, 100)),
    Shape(2, 144, 14, 14, (3, 3), padding=(1, 1, 1, 1)),
    Shape(1, 64, 7, 61, (3, 3), padding=(1, 1, 1, 1)),  # an odd number of rows, wider than a strip
    Shape(1, 112, 6, 5, (3, 3), padding=(2, 0, 0, 2)),
    Shape(2, 64, 3, 1, (3, 3), padding=(0, 2, 1, 2)),
    Shape(2, 40, 28, 29, (5, 5), padding=(2, 2, 2, 2)),
    Shape(1, 72, 15, 14, (5, 5), (2, 2), (2, 1, 1, 2)),
    Shape(1, 96, 9, 10, (7, 7), padding=(3, 3, 3, 3)),
    Shape(1, 20, 13, 12, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Shape(1, 33, 14, 19, (4, 2), (3, 1), (0, 3, 1, 0), (1, 3)),
    Shape(3, 70, 1, 1, (3, 3), padding=(1, 1, 1, 1)),
    Shape(2, 70, 1, 1, (1, 1)),
    Shape(1, 24, 5, 6, (1, 1), (2, 3)),
    Shape(1, 24, 3, 2, (2, 2), padding=(4, 4, 5, 5)),  # whole windows in the padding
    Shape(2, 20, 1, 50, (1, 9), padding=(0, 0, 4, 4)),  # one dimension
    Shape(1, 65, 40, 1, (31, 1), padding=(15, 15, 0, 0)),
    Shape(1, 6, 8, 8, (3, 3), padding=(1, 1, 1, 1), multiplier=2),
    Shape(1, 30, 8, 8, (3, 3), (2, 2), (1, 1, 1, 1), multiplier=5),
    Shape(1, 32, 300, 70, (3, 3), padding=(1, 1, 1, 1)),  # several units of work and strips
)


class Case(NamedTuple):
    """Everything that surrounds a shape."""

    activation: str = "none"
    bias: bool = True
    zero_point: int = 3
    residual: torch.dtype | None = None
    output: tuple[float, int, int, int] | torch.dtype = (0.5, -4, -128, 127)
    extreme: bool = False  # integers at both ends of int8 only
    per_image: bool = False
    scale: float = 0.02
    bias_value: float | None = None


CASES = {
    "int8": Case(),
    "relu": Case("relu", zero_point=-128),
    "no bias": Case(bias=False, output=(0.3, 100, -127, 127)),
    "few levels": Case("relu", output=(0.7, -2, -8, 7)),
    "relu6": Case("relu6", output=(0.03, -100, -128, 127)),
    "relu6 of few levels": Case("relu6", zero_point=-128, output=(0.9, 1, -5, 6)),
    "relu6 in float32": Case("relu6", output=torch.float32),
    "silu": Case("silu"),
    "float32": Case(output=torch.float32),
    "bfloat16": Case("gelu", output=torch.bfloat16),
    "float16": Case(bias=False, output=torch.float16),
    "int8 residual": Case("relu", residual=torch.int8),
    "float residual": Case("tanh", residual=torch.float32, output=torch.float32),
    "extreme": Case(extreme=True, zero_point=127, output=(0.1, 127, -128, 127)),
    "extreme negative": Case(extreme=True, zero_point=-128, output=(40.0, -128, -128, 127)),
    "a scale for each image": Case(per_image=True),
    "saturated": Case(output=(2.0**-126, 3, -128, 127)),
    "infinite bias": Case(bias_value=float("inf")),
    "no number": Case(scale=float("nan"), per_image=True),
    "overflow": Case("relu", scale=1e30, output=(1e-30, 3, -128, 127)),
}


def integers(shape: tuple[int, ...], seed: int, extreme: bool) -> Tensor:
    q = torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)
    return torch.where(q >= 0, 127, -128).to(torch.int8) if extreme else q


def packed(weight: Tensor) -> Tensor:
    """int8 [O, 1, kh, kw] in the core's layout, in memory aligned to 64 bytes."""
    o, _, kh, kw = weight.shape
    LIBRARY.tq_depthwise_blocks.restype = LIBRARY.tq_depthwise_block_bytes.restype = ctypes.c_int64
    blocks = LIBRARY.tq_depthwise_blocks(ctypes.c_int64(o))
    columns = LIBRARY.tq_depthwise_block_bytes(ctypes.c_int64(kh), ctypes.c_int64(kw))
    memory = torch.empty(blocks * columns + 64, dtype=torch.int8)
    start = -memory.data_ptr() % 64
    out = placed(memory[start : start + blocks * columns])
    sizes = [ctypes.c_int64(size) for size in (o, kh, kw)]
    call("tq_pack_depthwise", pointer(weight), *sizes, pointer(out))
    back = torch.empty_like(weight)
    call("tq_unpack_depthwise", pointer(out), *sizes, pointer(back))
    assert torch.equal(back, weight)
    return out


def check(shape: Shape, case: Case, seed: int) -> int:
    """The result of every path is the specification's; returns how often it asked for threads."""
    g = generator(seed)
    o, (kh, kw) = shape.c * shape.multiplier, shape.kernel
    q = channels_last(integers((shape.n, shape.c, shape.h, shape.w), seed, case.extreme), seed % 3)
    weight = integers((o, 1, kh, kw), seed + 1, case.extreme)
    weight_scale = placed(torch.rand(o, generator=g) * 0.02 + 0.001)
    bias = placed(torch.randn(o, generator=g)) if case.bias else None
    if bias is not None and case.bias_value is not None:
        bias[o // 2] = case.bias_value
    count = shape.n if case.per_image else 1
    scale = torch.full((count,), case.scale) * (1 + torch.arange(count) % 2)
    zero_point = torch.full((count,), case.zero_point, dtype=torch.int32)
    zero_point[1:] -= zero_point[1:].sign()
    options: dict[str, Any] = {
        "stride": shape.stride,
        "padding": shape.padding,
        "dilation": shape.dilation,
        "groups": shape.c,
        "activation": case.activation,
    }
    if isinstance(case.output, torch.dtype):
        dtype, qparams = case.output, Qparams()
        options["output_dtype"] = dtype
    else:
        dtype, qparams = torch.int8, Qparams(*case.output)
        names = ("scale", "zero_point", "qmin", "qmax")
        options |= {f"output_{n}": v for n, v in zip(names, case.output, strict=True)}
        options["output_dtype"] = dtype
    arguments = (q, scale, zero_point, weight, weight_scale, bias)
    plain = functional.conv_static(*arguments, **options)
    residual = None
    if case.residual == torch.int8:
        residual = channels_last(integers(tuple(plain.shape), seed + 2, False), 3)
        options |= {"residual": residual, "residual_scale": 0.03, "residual_zero_point": -5}
    elif case.residual is not None:
        residual = channels_last(torch.randn(plain.shape, generator=g), 2)
        options["residual"] = residual
    expected = functional.conv_static(*arguments, **options)
    weights = packed(weight)
    conv = ConvCall(
        input=image(q),
        input_scale=scale.data_ptr(),
        input_zero_point=zero_point.data_ptr(),
        per_image=case.per_image,
        kernel_h=kh,
        kernel_w=kw,
        stride_h=shape.stride[0],
        stride_w=shape.stride[1],
        pad_top=shape.padding[0],
        pad_left=shape.padding[2],
        dilation_h=shape.dilation[0],
        dilation_w=shape.dilation[1],
        groups=shape.c,
        packed=weights.data_ptr(),
        weight_scale=weight_scale.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        activation=ACTIVATION[case.activation],
        residual_qparams=Qparams(0.03, -5, -128, 127),
        out_qparams=qparams,
    )
    if residual is not None:
        held = image(residual)
        conv.residual = ctypes.addressof(held)
    asked = 0
    for number, isa in enumerate(cpu.available_isas()):
        for parallel in (None, Divided(number)):
            out = empty(tuple(expected.shape), dtype, seed % 2 * 5)
            conv.out = image(out)
            with cpu.use_isa(isa):
                call("tq_conv_depthwise", conv, parallel=parallel)
            assert_same_bits(out, expected, (isa, parallel, shape, case))
            asked += 0 if parallel is None else parallel.calls
    return asked


@pytest.mark.parametrize("name", CASES)
def test_bits(name: str) -> None:
    """Each case on some of the shapes; all of them on each shape of the first cases."""
    number = list(CASES).index(name)
    every = number < 2
    asked = 0
    for index, shape in enumerate(SHAPES):
        if every or (index + number) % 4 == 0:
            asked += check(shape, CASES[name], index)
    assert asked > 0 or not every


def test_every_kernel_size() -> None:
    """Sizes around four rows, the unit of the packed weight."""
    for kh, kw in itertools.product((1, 2, 3, 4, 5, 8, 9), (1, 2, 5)):
        padding = (kh // 2, kh - kh // 2, kw // 2, kw // 2)
        check(Shape(1, 35, 10, 9, (kh, kw), padding=padding), CASES["int8"], kh)


def test_nothing_to_do() -> None:
    """Images without an element, and results without one."""
    conv = ConvCall(input=Image(), out=Image(), kernel_h=1, kernel_w=1, stride_h=1, stride_w=1)
    call("tq_conv_depthwise", conv)
