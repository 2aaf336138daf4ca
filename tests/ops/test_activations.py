"""Activation functions: error bounds, special values, exact sequences; the fused operators."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXTREME,
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    sprinkle,
)
from torch.nn import functional as F

from torchquant import ops
from torchquant.functional import ACTIVATIONS, gelu, gelu_tanh, relu, sigmoid, silu, tanh

NAMES = tuple(ACTIVATIONS)


def silu_true(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh_true(x):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / (1 + torch.exp(-2 * u))


def gelu_true(x):
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def sweep() -> torch.Tensor:
    """Every binade with both signs, densely where the functions bend."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.arange(0, 0x7F800000, 20011, dtype=torch.int32)
    positive = bits.view(torch.float32)
    dense = torch.rand(200_000, generator=generator) * 28 - 14
    tail = torch.linspace(-90, 90, 50_001)
    return torch.cat([positive, -positive, dense, tail])


def error_in_ulp(got: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    exponent = torch.frexp(true).exponent.clamp(min=-125)
    return (got.double() - true).abs() / torch.ldexp(torch.ones_like(true), exponent - 24)


@pytest.mark.parametrize(
    ("function", "true", "bounds", "absolute"),
    [
        pytest.param(silu, silu_true, [(-87.0, 2.5)], 1.3e-7, id="silu"),
        pytest.param(gelu, gelu_true, [(-13.0, 5.0)], 1e-7, id="gelu"),
        pytest.param(gelu_tanh, gelu_tanh_true, [(-1.0, 3), (-10, 256)], 1.3e-7, id="gelu_tanh"),
        pytest.param(tanh, torch.tanh, [(-INF, 3)], 1e-7, id="tanh"),
        pytest.param(sigmoid, torch.sigmoid, [(-87.0, 2.5)], 1e-7, id="sigmoid"),
    ],
)
def test_error_bounds(function, true, bounds, absolute):
    x = sweep()
    got, expected = function(x), true(x.double())
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    error = (got.double() - expected).abs()
    assert (error <= absolute * x.double().abs().clamp(min=1)).all()
    normal = expected.abs() >= 2.0**-126
    for least, ulp in bounds:
        inside = (x >= least) & normal
        assert error_in_ulp(got, expected)[inside].max() <= ulp


@pytest.mark.parametrize(
    ("function", "tail"),
    [(relu, 0.0), (silu, 2e-36), (gelu, 1e-37), (gelu_tanh, 2e-37)],
    ids=["relu", "silu", "gelu", "gelu_tanh"],
)
def test_special_values(function, tail):
    y = function(torch.tensor([0.0, -0.0, INF, NAN, -NAN, 3.4e38, 1e-45]))
    assert y[:2].view(torch.int32).tolist() == [0, -(2**31)]
    assert y[2] == INF
    assert y[3:5].isnan().all()
    assert y[5] == torch.tensor(3.4e38)
    assert 0 <= y[6] <= 1e-45
    far = function(torch.tensor([-INF, -3.4e38, -1000.0, -90.0]))
    assert (far == far[0]).all()
    assert -tail <= far[0] <= 0
    assert far[0] == 0 or far[0].abs() >= 2.0**-126  # a normal number or nothing


def test_tanh_is_odd_bounded_and_exact_near_zero():
    x = sweep()
    y = tanh(x)
    assert_same_bits(tanh(-x), -y)
    assert y.abs().max() == 1 and (y[x.abs() > 9.02].abs() == 1).all()
    assert (y[x.abs() < 8.3].abs() < 1).all()
    tiny = x[x.abs() < 2.0**-25]
    assert len(tiny) > 10_000 and (tiny.abs() < 2.0**-126).any()
    assert_same_bits(tanh(tiny), tiny)
    special = tanh(torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN]))
    assert_same_bits(special, torch.tensor([0.0, -0.0, 1.0, -1.0, NAN, NAN]))


