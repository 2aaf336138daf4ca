"""Small cases per operator, for which a kernel must compute the ATen fallback's bits.

They run at an operator's first call on a device, before it returns any result of Triton: an
untested compiler or GPU may round differently. The cases have sizes that are not multiples of a
block, ties, a row with NaN, a row with an infinity, and rarely used arguments. Each costs one
compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant.triton.tuning import choose as tuning
from torchquant.triton.tuning.choose import difference

ROWS, OUTPUTS, INPUTS, GROUP = 19, 37, 83, 32
Arguments = tuple[Any, ...]


def check(
    name: str, kernel: Callable[..., Any], aten: Callable[..., Any], device: torch.device
) -> str | None:
    """Run the cases of ``name`` with both; None if all bits agree, else the first difference.

    A case that the kernel leaves to ATen (``NotImplemented``) is skipped.
    """
    with tuning.paused():
        for arguments in samples(name, device):
            result = kernel(*arguments)
            if result is not NotImplemented:
                wrong = difference(result, aten(*arguments))
                if wrong is not None:
                    return wrong
    return None


# ---------------------------------------------------------------- tensors


class _Draw:
    """Draws tensors on the CPU, with a generator of its own, and moves them to the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator("cpu").manual_seed(1)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, odd: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        if odd and len(shape) > 1:
            x[1, 2], x[3, 5] = torch.nan, -torch.inf
            x[2, 0], x[2, 1], x[2, 2] = 0.5, -0.0, 2.5
        return x.to(dtype).to(self.device)

    def steps(self, *shape: int, step: float) -> Tensor:
        """Multiples of a power of two, whose products and sums are exact in any order."""
        x = torch.randint(-40, 41, shape, generator=self.generator, device="cpu")
        return (x.to(torch.float32) * step).to(self.device)

    def scales(self, *shape: int) -> Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (x * 0.1 + 0.01).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randint(low, high + 1, shape, generator=self.generator, device="cpu")
        return x.to(dtype).to(self.device)

    def int8(self, *shape: int) -> Tensor:
        return self.integers(-128, 127, *shape, dtype=torch.int8)

    def zero_points(self, *shape: int) -> Tensor:
        return self.integers(-9, 9, *shape, dtype=torch.int32)

    def packed(self, *outputs: int) -> Tensor:
        """Packed weights with these numbers of outputs, concatenated."""
        pack = torch.ops.torchquant_aten.pack_weight.default
        return torch.cat([pack(self.int8(n, INPUTS)) for n in outputs])


def samples(name: str, device: torch.device) -> Iterator[Arguments]:
    """Positional arguments of the operator ``name``, in the order of its schema (csrc/ops.cpp)."""
    draw = _Draw(device)
    for family in (_affine, _linear, _elementwise, _fake_quantize, _training):
        cases = family(draw).get(name)
        if cases is not None:
            for case in cases:
                yield case()
            return
    raise KeyError(name)


Cases = dict[str, Sequence[Callable[[], Arguments]]]


