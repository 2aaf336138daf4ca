"""Calls of the operators on weights of 2 to 8 bits, for tests/cases.py."""

from typing import Any

import torch
from torch import Tensor

from support import integers, positive
from support.aten import PackedIntx
from support.case_operands import ONE, Operands, Samples, generator, sample

SEVEN = torch.tensor([-7], dtype=torch.int32)


def few_bits(*shape: int, bits: int, seed: int = 0) -> Tensor:
    """Integers of ``bits`` bits, int8; the ends of the range more often than the rest."""
    return integers(*shape, seed=seed) >> (8 - bits)


def weight(
    o: Operands, bits: int, group_size: int | None = None, zero_points: bool = False
) -> PackedIntx:
    outputs, inputs = o.shape.outputs, o.shape.inputs
    group_size = None if group_size is None else min(group_size, inputs)
    shape = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
    zeros = few_bits(*shape, bits=bits, seed=3) if zero_points else None
    matrix = few_bits(outputs, inputs, bits=bits, seed=1)
    return PackedIntx((matrix,), positive(*shape, seed=2), zeros, bits, group_size)


def side(
    o: Operands, bits: int, group_size: int | None = None, zero_points: bool = False
) -> dict[str, Any]:
    """The weight's arguments of a layer."""
    packed = weight(o, bits, group_size, zero_points)
    given = {"packed": packed, "out_features": o.shape.outputs, "bits": bits}
    return {**given, "group_size": packed.group_size, "has_zero_point": zero_points or None}


@generator
def pack_intx_weight(o: Operands) -> Samples:
    for name, made in {
        "channels": weight(o, 4),
        "groups": weight(o, 3, 32),
        "groups with zero points": weight(o, 5, 20, True),
        "channels with zero points": weight(o, 8, None, True),
    }.items():
        rest = {"bits": made.bits, "group_size": made.group_size}
        matrix, scale, zeros = made.canonical.values()
        yield sample(name, weight=matrix, weight_scale=scale, weight_zero_point=zeros, **rest)
    made = weight(o, 2, 64)
    apart = {name: t.t().contiguous().t() for name, t in made.canonical.items() if t is not None}
    yield sample("transposed", **apart, bits=2, group_size=made.group_size)


@generator
def unpack_intx_weight(o: Operands) -> Samples:
    for name, arguments in {
        "channels": (o, 6),
        "groups": (o, 7, 64),
        "groups with zero points": (o, 4, 20, True),
    }.items():
        yield sample(name, in_features=o.shape.inputs, **side(*arguments))


@generator
def linear_dynamic_intx(o: Operands) -> Samples:
    yield sample("channels", input=o.x, **side(o, 4))
    yield sample("groups", input=o.x, **side(o, 4, 32))
    gelu = {"bias": o.bias, "activation": "gelu"}
    yield sample("everything", input=o.bf16, symmetric=False, **gelu, **side(o, 3, 20, True))
    half = {"activation": "silu", "output_dtype": torch.float16}
    yield sample("batch to float16", input=o.batch, bias=o.bias, **half, **side(o, 2, 64))
    yield sample("few bits", input=o.x, bias=o.bias, activation_bits=4, **side(o, 8, 32, True))
    yield sample("gradient of the input", "input", input=o.x, **side(o, 6, 32))
    both = {"input": o.x, **gelu}
    yield sample("gradients behind gelu", "input", "bias", **both, **side(o, 5, 20, True))
    relu = {"input": o.x, "bias": o.bias.bfloat16(), "activation": "relu", "symmetric": False}
    yield sample("gradient of the bias", "bias", **relu, **side(o, 7, None, True))
    yield sample("no rows", input=o.x[:0], **side(o, 4, 32))
    yield sample("one dimension", input=o.x[0], **side(o, 4, 64))


@generator
def linear_static_intx(o: Operands) -> Samples:
    one = {"input_scale": ONE}
    yield sample("channels", input=o.x, **one, **side(o, 4))
    both = {"bias": o.bias, "input_zero_point": SEVEN, **one}
    half = {"activation": "gelu", "output_dtype": torch.bfloat16}
    yield sample("everything", input=o.bf16, **both, **half, **side(o, 3, 20, True))
    few = {"input_qmin": -8, "input_qmax": 7}
    yield sample("few bits", input=o.batch, **few, **both, **side(o, 2, 64))
    yield sample("gradient of the input", "input", input=o.x, **one, **side(o, 6, 32))
    silu = {"input": o.x, "activation": "silu", **both}
    yield sample("gradients behind silu", "input", "bias", **silu, **side(o, 5, 20, True))
    float16 = {"bias": o.bias.half(), "input_qmin": -127, **one}
    yield sample("gradient of the bias", "bias", input=o.x, **float16, **side(o, 8, 32))
    yield sample("no rows", input=o.x[:0], **one, **side(o, 4, 32))
    yield sample("one dimension", input=o.x[0], **both, **side(o, 7, 32))


@generator
def linear_intx(o: Operands) -> Samples:
    yield sample("channels", input=o.x, **side(o, 4))
    yield sample("groups", input=o.x, **side(o, 4, 32))
    gelu = {"bias": o.bias, "activation": "gelu"}
    yield sample("everything", input=o.bf16, **gelu, **side(o, 3, 20, True))
    half = {"activation": "silu", "output_dtype": torch.float16}
    yield sample("batch to float16", input=o.batch, bias=o.bias, **half, **side(o, 2, 64))
    yield sample("gradient of the input", "input", input=o.x, **side(o, 6, 32))
    yield sample(
        "gradients behind gelu", "input", "bias", input=o.x, **gelu, **side(o, 5, 20, True)
    )
    relu = {"input": o.x, "bias": o.bias.bfloat16(), "activation": "relu"}
    yield sample("gradient of the bias", "bias", **relu, **side(o, 7, None, True))
    yield sample("no rows", input=o.x[:0], **side(o, 4, 32))
    yield sample("one dimension", input=o.x[0], **side(o, 8, 64))