def test_sigmoid_is_bounded_and_its_tail_a_normal_number():
    y = sigmoid(sweep())
    assert y.min() > 0 and y.max() == 1
    far = sigmoid(torch.tensor([-INF, -3.4e38, -90.0, -87.0]))
    assert (far == far[0]).all() and 2.0**-126 <= far[0] <= 2e-38
    special = sigmoid(torch.tensor([0.0, -0.0, INF, NAN]))
    assert_same_bits(special, torch.tensor([0.5, 0.5, 1.0, NAN]))


def test_relu_is_a_comparison_and_nothing_else():
    x = torch.tensor([-INF, -1.0, -1e-45, 1e-45, 1.0, INF])
    assert torch.equal(relu(x), torch.tensor([0.0, 0.0, 0.0, 1e-45, 1.0, INF]))


@pytest.mark.parametrize(
    ("function", "hexadecimal"),
    [
        # Computed by a separate C program that follows the same sequence of operations.
        (
            "silu",
            [
                "-0x1.8f5968p-119",
                "-0x1.ebb7eep-15",
                "-0x1.fa58ecp-6",
                "-0x1.0ce4a4p-2",
                "-0x1.057668p-3",
                "-0x1.060350p-11",
                "0x1.def4fcp-2",
                "0x1.0586a0p+0",
                "0x1.162f44p+2",
                "0x1.3cc8bap+3",
            ],
        ),
        (
            "gelu",
            [
                "-0x1.b0f714p-124",
                "-0x1.55ef84p-110",
                "-0x1.d0fe32p-21",
                "-0x1.365174p-4",
                "-0x1.d582aep-4",
                "-0x1.05ef56p-11",
                "0x1.0fae24p-1",
                "0x1.2c95b4p+0",
                "0x1.199936p+2",
                "0x1.3cccccp+3",
            ],
        ),
        (
            "gelu_tanh",
            [
                "-0x1.47c8fap-123",
                "-0x1.47c8fap-123",
                "-0x1.efd55cp-24",
                "-0x1.36dcbcp-4",
                "-0x1.d5854ep-4",
                "-0x1.05ef54p-11",
                "0x1.0fa6e4p-1",
                "0x1.2c869cp+0",
                "0x1.199974p+2",
                "0x1.3cccccp+3",
            ],
        ),
        (
            "tanh",
            [
                "-0x1p+0",
                "-0x1p+0",
                "-0x1.fff642p-1",
                "-0x1.deedfp-1",
                "-0x1.2a4ddcp-2",
                "-0x1.0624d8p-10",
                "0x1.356fb2p-1",
                "0x1.b933c6p-1",
                "0x1.ffd87ep-1",
                "0x1p+0",
            ],
        ),
        (
            "sigmoid",
            [
                "0x1.2778e8p-125",
                "0x1.411f4cp-18",
                "0x1.8d229ap-8",
                "0x1.3c5848p-3",
                "0x1.b3c558p-2",
                "0x1.ffbe78p-2",
                "0x1.561cb4p-1",
                "0x1.9258f8p-1",
                "0x1.f9ca4cp-1",
                "0x1.fff96cp-1",
            ],
        ),
    ],
)
def test_bits_are_frozen(function, hexadecimal):
    """A change of any bit here changes what deployed models compute."""
    x = torch.tensor([-86.5, -12.25, -5.1, -1.7, -0.3, -1e-3, 0.7, 1.3, 4.4, 9.9])
    expected = [float.fromhex(text) for text in hexadecimal]
    assert ACTIVATIONS[function](x).tolist() == expected


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_each_element_stands_alone(value):
    """Vector lanes, blocks and strides cannot matter: an element's result is its own."""
    block = torch.full((2, 33), 0.5)
    block[1, 7] = value
    for name, function in ACTIVATIONS.items():
        alone = function(torch.tensor(value))
        assert_same_bits(function(block)[1, 7], alone, name)
        assert_same_bits(function(block.t())[7, 1], alone, name)


