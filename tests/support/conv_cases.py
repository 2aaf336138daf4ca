"""Calls of the convolution operators, for tests/cases.py."""

from typing import Any

import torch
from torch import Tensor

from support import floats, integers
from support.aten import PackedConv
from support.case_operands import ONE, ZERO, Operands, Samples, generator, sample

IMAGE = (5, 4)  # height and width


def side(weight: Tensor, groups: int = 1, scale: Tensor | None = None) -> dict[str, Any]:
    """The weight's arguments."""
    return {
        "packed": PackedConv((weight,), groups),
        "weight_scale": ONE if scale is None else scale,
        "weight_shape": list(weight.shape),
        "groups": groups,
    }


def sizes(stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, Any]:
    return {"stride": stride, "padding": padding, "dilation": dilation}


TWO, ONE_DIMENSION = sizes([1, 1], [1, 0, 0, 2], [1, 1]), sizes([2], [1, 1], [2])
APART = sizes([2, 1], [2, 2, 1, 1], [2, 1])


def dense(o: Operands) -> Tensor:
    return integers(o.shape.outputs, o.shape.inputs, 3, 2, seed=1)


def grouped(o: Operands) -> Tensor:
    return integers(3 * o.shape.outputs, (o.shape.inputs + 3) // 4, 2, 3, seed=2)


def image(o: Operands, channels: int | None = None) -> Tensor:
    count = o.shape.inputs if channels is None else channels
    return floats(min(o.shape.rows, 3), count, *IMAGE, seed=6, dtype=o.dtype)


def int8_image(o: Operands, channels: int | None = None) -> Tensor:
    count = o.shape.inputs if channels is None else channels
    return integers(min(o.shape.rows, 3), count, *IMAGE, seed=7)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@generator
def pack_conv_weight(o: Operands) -> Samples:
    yield sample("dense", weight=dense(o), groups=1)
    yield sample("grouped, transposed", weight=grouped(o).transpose(2, 3), groups=3)
    yield sample("one dimension", weight=dense(o)[:, :, 0], groups=1)


@generator
def unpack_conv_weight(o: Operands) -> Samples:
    for name, weight, groups in (("dense", dense(o), 1), ("grouped", grouped(o), 3)):
        packed = {"packed": PackedConv((weight,), groups)}
        yield sample(name, weight_shape=list(weight.shape), groups=groups, **packed)


@generator
def conv_static(o: Operands) -> Samples:
    weight, three = side(dense(o), scale=o.scale), side(grouped(o), 3)
    channels = 3 * grouped(o).shape[1]
    q, x, samples = int8_image(o), image(o), min(o.shape.rows, 3)
    one, zero = {"input_scale": ONE}, {"input_zero_point": ZERO}
    int8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.5])}
    short = {"output_qmin": -100, "output_qmax": 99, "output_zero_point": 5, **int8}
    yield sample("integers", input=q, **one, **weight, **TWO)
    biased = {"bias": o.bias, "activation": "relu", **weight, **TWO}
    yield sample("to int8", input=last(q), **short, **one, **zero, **biased)
    own = {
        "input_scale": torch.rand(samples) * 0.1 + 0.01,
        "input_zero_point": integers(samples, seed=9).to(torch.int32),
    }
    half = {"activation": "gelu", "output_dtype": torch.bfloat16, **three, **APART}
    yield sample("samples of their own", input=int8_image(o, channels), **own, **half)
    residual = integers(samples, o.shape.outputs, 4, 5, seed=8)
    other = {"residual": residual, "residual_scale": torch.tensor([0.3]), "residual_zero_point": 4}
    yield sample("int8 residual", input=q, **other, **int8, **one, **biased)
    plain = {"bias": o.bias, **one, **zero, **weight, **TWO}
    float_residual = {"residual": floats(samples, o.shape.outputs, 4, 5, seed=8)}
    by = ("input", "bias", "residual")
    yield sample("gradients", *by, input=x, activation="silu", **float_residual, **plain)
    row = side(dense(o)[:, :, 0])
    line = {**one, **row, **ONE_DIMENSION}
    yield sample("one dimension", "input", input=x[:, :, 0], input_qmin=-127, **line)
    few = {"input_qmin": -8, "input_qmax": 7, "output_dtype": torch.float16}
    yield sample("few bits", "bias", input=last(x), **few, **{**plain, "bias": o.bias.half()})
    yield sample("floats to int8", "input", input=x, **int8, **one, **weight, **TWO)
    yield sample("no samples", input=q[:0], **one, **weight, **TWO)


@generator
def conv_dynamic(o: Operands) -> Samples:
    weight, three, x = side(dense(o), scale=o.scale), side(grouped(o), 3), image(o)
    channels = 3 * grouped(o).shape[1]
    yield sample("plain", input=x, **weight, **TWO)
    half = {"symmetric": False, "activation": "gelu", "output_dtype": torch.float16}
    wide = last(image(o, channels)).bfloat16()
    bias = floats(3 * o.shape.outputs, seed=4)
    yield sample("everything", input=wide, bias=bias, **half, **three, **APART)
    line = {"activation_bits": 4, **side(dense(o)[:, :, 0]), **ONE_DIMENSION}
    yield sample("one dimension", "input", input=x[:, :, 1], **line)
    both = {"input": x, "bias": o.bias, "activation": "tanh"}
    yield sample("gradients", "input", "bias", **both, **weight, **TWO)
    grouped_by = {"input": image(o, channels), "bias": bias.bfloat16()}
    yield sample("grouped gradients", "input", "bias", **grouped_by, **three, **APART)
    yield sample("no samples", input=x[:0], **weight, **TWO)
