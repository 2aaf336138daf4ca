"""qat_linear_intx: the deployed bits forward, the formulas backward."""

import itertools
from typing import Any

import pytest
import torch
from support import (
    FLOATS,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    leaf,
    sprinkle,
)
from support.qat_intx import BITS, CASES, SIZES, Sizes, arguments, expected, gradients, oracle
from support.qat_linear import assert_close
from torch import Tensor

from torchquant import ops

ALL = ("input", "weight", "bias")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", BITS)
def test_forward_with_and_without_gradients(bits: int, case: str) -> None:
    for number, sizes in enumerate(SIZES):
        values = arguments(sizes, bits=bits, **CASES[case])
        values["input"] = sprinkle(values["input"], NOT_FINITE, seed=5, share=0.02)
        values["activation"] = ("none", "relu")[number % 2]
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear_intx(**v), want, (1, 2), what=sizes)
        values["weight"].requires_grad_()
        check_everywhere(
            lambda v=values: ops.qat_linear_intx(**v).detach(), want, (1, 2), what=sizes
        )


@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_deployed_layer(bits: int) -> None:
    """The converted weight in the operator of the converted layer, row by row and in batches."""
    for sizes, symmetric in itertools.product(SIZES, (True, False)):
        values = arguments(sizes, bits=bits, weight_symmetric=symmetric)
        y = ops.qat_linear_intx(**values)
        packed, *_ = ops.quantize_pack_intx(
            values["weight"],
            bits=bits,
            group_size=sizes.group_size,
            qmin=values["weight_qmin"],
            symmetric=symmetric,
        )

        def deployed(
            x: Tensor,
            packed: Tensor = packed,
            bias: Tensor = values["bias"],
            s: Sizes = sizes,
            zeros: bool = not symmetric,
        ) -> Tensor:
            return ops.linear_dynamic_intx(
                x,
                packed,
                bias,
                out_features=s.outputs,
                bits=bits,
                group_size=s.group_size,
                has_zero_point=zeros,
                symmetric=False,
            )

        assert_same_bits(y, deployed(values["input"]))
        for row, want in zip(values["input"], y, strict=True):
            assert_same_bits(deployed(row), want)


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
def test_bits_of_activations(activation_bits: int) -> None:
    for symmetric in (True, False):
        values = arguments(SIZES[1], symmetric=symmetric)
        values["activation_bits"] = activation_bits
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear_intx(**v), want)
        values["weight"].requires_grad_()
        check_everywhere(lambda v=values: ops.qat_linear_intx(**v).detach(), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_type(dtype: torch.dtype) -> None:
    for output_dtype, case in itertools.product(FLOATS, CASES):
        values = arguments(SIZES[4], dtype=dtype, **CASES[case])
        values |= {name: values[name].to(dtype) for name in ("weight", "bias")}
        values["output_dtype"] = output_dtype
        check_everywhere(lambda v=values: ops.qat_linear_intx(**v), expected(values))
        grad = torch.randn(9, 20).to(output_dtype)
        want = oracle(values, grad)
        for name, got in gradients(values, ALL, grad).items():
            assert got.dtype == dtype
            tolerance = 3e-6 if {dtype, output_dtype} == {torch.float32} else 3e-2
            assert_close(got, want[name], tolerance, (case, output_dtype, name))


def test_no_rows_and_one_dimension() -> None:
    for shape in ((0, 8), (2, 0, 8), (8,), (2, 3, 8)):
        values = arguments(Sizes(1, 5, 8, 4))
        values["input"] = floats(*shape).requires_grad_()
        values["weight"].requires_grad_()
        y = ops.qat_linear_intx(**values)
        assert y.shape == (*shape[:-1], 5)
        y.sum().backward()
        assert values["input"].grad.shape == shape
        assert values["weight"].grad.shape == (5, 8)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_straight_through_estimator(case: str, activation: str) -> None:
    for sizes, bits in itertools.product(SIZES, (8, 4, 2)):
        values = arguments(sizes, bits=bits, **CASES[case])
        values["activation"] = activation
        grad = torch.randn(sizes.rows, sizes.outputs)
        want = oracle(values, grad)
        for name, got in gradients(values, ALL, grad).items():
            assert_close(got, want[name], 3e-6, (case, sizes, bits, name))


class Rounded(torch.autograd.Function):
    """Straight-through rounding, as plain torch models have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_a_fake_quantized_layer(symmetric: bool) -> None:
    """Autograd through fake quantization in plain torch, scales held constant."""
    for sizes, bits in itertools.product(SIZES, (2, 4, 8)):
        values = arguments(sizes, bits=bits, weight_symmetric=symmetric)
        qmin, qmax = values["weight_qmin"], values["weight_qmax"]
        leaves = {name: leaf(values[name].double()) for name in ALL}
        size = sizes.group_size or sizes.inputs
        parts = []
        for group in leaves["weight"].split(size, 1):
            low = group.detach().amin(1, keepdim=True).clamp(max=0)
            high = group.detach().amax(1, keepdim=True).clamp(min=0)
            if symmetric:
                scale, zero = torch.maximum(high, -low) / qmax, torch.zeros(())
            else:
                scale = (high - low) / (qmax - qmin)
                zero = (qmin - low / scale).round().clamp(qmin, qmax)
            steps = Rounded.apply(group / scale)
            parts.append(steps.clamp(qmin - zero, qmax - zero) * scale)
        x = leaves["input"]
        low = x.detach().amin(1, keepdim=True).clamp(max=0)
        high = x.detach().amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        y = (Rounded.apply(x / scale) * scale) @ torch.cat(parts, 1).t() + leaves["bias"]
        grad = torch.randn(sizes.rows, sizes.outputs)
        y.backward(grad.double())
        for name, got in gradients(values, ALL, grad).items():
            # A weight at the end of its range may lie half a step beyond it: zero points round.
            theirs = leaves[name].grad
            if name == "weight" and not symmetric:
                theirs = torch.where(theirs == 0, got.double(), theirs)
            assert_close(got, theirs, 1e-4, (sizes, bits, name))
        assert_close(ops.qat_linear_intx(**values), y.detach(), 1e-4, sizes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_learned_scales(bits: int) -> None:
    for sizes in SIZES:
        values = arguments(sizes, bits=bits, learned=True)
        values["weight_grad_factor"] = 0.3
        grad = torch.randn(sizes.rows, sizes.outputs)
        want = oracle(values, grad)
        for name, got in gradients(values, (*ALL, "weight_scale"), grad).items():
            assert_close(got, want[name], 1e-5, (sizes, name))
        only = gradients(values, ("weight_scale",), grad)["weight_scale"]
        assert_close(only, want["weight_scale"], 1e-5, sizes)


@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("bias",), ("input", "bias")])
def test_only_what_is_asked_for(wanted: tuple[str, ...]) -> None:
    for case in CASES:
        values = arguments(SIZES[4], **CASES[case])
        grad = torch.randn(9, 20)
        want = gradients(values, ALL, grad)
        for name, got in gradients(values, wanted, grad).items():
            assert_same_bits(got, want[name])


def test_a_gradient_of_any_layout() -> None:
    values = arguments(SIZES[4])
    grad = torch.randn(9, 20)
    want = gradients(values, ALL, grad)
    for layout in LAYOUTS:
        got = gradients(values, ALL, in_layout(grad, layout))
        for name in want:
            assert_close(got[name], want[name].double(), 1e-6, (layout, name))


def test_a_weight_with_nan_gives_nan_and_keeps_the_gradient_of_the_weight() -> None:
    values = arguments(Sizes(4, 17, 70, 32))
    values["weight"][3, 40] = NAN
    y = ops.qat_linear_intx(**values)
    assert bool(y[:, 3].isnan().all()) and int(y.isnan().sum()) == 4
    got = gradients(values, ("input", "weight"), torch.ones(4, 17))
    assert got["input"].isnan().any(0).tolist() == [32 <= k < 64 for k in range(70)]
    assert not bool(got["weight"].isnan().any())


def test_opcheck() -> None:
    pack = torch.ops.torchquant.quantize_pack_intx.default
    op = torch.ops.torchquant.qat_linear_intx.default
    w = floats(17, 20)
    torch.library.opcheck(pack, (w, None, 4, 8, -8, 7, True))
    torch.library.opcheck(pack, (w, None, 3, None, -4, 3, False))
    for case, grad in itertools.product(CASES, (False, True)):
        values = arguments(Sizes(4, 17, 20, 8), **CASES[case])
        x, weight, bias = (values[name].requires_grad_(grad) for name in ALL)
        torch.library.opcheck(
            op,
            (
                x,
                weight,
                bias,
                values.get("weight_scale"),
                8,
                -8,
                7,
                values["weight_symmetric"],
                8,
                values["activation_symmetric"],
                "relu" if grad else "none",
            ),
        )


def test_no_gradient_of_the_gradient() -> None:
    values = arguments(SIZES[1])
    weight = values["weight"].requires_grad_()
    y = ops.qat_linear_intx(**values)
    with pytest.raises(NotImplementedError, match="qat_linear_intx: no gradient of the gradient"):
        torch.autograd.grad(y.sum(), weight, create_graph=True)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer_input": (
        {"input": torch.ones(2, 8, dtype=torch.int8)},
        TypeError,
        "qat_linear_intx: input must be float32, bfloat16 or float16, got int8",
    ),
    "features": (
        {"input": torch.ones(2, 9)},
        ValueError,
        "qat_linear_intx: input must be .* with in_features = 8, got \\[2, 9\\]",
    ),
    "weight": ({"weight": torch.ones(8)}, ValueError, "qat_linear_intx: weight must have shape"),
    "bias": ({"bias": torch.ones(3)}, ValueError, "qat_linear_intx: bias must have shape \\[5\\]"),
    "activation": (
        {"activation": "gelu"},
        ValueError,
        "qat_linear_intx: activation must be none or relu, got 'gelu'",
    ),
    "group_size": (
        {"group_size": 9},
        ValueError,
        "qat_linear_intx: group_size must be None .* between 1 and in_features = 8, got 9",
    ),
    "activation_bits": (
        {"activation_bits": 9},
        ValueError,
        "qat_linear_intx: activation_bits must be from 2 to 8, got 9",
    ),
    "given_asymmetric": (
        {"weight_scale": torch.ones(5, 2), "weight_symmetric": False},
        ValueError,
        "qat_linear_intx: symmetric must be True with weight_scale, got False",
    ),
    "weight_range": (
        {"weight_qmin": -200},
        ValueError,
        "qat_linear_intx: weight_qmin < weight_qmax must lie within -128 .. 127, got -200 and 7",
    ),
    "weight_scale": (
        {"weight_scale": torch.ones(5)},
        ValueError,
        "qat_linear_intx: weight_scale must be float32 \\[5, 2\\], got float32 \\[5\\]",
    ),
    "output_dtype": (
        {"output_dtype": torch.int8},
        TypeError,
        "qat_linear_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, error, message = ERRORS[name]
    for requires_grad in (False, True):
        values = arguments(Sizes(2, 5, 8, 4))
        values["weight"].requires_grad_(requires_grad)
        with pytest.raises(error, match=message):
            ops.qat_linear_intx(**{**values, **changes})
