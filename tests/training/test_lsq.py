"""LSQ and LSQ+: the gradients of the papers, and the first batch."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, INF, LAYOUTS, NAN, assert_same_bits, floats, generator, in_layout
from support.learned import LSQ, gradients
from torch import Tensor, nn

from torchquant import LSQPlusQuantizer, LSQQuantizer, PerAxis, PerTensor, functional
from torchquant.training.range_search import least_squares_range

# ---------------------------------------------------------------- the formula


def oracle(
    x: Tensor, upstream: Tensor, step: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LSQ's gradients in float64 (input, step, offset) and the sum that bounds step's rounding.

    The integers, and whether a value is inside the range, follow the fp32 contract; step
    and zero point broadcast against x.
    """
    v = x.float() * (1.0 / step)
    low, high = qmin - zero_point, qmax - zero_point
    below, above = v <= low, v >= high
    exact = x.double() / step.double()
    slope = torch.where(below, qmin, torch.where(above, qmax, torch.round(v) - exact))
    g = upstream.double()
    clipped = below | above
    # rint(v) - v cancels, so the rounding of v remains: at most 2^-23 of v.
    error = g.abs() * torch.where(clipped, slope.abs(), slope.abs() + 4 * exact.abs())
    return torch.where(clipped, 0.0, g), g * slope, torch.where(clipped, g, 0.0), error


@given(data=st.data())
def test_gradients_are_those_of_the_paper(data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, 8), "bits")
    signed, symmetric, per_channel = (
        data.draw(st.booleans(), name) for name in ("signed", "symmetric", "per_channel")
    )
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "shape")
    axis = data.draw(st.integers(-len(shape), len(shape) - 1), "axis")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    g = generator(data.draw(st.integers(0, 100), "seed"))

    x = in_layout((torch.randn(shape, generator=g) * 3 + 1).to(dtype), layout)
    upstream = torch.randn(shape, generator=g).to(dtype)
    channels = shape[axis] if per_channel else 1
    quantizer = LSQQuantizer(
        bits, symmetric, per_channel, channels, signed=signed, num_features=7, axis=axis
    )
    step = torch.rand(channels, generator=g) * 2 / 2 ** (bits - 2) + 0.01
    with torch.no_grad():
        quantizer.initialized.fill_(1)
        quantizer.step.copy_(step)
        if quantizer.offset is not None:
            middle = (quantizer.qmin + quantizer.qmax) // 2
            zero = torch.randint(middle - 1, middle + 2, (channels,), generator=g)
            quantizer.offset.copy_(-zero * step)
    got = gradients(quantizer, x, upstream)

    scale, zero_point = quantizer.qparams()
    assert_same_bits(scale, step)
    if quantizer.offset is not None:
        assert zero_point.tolist() == zero.tolist()
    view = [-1 if per_channel and d == axis % len(shape) else 1 for d in range(len(shape))]
    s, z = scale.view(view), zero_point.view(view)
    out = quantizer(x)
    limits = {"qmin": quantizer.qmin, "qmax": quantizer.qmax}
    granularity = PerAxis(axis) if per_channel else PerTensor()
    expected = functional.fake_quantize(x, scale, zero_point, **limits, granularity=granularity)
    assert_same_bits(out.detach(), expected)

    to_input, to_step, to_offset, bound = oracle(x, upstream, s, z, quantizer.qmin, quantizer.qmax)
    assert_same_bits(got["input"], to_input.to(dtype))
    factor = 1.0 / math.sqrt(7 * quantizer.qmax)
    others = [d for d in range(len(shape)) if view[d] == 1]
    for name, terms, limit in (("step", to_step, bound), ("offset", to_offset, to_offset.abs())):
        if name in got:
            assert got[name].dtype == torch.float32
            if others:  # an empty list would mean all dimensions
                terms, limit = terms.sum(others), limit.sum(others)
            want, limit = terms.view(-1), limit.view(-1)
            error = (got[name].double() / factor - want).abs()
            assert bool((error <= 2.0**-20 * limit + 1e-30).all()), name


