"""Calls of the operators of layers in training with weights of 2 to 8 bits, for tests/cases.py."""

from typing import Any

import torch
from torch import Tensor

from support import positive
from support.case_operands import Operands, Samples, generator, sample


def scales(o: Operands, group_size: int) -> Tensor:
    return positive(o.shape.outputs, -(-o.shape.inputs // group_size), seed=2)


def in_groups(o: Operands, group_size: int) -> dict[str, Any]:
    return {"group_size": min(group_size, o.shape.inputs)}


@generator
def quantize_pack_intx(o: Operands) -> Samples:
    weight = o.float_weight
    four = {"bits": 4, "qmin": -8, "qmax": 7}
    yield sample("channels", weight=weight, symmetric=True, **four)
    yield sample("groups", weight=weight, symmetric=True, **four, **in_groups(o, 32))
    three = {"bits": 3, "qmin": -4, "qmax": 3, **in_groups(o, 20)}
    yield sample("zero points", weight=weight.bfloat16(), symmetric=False, **three)
    size = in_groups(o, 32)
    given = {"scale": scales(o, **size), "symmetric": True, **size}
    yield sample("given scales", weight=weight, bits=8, qmin=-127, qmax=127, **given)


@generator
def qat_linear_intx(o: Operands) -> Samples:
    layer = {"input": o.x, "weight": o.float_weight}
    four = {"weight_qmin": -8, "weight_qmax": 7}
    all_three = ("input", "weight", "bias")
    yield sample("plain", bias=o.bias, **layer, **four, **in_groups(o, 32))
    shifted = {"weight_symmetric": False, "activation": "relu", "activation_symmetric": True}
    yield sample("zero points", *all_three, bias=o.bias, **layer, **four, **shifted)
    size = in_groups(o, 20)
    learned = {"weight_scale": scales(o, **size), "weight_grad_factor": 0.1, **size}
    half = {"input": o.bf16, "weight": o.float_weight, "output_dtype": torch.float16}
    few = {"activation_bits": 4, "weight_qmin": -2, "weight_qmax": 1}
    yield sample("learned", "input", "weight", "weight_scale", **half, **few, **learned)
    floats = {"activation_bits": None, "activation": "relu", **in_groups(o, 32)}
    yield sample("float activations", *all_three, bias=o.bias, **layer, **four, **floats)
    none = {"input": o.x[:0], "weight": o.float_weight}
    yield sample("no rows", "input", "weight", **none, **four, **in_groups(o, 32))