def test_names_and_order():
    names = "none relu gelu gelu_tanh silu tanh sigmoid relu6 hardswish hardsigmoid leaky_relu"
    assert " ".join(NAMES) == names
    x = torch.tensor([-1.0, NAN])
    assert ACTIVATIONS["none"](x) is x
    with pytest.raises(TypeError):
        ACTIVATIONS["mine"] = relu


@pytest.mark.parametrize("name", NAMES[1:])
def test_other_dtypes_raise(name):
    message = f"{name}: input must be float32, got float16 [2]; convert it with .to()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ACTIVATIONS[name](torch.zeros(2, dtype=torch.float16))


# ---------------------------------------------------------------- operators


def awkward(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ordinary numbers with zeros, ties, denormals, the largest numbers, infinities and NaN."""
    return sprinkle(floats(*shape, seed=seed), SPECIAL + EXTREME + NOT_FINITE, seed).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_operator_equals_specification(name, dtype):
    x = torch.cat([sweep()[::37], awkward(40, 77).flatten()]).to(dtype)
    for out in FLOATS:
        expected = ACTIVATIONS[name](x.float()).to(out)
        check_everywhere(lambda out=out: ops.activation(x, name, dtype=out), expected, (1, 2))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 70),
    st.sampled_from(NAMES),
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.integers(0, 1000),
)
def test_any_shape_and_layout(sizes, last, name, dtype, layout, seed):
    x = awkward(*(sizes or [1]), last, seed=seed, dtype=dtype)
    x = in_layout(x, layout) if x.numel() else x
    other = awkward(*x.shape, seed=seed + 1, dtype=dtype)
    y = ACTIVATIONS[name](x.float())
    check_everywhere(lambda: ops.activation(x, name), y.to(dtype), what=layout)
    gated = (y * other.float()).to(dtype)
    check_everywhere(lambda: ops.gated_activation(x, other, name), gated, what=layout)
    if x.numel():
        same = in_layout(other, layout)
        check_everywhere(lambda: ops.gated_activation(x, same, name), gated, what=layout)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 16383, 16384, 16385, 40001])
def test_threads_share_every_size(count):
    x, up = awkward(1, count, seed=count)[0], awkward(1, count, seed=1)[0]
    y = gelu(x)
    check_everywhere(lambda: ops.activation(x, "gelu"), y, (1, 2))
    check_everywhere(lambda: ops.gated_activation(x, up, "gelu"), y * up, (1, 2))


def test_halves_of_one_tensor_are_gated_in_place():
    both = awkward(300, 2 * 130)
    gate, up = both.chunk(2, dim=-1)
    expected = silu(gate) * up
    check_everywhere(lambda: ops.gated_activation(gate, up, "silu"), expected, (1, 2))
    check_everywhere(lambda: ops.gated_activation(gate, up.contiguous(), "silu"), expected, (1, 2))
    check_everywhere(lambda: ops.gated_activation(gate.contiguous(), up, "silu"), expected, (1, 2))
    three = both.view(3, 100, 260).chunk(2, dim=-1)
    check_everywhere(lambda: ops.gated_activation(*three, "silu"), expected.view(3, 100, 130))


def test_memory_format_is_torchs():
    """Strides as torch's own elementwise operators give them."""
    x = awkward(2 * 3 * 4, 5).view(2, 3, 4, 5)
    inputs = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 0, 2, 1),
        "sliced": x[:, :, 1:3],
        "sliced channels_last": x.contiguous(memory_format=torch.channels_last)[:, :2],
        "expanded": x[:, :1].expand(2, 3, 4, 5),
        "flipped columns": x[..., ::2],
        "scalar": torch.tensor(0.5),
        "no rows": x[:0],
        "ones": torch.ones(1, 1, 3, 1).as_strided((1, 1, 3, 1), (7, 9, 1, 2)),
    }
    for what, value in inputs.items():
        expected = F.relu(value)
        got = ops.activation(value, "relu")
        assert got.stride() == expected.stride(), what
        assert_same_bits(got, expected, what)
        gated = ops.gated_activation(value, value, "relu")
        assert gated.stride() == expected.stride(), what
        assert_same_bits(gated, expected * value, what)
        fake = torch.ops.torchquant.activation(torch.empty_like(value, device="meta"), "relu")
        assert fake.shape == got.shape and fake.is_meta