def test_the_ends_belong_to_the_outside() -> None:
    """The paper's -Qn < v < Qp before rounding: at the ends the step gets the gradient."""
    quantizer = LSQQuantizer(3, num_features=1)
    with torch.no_grad():
        quantizer.initialized.fill_(1)
    x = torch.tensor([-5.0, -4.0, -3.9, 2.9, 3.0, 4.0])
    got = gradients(quantizer, x, torch.ones(6))
    assert got["input"].tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    expected = (-4 - 4 + (-4 + 3.9) + (3 - 2.9) + 3 + 3) / math.sqrt(3)
    assert got["step"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("copies", [2, 7])
def test_the_activation_steps_gradient_does_not_depend_on_the_batch_size(copies: int) -> None:
    x, upstream = floats(4, 16).clamp(-3, 3), torch.randn(4, 16, generator=generator(1))
    quantizer = LSQQuantizer(4)
    quantizer(x)
    once = gradients(quantizer, x, upstream)
    # The same rows several times; the loss is a mean, so each row has a smaller weight.
    often = gradients(quantizer, x.repeat(copies, 1), upstream.repeat(copies, 1) / copies)
    torch.testing.assert_close(often["step"], once["step"])
    assert quantizer.grad_factor(x) == quantizer.grad_factor(x.repeat(copies, 1, 1))
    assert quantizer.grad_factor(x) == 1 / math.sqrt(16 * 7)


def test_gradient_factors() -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    assert LSQQuantizer(8).grad_factor(weight) == 1 / math.sqrt(60 * 127)
    assert LSQQuantizer(8, True, True, 6).grad_factor(weight) == 1 / math.sqrt(10 * 127)
    assert LSQQuantizer(8, True, True, 10, axis=1).grad_factor(weight) == 1 / math.sqrt(6 * 127)
    images = torch.zeros(5, 3, 4, 4)
    assert LSQQuantizer(2, signed=False, num_features=48).grad_factor(images) == 1 / 12


# ---------------------------------------------------------------- the first batch


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    channels=st.integers(1, 5),
    dtype=st.sampled_from(FLOATS),
)
def test_the_first_step(bits: int, signed: bool, channels: int, dtype: torch.dtype) -> None:
    x = floats(channels, 3, 4, seed=bits, dtype=dtype)
    quantizer = LSQQuantizer(bits, True, True, channels, signed=signed)
    quantizer(x)
    peak = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    expected = 2 * x.double().abs().mean((1, 2)) / math.sqrt(peak)
    torch.testing.assert_close(quantizer.step.detach().double(), expected, rtol=1e-6, atol=0)
    quantizer(x * 5)  # the second batch does not change the step
    torch.testing.assert_close(quantizer.step.detach().double(), expected, rtol=1e-6, atol=0)


def test_odd_first_batches() -> None:
    quantizer = LSQQuantizer(4)
    for nothing in (torch.zeros(3), torch.empty(0), torch.tensor([NAN, INF])):
        quantizer(nothing)
        assert quantizer.initialized.item() == 0
    quantizer(torch.tensor([1.0, -3.0, NAN, INF]))
    assert quantizer.step.item() == pytest.approx(2 * 2.0 / math.sqrt(7))
    channels = LSQQuantizer(4, True, True, 3)
    channels(torch.tensor([[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]))
    assert channels.step[1].item() == pytest.approx(channels.step.mean().item())


def test_initialize_overwrites() -> None:
    quantizer = LSQPlusQuantizer(4)
    assert quantizer.initialize(torch.linspace(-1, 1, 50))
    first = quantizer.step.item()
    assert quantizer.initialize(torch.linspace(-2, 2, 50))
    assert quantizer.step.item() == pytest.approx(2 * first)
    assert not quantizer.initialize(torch.zeros(4))
    assert quantizer.step.item() == pytest.approx(2 * first)


@pytest.mark.parametrize("name", LSQ)
def test_before_the_first_batch(name: str) -> None:
    quantizer = LSQ[name]()
    assert isinstance(quantizer, LSQQuantizer)
    quantizer.set_layer_name("layers.7")
    quantizer.eval()
    for call in (lambda: quantizer(floats(4, 8)), quantizer.qparams):
        with pytest.raises(RuntimeError, match=r"Quantizer of layers\.7: the step is not init"):
            call()
    quantizer.train()(floats(4, 8))
    quantizer.eval()(floats(4, 8))


# ---------------------------------------------------------------- LSQ+


SAMPLES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(1, 1000, generator=generator(0)),
    "shifted": lambda: torch.randn(1, 1000, generator=generator(1)) + 2,
    "relu": lambda: torch.randn(1, 1000, generator=generator(2)).relu(),
    "gelu": lambda: nn.functional.gelu(torch.randn(1, 1000, generator=generator(3))),
    "negative": lambda: -torch.rand(1, 1000, generator=generator(4)),
    "outliers": lambda: torch.randn(1, 1000, generator=generator(5)) ** 5,
    "few": lambda: torch.tensor([[0.0, 1.0, 5.0]]),
    "constant": lambda: torch.full((1, 9), -3.0),
}


def squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Mean over all elements; scale and zero point broadcast."""
    q = torch.clamp(torch.round(x / scale), qmin - zero_point, qmax - zero_point)
    return (q * scale - x).double().square().mean(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_offset_starts_at_the_least_squared_error(name: str, signed: bool, bits: int) -> None:
    x = SAMPLES[name]()
    quantizer = LSQPlusQuantizer(bits, signed=signed)
    quantizer(x)
    scale, zero_point = quantizer.qparams()
    assert zero_point.dtype == torch.int32
    limits = quantizer.qmin, quantizer.qmax
    assert limits[0] <= zero_point.item() <= limits[1]
    found = squared_error(x, scale, zero_point, *limits)[0]

    # A finer grid of ranges, evaluated on the data itself.
    ends = torch.linspace(1 / 32, 1, 32)
    low, high = x.min().clamp(max=0) * ends, x.max().clamp(min=0) * ends
    low, high = (end.reshape(-1, 1) for end in torch.meshgrid(low, high, indexing="ij"))
    scales = ((high - low) / (limits[1] - limits[0])).clamp(min=2.0**-126)
    zeros = torch.clamp(torch.round(limits[0] - low / scales), *limits)
    blocks = zip(scales.split(512), zeros.split(512), strict=True)
    best = torch.cat([squared_error(x, s, z, *limits) for s, z in blocks]).min()
    # The histogram's bins are 1/2048 of the range wide: differences within a bin are lost.
    unseen = float((x.max().clamp(min=0) - x.min().clamp(max=0)) / 2048) ** 2
    assert found <= 1.05 * best + unseen


def test_the_search_treats_rows_apart_and_skips_what_is_not_finite() -> None:
    rows = torch.cat([SAMPLES[name]() for name in ("normal", "shifted", "relu", "outliers")])
    together = least_squares_range(rows, -8, 7)
    assert together is not None
    for index, row in enumerate(rows):
        alone = least_squares_range(torch.cat([row, torch.tensor([NAN, INF])])[None], -8, 7)
        assert alone is not None
        for got, want in zip(together, alone, strict=True):
            assert_same_bits(got[index : index + 1], want)


def test_offsets_stay_where_a_zero_point_is() -> None:
    quantizer = LSQPlusQuantizer(4)
    x = torch.linspace(-1, 3, 101)
    quantizer(x)
    assert quantizer.offset is not None
    for absurd in (1e30, -1e30):
        with torch.no_grad():
            quantizer.offset.fill_(absurd)
        quantizer(x)
        _, zero_point = quantizer.qparams()
        assert zero_point.item() == (-8 if absurd > 0 else 7)
        assert quantizer.offset.abs().item() < 10


def test_training_the_step_lowers_the_error() -> None:
    x = torch.randn(64, 32, generator=generator(0))
    quantizer = LSQQuantizer(2)
    quantizer(x)
    before = (quantizer(x) - x).square().mean().item()
    updates = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _ in range(200):
        updates.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        updates.step()
    scales = torch.linspace(0.2, 3, 300)[:, None]
    zero = torch.zeros(())
    best = squared_error(x.reshape(1, -1), scales, zero, -2, 1).min().item()
    after = (quantizer(x) - x).square().mean().item()
    assert after < before and after < 1.02 * best
