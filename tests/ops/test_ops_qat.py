"""quantize_rows, quantize_pack, qat_linear: the deployed bits forward, the formulas backward."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DENORMAL,
    FLOATS,
    FLT_MAX,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SHAPES,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    positive,
    sprinkle,
)
from torch import Tensor

from torchquant import PerAxis, functional, ops, quant_range
from torchquant.functional.qat import Quantized

SIZES = (Shape(1, 1, 1), Shape(5, 17, 63), Shape(33, 48, 128), Shape(4, 16, 65), Shape(40, 31, 300))
BITS = range(2, 9)


def ranges(bits: int) -> list[tuple[int, int]]:
    wide = quant_range(bits)
    return [wide, quant_range(bits, narrow_range=True)]


def packed_channels(result: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return ops.pack_weight(result.q), result.scale, result.zero_point


# ---------------------------------------------------------------- quantize_rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_with_their_own_range(bits: int, dtype: torch.dtype) -> None:
    for rows, _, inputs in SIZES:
        x = sprinkle(floats(rows, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=1)
        for (qmin, qmax), symmetric in itertools.product(ranges(bits), (True, False)):
            options: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "symmetric": symmetric}
            check_everywhere(
                lambda x=x, o=options: ops.quantize_rows(x, **o),
                tuple(functional.quantize_rows(x, **options)),
                what=(x.shape, options),
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rows_with_one_scale(bits: int, dtype: torch.dtype) -> None:
    for rows, _, inputs in SIZES:
        x = sprinkle(floats(rows, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=2)
        for qmin, qmax in ranges(bits):
            for scale, zero in ((0.02, None), (0.5, qmin), (3.0, qmax), (1e-44, 0)):
                point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
                arguments = (x, torch.tensor([scale]), point)
                check_everywhere(
                    lambda a=arguments, low=qmin, high=qmax: ops.quantize_rows(
                        *a, qmin=low, qmax=high
                    ),
                    tuple(functional.quantize_rows(*arguments, qmin=qmin, qmax=qmax)),
                    what=(x.shape, qmin, qmax, scale, zero),
                )


def test_eight_bits_are_quantize_per_token() -> None:
    x = sprinkle(floats(20, 100), NOT_FINITE, seed=0)
    for symmetric in (True, False):
        qmin = -127 if symmetric else -128
        own = ops.quantize_rows(x, qmin=qmin, symmetric=symmetric)
        for got, want in zip(own, ops.quantize_per_token(x, symmetric=symmetric), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_any_layout(layout: str) -> None:
    x = floats(6, 70)
    for got, want in zip(
        ops.quantize_rows(in_layout(x, layout)), ops.quantize_rows(x), strict=True
    ):
        assert_same_bits(got, want)


def test_rows_without_elements() -> None:
    for shape in ((0, 8), (3, 0), (2, 0, 5)):
        q, scale, zero = ops.quantize_rows(torch.empty(shape))
        assert q.shape == shape
        assert scale.shape == zero.shape == (*shape[:-1], 1)
    assert torch.equal(ops.quantize_rows(torch.empty(3, 0))[1], torch.ones(3, 1))


@pytest.mark.parametrize(
    "call",
    [
        ops.quantize_rows,
        ops.quantize_pack,
        functional.quantize_rows,
        functional.quantize_pack,
        lambda x, **o: torch.ops.torchquant_aten.quantize_rows(x, None, None, *o.values()),
        lambda x, **o: torch.ops.torchquant_aten.quantize_pack(x, None, *o.values()),
    ],
)
def test_a_symmetric_range_of_its_own_reaches_below_zero(call: Callable[..., Any]) -> None:
    x = torch.tensor([[-1.0, 1.0]])
    for qmin, qmax in ((0, 127), (-126, 127), (-1, 7)):
        with pytest.raises(ValueError, match=f"qmin must be at most -qmax = -{qmax} .* got {qmin}"):
            call(x, qmin=qmin, qmax=qmax, symmetric=True)
        call(x, qmin=qmin, qmax=qmax, symmetric=False)


# ---------------------------------------------------------------- quantize_pack


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_weights_with_their_own_range(bits: int, dtype: torch.dtype) -> None:
    for _, outputs, inputs in SIZES:
        w = sprinkle(floats(outputs, inputs, seed=bits, dtype=dtype), NOT_FINITE, seed=3)
        for (qmin, qmax), symmetric in itertools.product(ranges(bits), (True, False)):
            options: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "symmetric": symmetric}
            check_everywhere(
                lambda w=w, o=options: ops.quantize_pack(w, **o),
                packed_channels(functional.quantize_pack(w, **options)),
                counts=(1, 2),
                what=(w.shape, options),
            )


@pytest.mark.parametrize("bits", BITS)
def test_weights_with_given_scales(bits: int) -> None:
    for _, outputs, inputs in SIZES:
        w = sprinkle(floats(outputs, inputs, seed=bits), NOT_FINITE, seed=4, share=0.1)
        scale = positive(outputs, seed=bits)
        scale[0] = 1e-44
        for qmin, qmax in ranges(bits):
            for given_scale in (scale, scale[-1:]):
                check_everywhere(
                    lambda w=w, s=given_scale, low=qmin, high=qmax: ops.quantize_pack(
                        w, s, qmin=low, qmax=high
                    ),
                    packed_channels(functional.quantize_pack(w, given_scale, qmin=qmin, qmax=qmax)),
                    what=(w.shape, qmin, qmax),
                )


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_of_every_shape(kind: str) -> None:
    for _, outputs, inputs in SHAPES[kind]:
        w = floats(outputs, inputs, seed=outputs)
        want = packed_channels(functional.quantize_pack(w, qmin=-128, symmetric=False))
        check_everywhere(
            lambda w=w: ops.quantize_pack(w, qmin=-128, symmetric=False), want, what=w.shape
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(layout: str) -> None:
    w = floats(20, 70)
    for got, want in zip(
        ops.quantize_pack(in_layout(w, layout)), ops.quantize_pack(w), strict=True
    ):
        assert_same_bits(got, want)


def test_weights_of_any_magnitude() -> None:
    rows = [[0.0, 0.0], [-0.0, 0.0], [DENORMAL, 0.0], [FLT_MAX, -FLT_MAX], [FLT_MAX, 1.0]]
    rows += [[1.0, 1.0], [-1.0, -2.0], [2.0**-126, -(2.0**-140)], [NAN, 1.0], [1.0, -INF]]
    w = torch.tensor(rows)
    for bits, symmetric in itertools.product(BITS, (True, False)):
        qmin, qmax = quant_range(bits)
        want = functional.quantize_pack(w, qmin=qmin, qmax=qmax, symmetric=symmetric)
        check_everywhere(
            lambda low=qmin, high=qmax, s=symmetric: ops.quantize_pack(
                w, qmin=low, qmax=high, symmetric=s
            ),
            packed_channels(want),
        )


# ---------------------------------------------------------------- qat_linear: forward


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
    """Beyond 127 the integers are stored 128 lower, and so is their zero point."""
    for shape in SIZES:
        values = arguments(shape, static=True)
        values |= {"input_zero_point": None, "input_qmin": 0, "input_qmax": qmax}
        want = expected(values)
        check_everywhere(lambda v=values: ops.qat_linear(**v), want, what=shape)
        exact = values["input"].clamp(0, qmax * float(values["input_scale"]))
        plain = torch.nn.functional.linear(exact, values["weight"], values["bias"])
        error = (want - plain).norm() / plain.norm()
        assert float(error) < 0.5 / qmax**0.5 + 0.02, shape


# ---------------------------------------------------------------- qat_linear: backward


def gradients(values: dict[str, Any], names: tuple[str, ...], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: values[name].detach().clone().requires_grad_() for name in names}
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


# ---------------------------------------------------------------- mm_fake_quantized


@pytest.mark.parametrize("layout", LAYOUTS)
def test_product_with_a_fake_quantized_weight(layout: str) -> None:
    # The last shape takes several blocks of scratch memory.
    for (rows, outputs, inputs), zero in itertools.product(
        (*SIZES, Shape(3, 100, 16384)), (False, True)
    ):
        weight, grad = in_layout(torch.randn(outputs, inputs), layout), torch.randn(rows, outputs)
        scale = torch.rand(outputs) * 0.1 + 0.01
        point = torch.randint(-8, 8, (outputs,), dtype=torch.int32) if zero else None
        got = ops.mm_fake_quantized(in_layout(grad, layout), weight, scale, point, qmin=-8, qmax=7)
        quantized = functional.fake_quantize(
            weight.contiguous(), scale, point, qmin=-8, qmax=7, granularity=PerAxis(0)
        )
        assert_close(got, grad.double() @ quantized.double(), 1e-5, (layout, rows, outputs))


def test_product_of_nothing_and_of_the_wrong_things() -> None:
    weight, scale = torch.randn(4, 8), torch.ones(4)
    assert ops.mm_fake_quantized(torch.empty(0, 4), weight, scale).shape == (0, 8)
    for grad, other, message in (
        (torch.ones(2, 5), scale, "mm_fake_quantized: grad must have shape"),
        (torch.ones(2, 4), torch.ones(3), "mm_fake_quantized: scale must be float32"),
        (torch.ones(2, 4), torch.zeros(4), "mm_fake_quantized: scale must be finite"),
        (torch.ones(2, 4, dtype=torch.bfloat16), scale, "mm_fake_quantized: grad must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.mm_fake_quantized(grad, weight, other)


def test_a_weight_with_nan_gives_gradients_of_nan() -> None:
    values = arguments(Shape(4, 17, 20))
    values["weight"][3, 2] = NAN
    got = gradients(values, ("input", "weight"), torch.ones(4, 17))
    assert bool(got["input"].isnan().all())
    assert not bool(got["weight"].isnan().any())


# ---------------------------------------------------------------- what is saved


def saved_bytes(call: Any, but: tuple[Tensor, ...] = ()) -> int:
    """Bytes that autograd keeps for backward, beside those of the parameters ``but``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(seen.values())


