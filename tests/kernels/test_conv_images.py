"""Dense and grouped convolutions of the core, on slices of images: the bits of conv_static."""

import ctypes

import pytest
import torch
from support import assert_same_bits, positive
from support import integers as numbers
from support.conv_layers import NAMED, Convolution
from support.core import (
    ACTIVATION,
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

from torchquant import cpu, functional, ops

LAYERS = {
    name: conv
    for name, conv in NAMED.items()
    if len(conv.size) == 2 and (conv.channels > 1 or conv.groups == 1)
}
OUTPUTS = {
    "int8": {"output_dtype": torch.int8, "output_scale": 0.4, "output_zero_point": -7},
    "float32": {"output_dtype": torch.float32},
}


def packed(conv: Convolution) -> Tensor:
    """In memory aligned to 64 bytes."""
    values = ops.pack_conv_weight(conv.weight, conv.groups)
    memory = torch.empty(values.numel() + 64, dtype=torch.int8)
    start = -memory.data_ptr() % 64
    aligned = memory[start : start + values.numel()]
    aligned.copy_(values.flatten())
    return aligned


def with_gaps_between_rows(x: Tensor) -> Tensor:
    """A result whose rows are further apart than its pixels need."""
    n, c, h, w = x.shape
    wide = torch.full((n, h + 1, w + 2, c), 55, dtype=x.dtype)
    return placed(wide[:, :h, :w].permute(0, 3, 1, 2))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("residual", [None, torch.int8], ids=["plain", "residual"])
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_bits(conv: Convolution, residual: torch.dtype | None, output: str) -> None:
    q, weight = numbers(*conv.input_shape, seed=7), packed(conv)
    scale, bias = placed(conv.scale), placed(conv.bias_values)
    step, zero = placed(torch.tensor([0.05])), placed(torch.tensor([-7], dtype=torch.int32))
    options = {**conv.sizes, **OUTPUTS[output], "activation": "relu6"}
    shape = functional.conv_static(q, step, zero, conv.weight, scale, bias, **options).shape
    added = None
    if residual is not None:
        added = numbers(*shape, seed=9)
        options |= {"residual": added, "residual_scale": 0.3, "residual_zero_point": 4}
    expected = functional.conv_static(q, step, zero, conv.weight, scale, bias, **options)
    x = channels_last(q, 3)
    other = None if added is None else channels_last(added, 2)
    kept = Image() if other is None else image(other)
    for isa in cpu.available_isas():
        for out in (empty(shape, expected.dtype, 5), with_gaps_between_rows(expected)):
            for threads in (None, Divided(3)):
                out.fill_(55)
                parameters = Qparams(0.4, -7, -128, 127), Qparams(0.3, 4, -128, 127)
                sizes = (*conv.kernel, *conv.stride, conv.padding[0], conv.padding[2])
                arguments = ConvCall(
                    image(x),
                    pointer(step),
                    pointer(zero),
                    False,
                    *sizes,
                    *conv.dilation,
                    conv.groups,
                    pointer(weight),
                    pointer(scale),
                    pointer(bias),
                    ACTIVATION["relu6"],
                    None if added is None else ctypes.addressof(kept),
                    parameters[1],
                    image(out),
                    parameters[0],
                )
                with cpu.use_isa(isa):
                    call("tq_conv", arguments, parallel=threads)
                assert_same_bits(out.contiguous(), expected, (isa, threads))


def test_what_lies_between_results_is_not_written() -> None:
    conv = Convolution(1, 5, 21, (3, 4), (1, 1), (1, 1), (0,) * 4, (1, 1))
    x, weight = channels_last(numbers(*conv.input_shape)), packed(conv)
    scale, step = positive(21), torch.tensor([0.05])
    wide = torch.full((1, 3, 4, 30), 55, dtype=torch.int8)
    out = wide[..., 4:25].permute(0, 3, 1, 2)
    for isa in cpu.available_isas():
        wide.fill_(55)
        arguments = ConvCall(
            image(x), pointer(step), None, False, 1, 1, 1, 1, 0, 0, 1, 1, 1, pointer(weight)
        )
        arguments.weight_scale, arguments.out = pointer(scale), image(out)
        arguments.out_qparams = Qparams(0.4, 0, -128, 127)
        with cpu.use_isa(isa):
            call("tq_conv", arguments)
        assert (wide[..., :4] == 55).all() and (wide[..., 25:] == 55).all()
        assert not (out == 55).all()


def test_the_values_are_not_all_clamped() -> None:
    """The layers of this file have outputs of many values."""
    for conv in LAYERS.values():
        q = numbers(*conv.input_shape, seed=7)
        side = (conv.weight, conv.scale, conv.bias_values)
        y = functional.conv_static(q, 0.05, -7, *side, **conv.sizes, **OUTPUTS["int8"])
        assert len(y.unique()) > 10