def test_the_input_is_left_alone_and_the_result_is_new():
    x = awkward(9, 33)
    before = x.clone()
    for name in NAMES:
        y = ops.activation(x, name)
        assert y.data_ptr() != x.data_ptr()
        y.fill_(7)
    assert_same_bits(x, before)


TORCH = {name: getattr(F, name, getattr(torch, name, None)) for name in NAMES} | {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,  # torch's own has no second derivative
}
ANGULAR = ("none", "relu", "relu6", "hardsigmoid", "leaky_relu")  # second derivatives are 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_torchs(name):
    x = torch.randn(5, 40, requires_grad=True)
    up = torch.randn(5, 40, requires_grad=True)
    for ours, reference, inputs in (
        (ops.activation(x, name), TORCH[name](x), [x]),
        (ops.gated_activation(x, up, name), TORCH[name](x) * up, [x, up]),
    ):
        torch.testing.assert_close(ours, reference)
        weight = torch.randn_like(ours)
        got = torch.autograd.grad((ours * weight).sum(), inputs, create_graph=True)
        expected = torch.autograd.grad((reference * weight).sum(), inputs, create_graph=True)
        torch.testing.assert_close(got, expected)
        if name in ANGULAR and len(inputs) == 1:
            continue
        seconds = (sum(g.square().sum() for g in grads) for grads in (got, expected))
        got, expected = (torch.autograd.grad(total, inputs) for total in seconds)
        torch.testing.assert_close(got, expected)


def test_gradients_keep_dtypes_and_only_what_is_asked_for_is_computed():
    x = torch.randn(3, 20).bfloat16().requires_grad_()
    y = ops.activation(x, "tanh", dtype=torch.float32)
    assert y.dtype == torch.float32
    y.sum().backward()
    reference = x.detach().float().requires_grad_()
    torch.tanh(reference).sum().backward()
    assert_same_bits(x.grad, reference.grad.bfloat16())
    up = torch.randn(3, 20).bfloat16()
    ops.gated_activation(x, up, "silu").sum().backward()
    assert up.grad is None and x.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert not ops.activation(x, "silu").requires_grad


def test_forward_mode_raises_instead_of_vanishing():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        for call in (
            lambda: ops.activation(x, "silu"),
            lambda: ops.gated_activation(torch.ones(3), x, "silu"),
        ):
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                call()


def test_compiled_and_exported_calls_have_the_same_bits():
    class Model(torch.nn.Module):
        def forward(self, x, up):
            y = ops.activation(x.transpose(0, 1), "gelu", dtype=torch.bfloat16)
            return y, ops.gated_activation(x, up, "silu")

    x, up = awkward(6, 50), awkward(6, 50, seed=1)
    expected = Model()(x, up)
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Model(), (x, up)).module()
    for results in (compiled(x, up), exported(x, up)):
        for got, want in zip(results, expected, strict=True):
            assert_same_bits(got, want)
            assert got.stride() == want.stride()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.activation(torch.ones(2, dtype=torch.int8), "relu"),
            TypeError,
            "activation: input must be float32, bfloat16 or float16, got int8 [2]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda: ops.activation(torch.ones(2), "mish"),
            ValueError,
            "activation: activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, "
            "sigmoid, relu6, hardswish, hardsigmoid, leaky_relu, got 'mish'",
        ),
        (
            lambda: ops.activation(torch.ones(2), "relu", dtype=torch.float64),
            TypeError,
            "activation: dtype must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2), torch.ones(2).half(), "silu"),
            TypeError,
            "gated_activation: up must be float32, got float16 [2]; "
            "convert it with .to(torch.float32)",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2, 3), torch.ones(3), "silu"),
            ValueError,
            "gated_activation: up must have gate's shape [2, 3], got float32 [3]",
        ),
    ],
    ids=["integers", "unknown name", "float64 result", "two dtypes", "two shapes"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
