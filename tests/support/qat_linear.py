"""Arguments of qat_linear in all its modes, and the expected results."""

from typing import Any

import torch
from torch import Tensor

from support import (
    Shape,
    floats,
    leaf,
    positive,
)
from torchquant import functional, ops, quant_range
from torchquant.functional.qat import Quantized

SIZES = (Shape(1, 1, 1), Shape(5, 17, 63), Shape(33, 48, 128), Shape(4, 16, 65), Shape(40, 31, 300))
BITS = range(2, 9)


def ranges(bits: int) -> list[tuple[int, int]]:
    wide = quant_range(bits)
    return [wide, quant_range(bits, narrow_range=True)]


def packed_channels(result: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return ops.pack_weight(result.q), result.scale, result.zero_point


def arguments(
    shape: Shape,
    *,
    bits: int = 8,
    static: bool = False,
    learned: bool = False,
    symmetric: bool = False,
    weight_symmetric: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of qat_linear, none of which requires a gradient yet."""
    rows, outputs, inputs = shape
    qmin, qmax = quant_range(bits)
    values: dict[str, Any] = {
        "input": floats(rows, inputs, seed=seed, dtype=dtype),
        "weight": torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)),
        "bias": floats(outputs, seed=seed + 2) if bias else None,
        "input_qmin": qmin,
        "input_qmax": qmax,
        "input_symmetric": symmetric,
        "weight_qmin": qmin + (bits == 8 and weight_symmetric and not learned),
        "weight_qmax": qmax,
        "weight_symmetric": weight_symmetric,
    }
    if static:
        values["input_scale"] = torch.tensor([2.0 / qmax])
        values["input_zero_point"] = torch.tensor([0 if symmetric else -1], dtype=torch.int32)
    if learned:
        values["weight_scale"] = positive(outputs, seed=seed) + 1.0 / qmax
    return values


def expected(values: dict[str, Any], **changes: Any) -> Tensor:
    return functional.qat_linear(**values, **changes)


CASES = {
    "dynamic": {},
    "dynamic_symmetric": {"symmetric": True},
    "dynamic_weight_zero_points": {"weight_symmetric": False},
    "dynamic_learned_weights": {"learned": True},
    "static": {"static": True},
    "static_symmetric_learned": {"static": True, "symmetric": True, "learned": True},
    "static_weight_zero_points": {"static": True, "weight_symmetric": False},
}


def gradients(values: dict[str, Any], names: tuple[str, ...], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: leaf(values[name]) for name in names}
    ops.qat_linear(**{**values, **leaves}).backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items()}


def oracle(values: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    scale, given_scale = values.get("input_scale"), values.get("weight_scale")
    x = functional.quantize_rows(
        values["input"],
        scale,
        values.get("input_zero_point"),
        qmin=values["input_qmin"],
        qmax=values["input_qmax"],
        symmetric=values["input_symmetric"],
    )
    w = functional.quantize_pack(
        values["weight"],
        given_scale,
        qmin=values["weight_qmin"],
        qmax=values["weight_qmax"],
        symmetric=values["weight_symmetric"],
    )
    return functional.qat_linear_backward(
        grad.double(),
        expected(values),
        values["input"],
        values["weight"],
        x,
        w,
        input_range=(values["input_qmin"], values["input_qmax"]),
        weight_range=(values["weight_qmin"], values["weight_qmax"]),
        static=scale is not None,
        weight_given=given_scale is not None,
        activation=values.get("activation", "none"),
        input_grad_factor=values.get("input_grad_factor", 0.0),
        weight_grad_factor=values.get("weight_grad_factor", 0.0),
    )._asdict()


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: object) -> None:
    """Within ``tolerance`` of the largest value."""
    assert got.shape == want.shape, what
    error = (got.double() - want).abs().max() if got.numel() else torch.zeros(())
    assert float(error) <= tolerance * max(1e-30, float(want.abs().max())), what