def _affine(d: _Draw) -> Cases:
    groups = -(-INPUTS // GROUP)
    return {
        "quantize": [
            lambda: (d.floats(ROWS, INPUTS), d.scales(ROWS), d.zero_points(ROWS), -128, 127, 0),
            lambda: (
                *(d.floats(ROWS, INPUTS, dtype=torch.bfloat16), d.scales(ROWS, groups), None),
                *(0, 255, None, GROUP, torch.uint8),
            ),
        ],
        "dequantize": [
            lambda: (d.int8(ROWS, INPUTS), d.scales(ROWS), d.zero_points(ROWS), 0),
            lambda: (d.int8(ROWS, INPUTS), d.scales(1), None, None, None, torch.bfloat16),
        ],
        "quantize_per_token": [
            lambda: (d.floats(ROWS, INPUTS), False),
            lambda: (d.floats(ROWS, INPUTS, dtype=torch.bfloat16), True),
        ],
        "quantize_rows": [
            lambda: (d.floats(ROWS, INPUTS), None, None, -128, 127, False),
            lambda: (d.floats(ROWS, INPUTS), d.scales(1), d.zero_points(1), -128, 127, False),
        ],
        "quantize_pack": [
            lambda: (d.floats(OUTPUTS, INPUTS, odd=False), None, -127, 127, True),
            lambda: (d.floats(OUTPUTS, INPUTS, odd=False), d.scales(OUTPUTS), -8, 7, True),
        ],
        "pack_weight": [lambda: (d.int8(OUTPUTS, INPUTS),)],
        "unpack_weight": [lambda: (d.packed(OUTPUTS), OUTPUTS, INPUTS)],
    }


def _linear(d: _Draw) -> Cases:
    bf16 = torch.bfloat16

    def dynamic(rows: int, dtype: torch.dtype, symmetric: bool, name: str) -> Arguments:
        weight = (d.packed(OUTPUTS), d.scales(OUTPUTS), d.zero_points(OUTPUTS))
        input = d.floats(rows, INPUTS, dtype=dtype)
        return (input, *weight, d.floats(OUTPUTS), OUTPUTS, symmetric, name)

    def static(input: Tensor, *rest: Any) -> Arguments:
        given = (input, d.scales(1), d.zero_points(1), d.packed(OUTPUTS), d.scales(OUTPUTS))
        return (*given, None, d.floats(OUTPUTS), OUTPUTS, *rest)

    return {
        "int8_mm": [lambda: (d.int8(ROWS, INPUTS), d.packed(OUTPUTS), OUTPUTS)],
        "linear_dynamic": [
            lambda: dynamic(ROWS, torch.float32, False, "gelu"),
            lambda: dynamic(4, bf16, True, "none"),  # the row with NaN and that with an infinity
        ],
        "linear_dynamic_split": [
            lambda: (
                *(d.floats(ROWS, INPUTS), d.packed(OUTPUTS, 16), d.scales(OUTPUTS + 16), None),
                *(d.floats(OUTPUTS + 16), [OUTPUTS, 16], True, ["silu", "none"], bf16),
            )
        ],
        "linear_static": [
            lambda: static(d.int8(ROWS, INPUTS), "tanh"),
            lambda: static(d.floats(ROWS, INPUTS), "none", torch.int8, d.scales(1), 3, -128, 127),
        ],
    }


def _elementwise(d: _Draw) -> Cases:
    shape = (ROWS, INPUTS)
    return {
        "activation": [
            lambda: (d.floats(*shape), "gelu"),
            lambda: (d.floats(*shape, dtype=torch.bfloat16), "silu", torch.float32),
        ],
        "gated_activation": [lambda: (d.floats(*shape), d.floats(*shape), "gelu_tanh")],
        "rms_norm": [
            lambda: (d.floats(*shape, dtype=torch.bfloat16), d.floats(INPUTS), 1e-6, True)
        ],
        "layer_norm": [
            lambda: (d.floats(*shape), d.floats(INPUTS), d.floats(INPUTS), 1e-5, d.floats(*shape))
        ],
        "attention": [
            lambda: (d.floats(1, 4, 9, 32, odd=False), *(d.floats(1, 2, 11, 32, odd=False),) * 2)
        ],
        "positive": [lambda: (d.floats(*shape),)],
        "mask_gradient": [
            lambda: (
                d.floats(*shape),
                d.integers(0, 255, -(-ROWS * INPUTS // 8), dtype=torch.uint8),
            )
        ],
    }


def _fake_quantize(d: _Draw) -> Cases:
    groups = -(-INPUTS // GROUP)

    def per_tensor() -> Arguments:
        return (d.floats(ROWS, INPUTS), d.scales(1), d.zero_points(1), -8, 7)

    def per_row() -> Arguments:
        x = d.floats(ROWS, INPUTS, dtype=torch.bfloat16)
        return (x, d.scales(ROWS), d.zero_points(ROWS), -128, 127, 0)

    def per_group() -> Arguments:
        return (d.floats(ROWS, INPUTS), d.scales(ROWS, groups), None, -8, 7, None, GROUP)

    every = [per_tensor, per_row, per_group]
    return {"fake_quantize": every, "fake_quantize_mask": every, "in_range": every}


def _training(d: _Draw) -> Cases:
    def learned(*layout: int, scales: int, offset: bool) -> Arguments:
        offsets = d.floats(scales) if offset else None
        return (d.floats(ROWS, INPUTS), d.scales(scales), offsets, -8, 7, 0.125, *layout)

    def backward(*layout: int, scales: int, zero_point: bool) -> Arguments:
        # The sums over many elements have no promised order.
        zero_points = d.zero_points(scales) if zero_point else None
        floats = (d.steps(ROWS, INPUTS, step=1.0), d.steps(ROWS, INPUTS, step=2.0**-4))
        scale = torch.full((scales,), 0.25, dtype=torch.float32, device=d.device)
        return (*floats, scale, zero_points, -8, 7, *layout)

    return {
        "fake_quantize_learned": [
            lambda: learned(scales=1, offset=True),
            lambda: learned(0, scales=ROWS, offset=False),
        ],
        "fake_quantize_learned_backward": [
            lambda: backward(scales=1, zero_point=True),
            lambda: backward(0, scales=ROWS, zero_point=False),
        ],
        "minmax": [
            lambda: (d.floats(ROWS, INPUTS),),
            lambda: (d.floats(ROWS, INPUTS), 0),
            lambda: (d.floats(ROWS, INPUTS), None, GROUP),
        ],
        "mm_fake_quantized": [
            lambda: (
                *(d.steps(ROWS, OUTPUTS, step=1.0), d.steps(OUTPUTS, INPUTS, step=2.0**-4)),
                torch.full((OUTPUTS,), 0.25, dtype=torch.float32, device=d.device),
                *(None, -8, 7),
            )
        ],
        "qat_linear": [
            lambda: (
                *(d.floats(ROWS, INPUTS), d.floats(OUTPUTS, INPUTS, odd=False), d.floats(OUTPUTS)),
                *(None, None, None, -128, 127, True, None, -8, 7, True, "relu"),
            )
        ],
    }