@pytest.mark.parametrize("case", ["dynamic", "static", "dynamic_learned_weights"])
def test_saved_activations_are_int8(case: str) -> None:
    values = arguments(Shape(512, 256, 256), **CASES[case])
    values["activation"] = "relu"
    leaves = {name: values[name].requires_grad_() for name in ("input", "weight", "bias")}
    ours = saved_bytes(lambda: ops.qat_linear(**values), tuple(leaves.values()))
    x, w, b = leaves.values()
    float_bytes = saved_bytes(
        lambda: torch.relu(torch.nn.functional.linear(x.clone(), w, b)), (w, b)
    )
    assert ours <= 0.35 * float_bytes


# ---------------------------------------------------------------- contracts with torch


def test_opcheck() -> None:
    x, w = floats(4, 20), floats(17, 20)
    scale, zero = torch.tensor([0.1]), torch.tensor([1], dtype=torch.int32)
    rows = torch.ops.torchquant.quantize_rows.default
    for sample in ((x, None, None, -128, 127, False), (x, scale, zero, -8, 7, True)):
        torch.library.opcheck(rows, sample)
    pack = torch.ops.torchquant.quantize_pack.default
    for sample in ((w, None, -127, 127, True), (w, positive(17), -8, 7, True)):
        torch.library.opcheck(pack, sample)
    product = torch.ops.torchquant.mm_fake_quantized.default
    torch.library.opcheck(product, (torch.randn(4, 17), w, positive(17), None, -127, 127))
    op = torch.ops.torchquant.qat_linear.default
    for case, grad in itertools.product(CASES, (False, True)):
        values = arguments(Shape(4, 17, 20), **CASES[case])
        tensors = {name: values[name].requires_grad_(grad) for name in ("input", "weight", "bias")}
        for activation in ("none", "relu"):
            torch.library.opcheck(
                op,
                (
                    *tensors.values(),
                    values.get("input_scale"),
                    values.get("input_zero_point"),
                    None,
                    values["input_qmin"],
                    values["input_qmax"],
                    values["input_symmetric"],
                    values.get("weight_scale"),
                    values["weight_qmin"],
                    values["weight_qmax"],
                    values["weight_symmetric"],
                    activation,
                ),
            )


