"""qat_linear: the deployed bits forward, the formulas backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FLOATS,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    sprinkle,
)
from support.qat_linear import (
    CASES,
    SIZES,
    arguments,
    assert_close,
    expected,
    gradients,
    oracle,
)

from torchquant import ops


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", CASES)
def test_forward_with_and_without_gradients(case: str, activation: str) -> None:
    for shape, bits in itertools.product(SIZES, (8, 4, 2)):
        values = arguments(shape, bits=bits, **CASES[case])
        values["input"] = sprinkle(values["input"], NOT_FINITE, seed=5)
        values["activation"] = activation
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear(**v), want, counts=(1, 2), what=shape)
        values["weight"].requires_grad_()
        check_everywhere(
            lambda v=values: ops.qat_linear(**v).detach(), want, counts=(1, 2), what=shape
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_in_every_float_type(dtype: torch.dtype) -> None:
    for output_dtype, case in itertools.product((None, *FLOATS), ("dynamic", "static")):
        values = arguments(Shape(9, 20, 70), dtype=dtype, **CASES[case])
        values["output_dtype"] = output_dtype
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear(**v), want)
        values["weight"].requires_grad_()
        assert_same_bits(ops.qat_linear(**values).detach(), want)


def test_forward_of_no_rows_and_of_one_dimension() -> None:
    for shape in ((0, 8), (2, 0, 8), (8,), (2, 3, 8)):
        for case in ("dynamic", "static"):
            values = arguments(Shape(1, 5, 8), **CASES[case])
            values["input"] = floats(*shape).requires_grad_()
            y = ops.qat_linear(**values)
            assert y.shape == (*shape[:-1], 5)
            y.sum().backward()
            assert values["input"].grad.shape == shape


@pytest.mark.parametrize("offset", [0.0, 0.7, -3.0, 1e9, NAN])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_forward_with_an_offset(bits: int, offset: float) -> None:
    for shape in SIZES:
        values = arguments(shape, bits=bits, static=True)
        values |= {"input_zero_point": None, "input_offset": torch.tensor([offset])}
        values["input"] = sprinkle(values["input"], NOT_FINITE, seed=5)
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear(**v), want, what=shape)
        values["input_offset"].requires_grad_()
        values["input_grad_factor"] = 0.1
        check_everywhere(lambda v=values: ops.qat_linear(**v).detach(), want, what=shape)


@pytest.mark.parametrize("qmax", [1, 15, 127, 200, 255])
def test_forward_with_unsigned_activations(qmax: int) -> None:
    """Integers above 127 are stored 128 lower, with their zero point."""
    for shape in SIZES:
        values = arguments(shape, static=True)
        values |= {"input_zero_point": None, "input_qmin": 0, "input_qmax": qmax}
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear(**v), want, what=shape)
        exact = values["input"].clamp(0, qmax * float(values["input_scale"]))
        plain = torch.nn.functional.linear(exact, values["weight"], values["bias"])
        error = (want - plain).norm() / plain.norm()
        assert float(error) < 0.5 / qmax**0.5 + 0.02, shape


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_straight_through_estimator(case: str, activation: str) -> None:
    names = ("input", "weight", "bias")
    for shape, bits in itertools.product(SIZES, (8, 3)):
        values = arguments(shape, bits=bits, **CASES[case])
        values["activation"] = activation
        grad = torch.randn(shape.rows, shape.outputs)
        want = oracle(values, grad)
        for name, got in gradients(values, names, grad).items():
            assert_close(got, want[name], 3e-6, (case, shape, bits, name))


@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("bias",), ("input", "bias")])
def test_only_what_is_asked_for(wanted: tuple[str, ...]) -> None:
    for case in CASES:
        values = arguments(Shape(9, 20, 70), **CASES[case])
        grad = torch.randn(9, 20)
        want = gradients(values, ("input", "weight", "bias"), grad)
        for name, got in gradients(values, wanted, grad).items():
            assert_same_bits(got, want[name])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: torch.dtype) -> None:
    for case, output_dtype in itertools.product(("dynamic", "static"), FLOATS):
        values = arguments(Shape(9, 20, 70), dtype=dtype, **CASES[case])
        values["weight"] = values["weight"].to(dtype)
        values["bias"] = values["bias"].to(dtype)
        values["output_dtype"] = output_dtype
        grad = torch.randn(9, 20).to(output_dtype)
        want = oracle(values, grad)
        for name, got in gradients(values, ("input", "weight", "bias"), grad).items():
            assert got.dtype == dtype
            tolerance = 3e-6 if {dtype, output_dtype} == {torch.float32} else 3e-2
            assert_close(got, want[name], tolerance, (case, output_dtype, name))


def test_a_gradient_of_any_layout() -> None:
    values = arguments(Shape(6, 20, 70))
    grad = torch.randn(6, 20)
    want = gradients(values, ("input", "weight", "bias"), grad)
    for layout in LAYOUTS:
        got = gradients(values, ("input", "weight", "bias"), in_layout(grad, layout))
        for name in want:
            assert_close(got[name], want[name].double(), 1e-6, (layout, name))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    shape = Shape(*(data.draw(st.integers(1, most)) for most in (40, 70, 200)))
    case = data.draw(st.sampled_from(sorted(CASES)))
    bits, dtype = data.draw(st.integers(2, 8)), data.draw(st.sampled_from(FLOATS))
    values = arguments(
        shape,
        bits=bits,
        dtype=dtype,
        bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
        **CASES[case],
    )
    values["activation"] = data.draw(st.sampled_from(["none", "relu"]))
    layout = data.draw(st.sampled_from(LAYOUTS))
    values["input"] = in_layout(values["input"], layout)
    want = expected(values)
    assert_same_bits(ops.qat_linear(**values), want, (shape, case, bits, dtype, layout))
    grad = torch.randn(shape.rows, shape.outputs).to(dtype)
    names = ("input", "weight") if values["bias"] is None else ("input", "weight", "bias")
    wanted = oracle(values, grad)
    tolerance = 3e-6 if dtype == torch.float32 else 3e-2
    for name, got in gradients(values, names, grad).items():
        assert_close(got, wanted[name], tolerance, (shape, case, bits, name))
