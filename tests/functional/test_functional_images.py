"""int8 steps between convolutions: the specification against torch's own functions."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import generator
from torch import Tensor
from torch.nn import functional as F

from torchquant import functional
from torchquant.functional import (
    int8_adaptive_avg_pool,
    int8_add,
    int8_avg_pool,
    int8_concat,
    int8_map,
    int8_max_pool,
    int8_mul,
    int8_table,
    int8_upsample_nearest,
)


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)


Q = integers(2, 3, 9, 11)
X = functional.dequantize(Q, 0.05, -7)


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
def test_add_and_mul_are_floats_quantized_once(activation: str) -> None:
    r = integers(2, 3, 9, 11, seed=1)
    y = functional.dequantize(r, 0.03, 4)
    both = (Q, 0.05, -7, r, 0.03, 4)
    for function, real in ((int8_add, X + y), (int8_mul, X * y)):
        expected = functional.ACTIVATIONS[activation](real)
        assert torch.equal(function(*both, activation=activation), expected)
        q = function(*both, activation=activation, output_scale=0.1, output_zero_point=-3)
        assert torch.equal(q, functional.quantize(expected, 0.1, -3))
        assert q.dtype == torch.int8


def test_mul_by_one_pixel() -> None:
    gate = integers(2, 3, 1, 1, seed=2)
    got = int8_mul(Q, 0.05, -7, gate, 0.01, 0)
    assert torch.equal(got, X * functional.dequantize(gate, 0.01))


def test_a_table_is_the_function_of_every_value() -> None:
    table = int8_table(0.05, -7, activation="gelu", output_scale=0.04, output_zero_point=2)
    want = functional.quantize(functional.gelu(X), 0.04, 2)
    assert torch.equal(int8_map(Q, table), want)
    assert torch.equal(int8_map(Q, int8_table(0.05, -7)), X)


def test_concat_quantizes_each_part() -> None:
    r = integers(2, 5, 9, 11, seed=1)
    got = int8_concat([Q, r], [0.05, 0.03], [-7, 4], output_scale=0.04, output_qmin=-127)
    whole = torch.cat([X, functional.dequantize(r, 0.03, 4)], 1)
    assert torch.equal(got, functional.quantize(whole, 0.04, qmin=-127))


WINDOWS = [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 3), (1, 0)), ((5, 4), 1, 2)]


@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool_is_torchs(window: tuple[Any, ...], ceil_mode: bool, dilation: Any) -> None:
    got = int8_max_pool(Q, *window, dilation, ceil_mode)
    assert torch.equal(got.double(), F.max_pool2d(Q.double(), *window, dilation, ceil_mode))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("divisor", [None, 7])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_avg_pool_is_torchs(
    window: tuple[Any, ...], ceil_mode: bool, include: bool, divisor: int | None
) -> None:
    real = F.avg_pool2d(X.double(), *window, ceil_mode, include, divisor)
    got = int8_avg_pool(Q, 0.05, -7, *window, ceil_mode, include, divisor)
    torch.testing.assert_close(got.double(), real, rtol=3e-7, atol=1e-7)
    options = {"output_scale": 0.02, "output_zero_point": 3}
    q = int8_avg_pool(Q, 0.05, -7, *window, ceil_mode, include, divisor, **options)
    assert torch.equal(q, functional.quantize(got, 0.02, 3))


@pytest.mark.parametrize("size", [1, (3, 2), (None, 5), None, (20, 1)])
def test_adaptive_avg_pool_is_torchs(size: Any) -> None:
    real = F.adaptive_avg_pool2d(X.double(), (None, None) if size is None else size)
    got = int8_adaptive_avg_pool(Q, 0.05, -7, size)
    torch.testing.assert_close(got.double(), real, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("target", [{"size": (4, 30)}, {"scale_factor": 2}, {"scale_factor": 1.3}])
def test_upsample_is_torchs(target: dict[str, Any]) -> None:
    expected = F.interpolate(Q.double(), **target, mode="nearest")
    assert torch.equal(int8_upsample_nearest(Q, **target).double(), expected)


def test_sequences_are_images_of_one_row() -> None:
    s = integers(2, 3, 10)
    image = s.unsqueeze(2)
    for one, two in (
        (int8_max_pool(s, 3, 2, 1), int8_max_pool(image, (1, 3), (1, 2), (0, 1))),
        (int8_avg_pool(s, 0.1, 3, 3, 2, 1), int8_avg_pool(image, 0.1, 3, (1, 3), (1, 2), (0, 1))),
        (int8_adaptive_avg_pool(s, 0.1, 3, 4), int8_adaptive_avg_pool(image, 0.1, 3, (1, 4))),
        (int8_upsample_nearest(s, 14), int8_upsample_nearest(image, (1, 14))),
    ):
        assert torch.equal(one.unsqueeze(2), two)


REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "add of floats": (
        lambda: int8_add(X, 1.0, 0, Q, 1.0, 0),
        TypeError,
        r"int8_add: left must be int8, got float32 \[2, 3, 9, 11\]; convert it with .to\(\)",
    ),
    "add of two shapes": (
        lambda: int8_add(Q, 1.0, 0, Q[:1], 1.0, 0),
        ValueError,
        r"int8_add: right must have left's shape \[2, 3, 9, 11\], got int8 \[1, 3, 9, 11\]",
    ),
    "mul by a larger tensor": (
        lambda: int8_mul(Q[:1], 1.0, 0, Q, 1.0, 0),
        ValueError,
        r"int8_mul: right must broadcast to left's shape \[1, 3, 9, 11\], got int8 \[2, 3, 9, 11\]",
    ),
    "an unknown activation": (
        lambda: int8_table(1.0, activation="step"),
        ValueError,
        "int8_table: activation must be one of none, relu, .*, got 'step'",
    ),
    "a short table": (
        lambda: int8_map(Q, torch.zeros(255)),
        ValueError,
        r"int8_map: table must have shape \[256\], got \[255\]",
    ),
    "a scale too few": (
        lambda: int8_concat([Q, Q], [1.0], [0, 0]),
        ValueError,
        "int8_concat: inputs, scales and zero_points must have one entry for each input, "
        "got 2, 1 and 2",
    ),
    "a pool of a vector": (
        lambda: int8_max_pool(Q[0, 0], 2),
        ValueError,
        r"int8_max_pool: input must have shape \[N, C, H, W\] or \[N, C, L\], got \[9, 11\]",
    ),
    "a window of three dimensions": (
        lambda: int8_avg_pool(Q, 1.0, 0, (2, 2, 2)),
        ValueError,
        r"int8_avg_pool: kernel_size must be an int or 2 ints, got \(2, 2, 2\)",
    ),
    "an output of one dimension": (
        lambda: int8_adaptive_avg_pool(Q, 1.0, 0, (2,)),
        ValueError,
        r"int8_adaptive_avg_pool: output_size must have 2 entries, got \(2,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    function, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        function()


def test_extremes_stay_exact() -> None:
    """Sums of many equal values, and scales at which everything saturates."""
    for value, zero_point in itertools.product((-128, 127), repeat=2):
        q = torch.full((1, 1, 40, 40), value, dtype=torch.int8)
        mean = int8_adaptive_avg_pool(q, 1.0, zero_point, 1)
        count = torch.tensor(1.0) / torch.tensor(1600.0)
        assert mean.item() == (float((value - zero_point) * 1600) * count).item()
        saturated = int8_adaptive_avg_pool(q, 1.0, zero_point, 1, output_scale=2.0**-126).item()
        sign = (value > zero_point) - (value < zero_point)
        assert saturated == {1: 127, 0: 0, -1: -128}[sign]