def test_no_gradient_of_the_gradient() -> None:
    values = arguments(Shape(4, 17, 20))
    weight = values["weight"].requires_grad_()
    y = ops.qat_linear(**values)
    with pytest.raises(NotImplementedError, match="qat_linear: no gradient of the gradient"):
        torch.autograd.grad(y.sum(), weight, create_graph=True)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer_input": (
        {"input": torch.ones(2, 8, dtype=torch.int8)},
        TypeError,
        "qat_linear: input must be float32, bfloat16 or float16, got int8",
    ),
    "features": (
        {"input": torch.ones(2, 9)},
        ValueError,
        "qat_linear: input must be \\[..., in_features\\] with in_features = 8, got \\[2, 9\\]",
    ),
    "weight": ({"weight": torch.ones(8)}, ValueError, "qat_linear: weight must have shape"),
    "bias": ({"bias": torch.ones(3)}, ValueError, "qat_linear: bias must have shape \\[5\\]"),
    "activation": (
        {"activation": "gelu"},
        ValueError,
        "qat_linear: activation must be none or relu, got 'gelu'",
    ),
    "offset": (
        {"input_offset": torch.zeros(1)},
        ValueError,
        "qat_linear: input_zero_point and input_offset must be None without input_scale",
    ),
    "dynamic_range": (
        {"input_qmax": 100},
        ValueError,
        "qat_linear: input_qmax must be 2\\^\\(bits - 1\\) - 1 for dynamic activations, got 100",
    ),
    "given_asymmetric": (
        {"weight_scale": torch.ones(5), "weight_symmetric": False},
        ValueError,
        "qat_linear: weight_symmetric must be True with weight_scale",
    ),
    "weight_range": (
        {"weight_qmin": 3, "weight_qmax": 1},
        ValueError,
        "quantize_pack: qmin <= 0 < qmax must lie within -128 .. 127, got 3 and 1",
    ),
    "weight_scale": (
        {"weight_scale": torch.ones(4)},
        ValueError,
        "quantize_pack: scale must be float32 \\[5\\] or \\[1\\]",
    ),
    "zero_point": (
        {"input_scale": torch.ones(1), "input_zero_point": torch.tensor([200], dtype=torch.int32)},
        ValueError,
        "zero_point",
    ),
    "output_dtype": (
        {"output_dtype": torch.int8},
        TypeError,
        "qat_linear: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, error, message = ERRORS[name]
    for requires_grad in (False, True):
        values = arguments(Shape(2, 5, 8))
        values["weight"].requires_grad_(requires_grad)
        with pytest.raises(error, match=message):
            ops.qat_linear(**{**values, **changes})
