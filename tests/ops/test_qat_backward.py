"""qat_linear: mm_fake_quantized, the tensors saved for backward, and refusals."""

import itertools
from typing import Any

import pytest
import torch
from support import (
    LAYOUTS,
    NAN,
    Shape,
    floats,
    in_layout,
    positive,
)
from support.qat_linear import (
    CASES,
    SIZES,
    arguments,
    assert_close,
    gradients,
)
from torch import Tensor

from torchquant import PerAxis, functional, ops

reads_values = pytest.mark.cpu_only("only the CPU's kernels read these values and refuse them")


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


def test_product_of_nothing() -> None:
    weight, scale = torch.randn(4, 8), torch.ones(4)
    assert ops.mm_fake_quantized(torch.empty(0, 4), weight, scale).shape == (0, 8)


@pytest.mark.parametrize(
    ("grad", "scale", "message"),
    [
        (torch.ones(2, 5), torch.ones(4), "grad must have shape"),
        (torch.ones(2, 4), torch.ones(3), "scale must be float32"),
        pytest.param(torch.ones(2, 4), torch.zeros(4), "scale must be finite", marks=reads_values),
        (torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4), "grad must be float32"),
    ],
    ids=["grad's shape", "scale's shape", "scale's values", "grad's type"],
)
def test_product_of_wrong_things(grad: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"mm_fake_quantized: {message}"):
        ops.mm_fake_quantized(grad, torch.randn(4, 8), scale)


def test_a_weight_with_nan_gives_gradients_of_nan() -> None:
    values = arguments(Shape(4, 17, 20))
    values["weight"][3, 2] = NAN
    got = gradients(values, ("input", "weight"), torch.ones(4, 17))
    assert bool(got["input"].isnan().all())
    assert not bool(got["weight"].isnan().any())


def saved_bytes(call: Any, but: tuple[Tensor, ...] = ()) -> int:
    """The bytes that autograd saves for backward, without those of the parameters ``but``."""
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=reads_values) if name == "zero_point" else name for name in ERRORS],
)
def test_errors(name: str) -> None:
    changes, error, message = ERRORS[name]
    for requires_grad in (False, True):
        values = arguments(Shape(2, 5, 8))
        values["weight"].requires_grad_(requires_grad)
        with pytest.raises(error, match=message):
            ops.qat_linear(**{**values, **changes})
