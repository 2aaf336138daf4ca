"""Arguments of qat_linear_intx in all its modes, and the expected results."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import floats, leaf, positive
from torchquant import functional, ops, quant_range


class Sizes(NamedTuple):
    """Of a layer's call: M, N, K, and the inputs that share a scale."""

    rows: int
    outputs: int
    inputs: int
    group_size: int | None


SIZES = (
    Sizes(1, 1, 1, 1),
    Sizes(5, 17, 96, 32),
    Sizes(33, 48, 128, 64),
    Sizes(4, 16, 65, 32),
    Sizes(9, 20, 70, 33),
    Sizes(3, 31, 40, None),
    Sizes(2, 5, 7, 1),
    Sizes(18, 33, 300, 128),
)
BITS = range(2, 9)

CASES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "symmetric_rows": {"symmetric": True},
    "weight_zero_points": {"weight_symmetric": False},
    "learned_weights": {"learned": True},
    "float_activations": {"activation_bits": None},
    "float_activations_learned": {"activation_bits": None, "learned": True},
    "float_activations_zero_points": {"activation_bits": None, "weight_symmetric": False},
}


def arguments(
    sizes: Sizes,
    *,
    bits: int = 4,
    learned: bool = False,
    symmetric: bool = False,
    activation_bits: int | None = 8,
    weight_symmetric: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of qat_linear_intx, none of which requires a gradient yet."""
    rows, outputs, inputs, group_size = sizes
    qmin, qmax = quant_range(bits)
    values: dict[str, Any] = {
        "input": floats(rows, inputs, seed=seed, dtype=dtype),
        "weight": torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)),
        "bias": floats(outputs, seed=seed + 2) if bias else None,
        "group_size": group_size,
        "weight_qmin": qmin + (bits == 8 and weight_symmetric and not learned),
        "weight_qmax": qmax,
        "weight_symmetric": weight_symmetric,
        "activation_symmetric": symmetric,
        "activation_bits": activation_bits,
    }
    if learned:
        shape = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
        values["weight_scale"] = positive(*shape, seed=seed) + 1.0 / qmax
    return values


def expected(values: dict[str, Any]) -> Tensor:
    return functional.qat_linear_intx(**values)


def gradients(values: dict[str, Any], names: tuple[str, ...], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: leaf(values[name]) for name in names}
    ops.qat_linear_intx(**{**values, **leaves}).backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items()}


def oracle(values: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    given = values.get("weight_scale")
    w = functional.quantize_pack_intx(
        values["weight"],
        given,
        bits=8,
        group_size=values["group_size"],
        qmin=values["weight_qmin"],
        qmax=values["weight_qmax"],
        symmetric=values["weight_symmetric"],
    )
    return functional.qat_linear_intx_backward(
        grad.double(),
        expected(values),
        values["input"],
        values["weight"],
        w,
        group_size=values["group_size"],
        weight_range=(values["weight_qmin"], values["weight_qmax"]),
        weight_given=given is not None,
        activation_bits=values["activation_bits"],
        activation_symmetric=values["activation_symmetric"],
        activation=values.get("activation", "none"),
        weight_grad_factor=values.get("weight_grad_factor", 0.0),
    )._asdict()
