"""torchquant.functional.activations: error bounds, special values, the exact sequences."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant.functional import ACTIVATIONS, gelu, gelu_tanh, relu, silu

INF, NAN = math.inf, math.nan


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
        assert torch.equal(function(block)[1, 7], alone), name
        assert torch.equal(function(block.t())[7, 1], alone), name


def test_names_and_order():
    assert list(ACTIVATIONS) == ["none", "relu", "gelu", "gelu_tanh", "silu"]
    x = torch.tensor([-1.0, NAN])
    assert ACTIVATIONS["none"](x) is x
    with pytest.raises(TypeError):
        ACTIVATIONS["mine"] = relu


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
def test_other_dtypes_raise(name):
    message = f"{name}: input must be float32, got float16 [2]; convert it with .to()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ACTIVATIONS[name](torch.zeros(2, dtype=torch.float16))
