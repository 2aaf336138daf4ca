"""Learned quantizers: the paper's gradients, steps that stay positive, states that resume."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, LAYOUTS, NAN, assert_same_bits, floats, generator, in_layout
from support.processes import (
    NoWaiting,
    in_processes,
    initial_steps,
    lsq_in_process,
    lsq_net,
    train,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchquant
from torchquant import (
    LSQPlusQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    PerAxis,
    PerTensor,
    functional,
    parameter_groups,
)
from torchquant.training.range_search import least_squares_range

QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "lsq": lambda: LSQQuantizer(4),
    "lsq_unsigned": lambda: LSQQuantizer(3, signed=False),
    "lsq_channels": lambda: LSQQuantizer(2, True, True, 4),
    "lsq_plus": lambda: LSQPlusQuantizer(4),
    "lsq_plus_channels": lambda: LSQPlusQuantizer(3, True, 8, axis=-1),
    "pact": lambda: PACTQuantizer(4, alpha=2.0),
}
LSQ = {name: make for name, make in QUANTIZERS.items() if name != "pact"}


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of the input and of every parameter."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    module(leaf).backward(upstream)
    assert leaf.grad is not None
    result = {"input": leaf.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        result[name] = parameter.grad.clone()
    return result


# ---------------------------------------------------------------- the formula


def oracle(
    x: Tensor, upstream: Tensor, step: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LSQ's gradients in float64 (input, step, offset) and the sum that bounds step's rounding.

    The integers, and on which side of the ends a value lies, are those of the fp32 contract; step
    and zero point broadcast against x.
    """
    v = x.float() * (1.0 / step)
    low, high = qmin - zero_point, qmax - zero_point
    below, above = v <= low, v >= high
    exact = x.double() / step.double()
    slope = torch.where(below, qmin, torch.where(above, qmax, torch.round(v) - exact))
    g = upstream.double()
    clipped = below | above
    # rint(v) - v cancels: v's own rounding is at most 2^-23 of v.
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
    """The paper's -Qn < v < Qp before rounding: at the ends the step, not the input, is pulled."""
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
    # The same rows several times; the loss is a mean, so each row counts for less.
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
    quantizer(x * 5)  # the second batch sets nothing
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

    # A finer grid of ranges on the data itself, all of them at once.
    ends = torch.linspace(1 / 32, 1, 32)
    low, high = x.min().clamp(max=0) * ends, x.max().clamp(min=0) * ends
    low, high = (end.reshape(-1, 1) for end in torch.meshgrid(low, high, indexing="ij"))
    scales = ((high - low) / (limits[1] - limits[0])).clamp(min=2.0**-126)
    zeros = torch.clamp(torch.round(limits[0] - low / scales), *limits)
    blocks = zip(scales.split(512), zeros.split(512), strict=True)
    best = torch.cat([squared_error(x, s, z, *limits) for s, z in blocks]).min()
    # The histogram's bins are 1/2048 of the range wide, so this is what it cannot see.
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


# ---------------------------------------------------------------- steps stay positive


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(QUANTIZERS)),
    rates=st.lists(st.floats(1e-3, 2.0**66), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_no_learning_rate_makes_a_scale_negative(name: str, rates: list[float], seed: int) -> None:
    quantizer, x = QUANTIZERS[name](), floats(4, 8, seed=seed)
    upstream = torch.randn(4, 8, generator=generator(seed))
    quantizer(x)
    for rate in rates:
        gradients(quantizer, x, upstream)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                assert parameter.grad is not None
                # An optimizer's step beyond float32 is a number all the same.
                parameter -= (rate * parameter.grad.double()).clamp(-1e38, 1e38)
        y = quantizer(x)
        assert bool(y.isfinite().all())
        scale, zero_point = quantizer.qparams()  # type: ignore[operator]
        assert bool((scale >= 2.0**-126).all())
        floor = quantizer.alpha if name == "pact" else quantizer.step
        assert isinstance(floor, Tensor) and bool((floor > 0).all())
        assert bool((zero_point >= quantizer.qmin).all())  # type: ignore[operator]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_recovery_from_an_absurd_step(name: str, optimizer: Callable[..., Any]) -> None:
    quantizer, x = QUANTIZERS[name](), torch.randn(4, 8, generator=generator(0))
    if name == "pact" or name == "lsq_unsigned":
        x = x.abs()
    quantizer(x)
    nothing = x.square().mean().item()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 1e6
    assert (quantizer(x) - x).square().mean().item() > 0.9 * nothing
    updates = optimizer(quantizer.parameters(), lr=0.02)
    for _ in range(300):
        updates.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        updates.step()
    assert (quantizer(x) - x).square().mean().item() < 0.25 * nothing


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


# ---------------------------------------------------------------- PACT


def test_pact_clips_and_learns_from_the_clipped_side() -> None:
    quantizer = PACTQuantizer(2, alpha=3.0)
    x = torch.tensor([-1.0, 0.4, 1.6, 3.0, 5.0, NAN])
    assert_same_bits(quantizer(x).detach(), torch.tensor([0.0, 0.0, 2.0, 3.0, 3.0, NAN]))
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.0])
    got = gradients(quantizer, x, upstream)
    assert got["input"].tolist() == [0.0, 2.0, 4.0, 0.0, 0.0, 0.0]
    assert got["alpha"].item() == 24.0
    scale, zero_point = quantizer.qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pact_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = floats(4, 8, dtype=dtype)
    y = PACTQuantizer(4)(x)
    scale = torch.tensor([6.0]) / 15
    q = functional.quantize(x, scale, qmin=0, qmax=15, dtype=torch.uint8)
    clipped = functional.dequantize(q, scale, dtype=dtype)
    assert y.dtype == dtype
    # Clipping to alpha rounds once more than the integers do.
    torch.testing.assert_close(y, clipped, rtol=0, atol=0)


# ---------------------------------------------------------------- state


def steps_of_training(quantizer: nn.Module, updates: Any, seeds: range) -> None:
    for seed in seeds:
        updates.zero_grad()
        x = floats(4, 8, seed=seed)
        (quantizer(x) - x.float()).square().mean().backward()
        updates.step()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_checkpoint_resumes_with_the_same_bits(name: str, assign: bool) -> None:
    quantizer = QUANTIZERS[name]()
    updates = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    steps_of_training(quantizer, updates, range(3))
    saved = io.BytesIO()
    torch.save((quantizer.state_dict(), updates.state_dict()), saved)
    saved.seek(0)
    state, updates_state = torch.load(saved)
    other = QUANTIZERS[name]()
    other.load_state_dict(state, assign=assign)
    other_updates = torch.optim.Adam(other.parameters(), lr=0.01)
    other_updates.load_state_dict(updates_state)
    steps_of_training(quantizer, updates, range(3, 6))
    steps_of_training(other, other_updates, range(3, 6))
    for key, value in quantizer.state_dict().items():
        assert_same_bits(other.state_dict()[key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_copies_are_equal_and_independent(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    x = floats(4, 8, seed=1)
    expected = quantizer(x).detach()
    for other in (copy.deepcopy(quantizer), torch.load(buffer, weights_only=False)):
        assert_same_bits(other(x).detach(), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 3
        assert_same_bits(quantizer(x).detach(), expected)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_conversions_of_the_model_leave_the_steps(
    name: str, convert: Callable[[nn.Module], nn.Module]
) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    before = copy.deepcopy(quantizer.state_dict())
    model = convert(nn.Sequential(nn.Linear(4, 4), quantizer))
    assert list(quantizer.parameters()) == [p for p in model.parameters() if p.dim() == 1][1:]
    for key, value in before.items():
        assert_same_bits(quantizer.state_dict()[key], value, key)
    low = {key: value.bfloat16() for key, value in before.items()}
    quantizer.load_state_dict(low)
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_autocast(name: str) -> None:
    quantizer, x = QUANTIZERS[name](), floats(4, 8)
    plain = copy.deepcopy(quantizer)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(quantizer, x, torch.ones(4, 8))
        assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    for key, value in gradients(plain, x, torch.ones(4, 8)).items():
        assert_same_bits(got[key], value, key)


def test_a_state_dict_holds_what_is_used() -> None:
    quantizer = LSQPlusQuantizer(4)
    quantizer(floats(4, 8))
    with torch.no_grad():
        quantizer.step.fill_(-3.0)
    state = quantizer.state_dict()
    assert state["step"].item() == 2.0**-126
    assert abs(state["offset"].item()) <= 8 * 2.0**-126


def test_meta_then_loaded() -> None:
    with torch.device("meta"):
        quantizer = LSQPlusQuantizer(4)
    source = LSQPlusQuantizer(4)
    source(floats(4, 8))
    quantizer.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(quantizer(floats(4, 8)).detach(), source(floats(4, 8)).detach())


# ---------------------------------------------------------------- inside training


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    updates = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    steps_of_training(quantizer, updates, range(1))
    with NoWaiting():
        steps_of_training(quantizer, updates, range(1, 3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    results = []
    for recompute in (True, False):
        quantizer = QUANTIZERS[name]()
        updates = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        for seed in range(3):
            x = floats(4, 8, seed=seed).requires_grad_()
            updates.zero_grad()
            run = checkpoint(quantizer, x, use_reentrant=reentrant) if recompute else quantizer(x)
            run.square().sum().backward()
            updates.step()
        assert x.grad is not None
        results.append({**quantizer.state_dict(), "input": x.grad})
    for key, value in results[1].items():
        assert_same_bits(results[0][key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_used_twice_before_the_backward(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    x, y = floats(4, 8), floats(4, 8, seed=1)
    quantizer(x)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 1e3  # so that the first use projects
    apart = [gradients(quantizer, part, torch.ones(4, 8)) for part in (x, y)]
    quantizer.zero_grad()
    (quantizer(x).sum() + quantizer(y).sum()).backward()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, apart[0][key] + apart[1][key])


@pytest.mark.parametrize(
    ("name", "backend"),
    [("lsq", "inductor"), ("lsq_plus", "inductor"), *((name, "aot_eager") for name in QUANTIZERS)],
)
def test_compiled_training(name: str, backend: str) -> None:
    torch.compiler.reset()
    results = []
    for compiled in (True, False):
        quantizer = QUANTIZERS[name]()
        call = quantizer
        if compiled:
            call = torch.compile(quantizer, fullgraph=True, backend=backend)
        updates = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        for seed in range(4):
            x = floats(4, 8, seed=seed).requires_grad_()
            updates.zero_grad()
            y = call(x)
            y.square().sum().backward()
            updates.step()
            if seed == 1:  # what the next forward has to repair
                with torch.no_grad():
                    for parameter in quantizer.parameters():
                        parameter -= 1e3
        assert x.grad is not None
        results.append({**quantizer.state_dict(), "input": x.grad, "output": y.detach()})
    for key, value in results[1].items():
        assert_same_bits(results[0][key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_exported_for_evaluation(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    quantizer.eval()
    x = floats(4, 8, seed=1)
    program = torch.export.export(quantizer, (x,))
    assert_same_bits(program.module()(x), quantizer(x).detach())


# ---------------------------------------------------------------- processes


def test_two_processes_train_as_one() -> None:
    batches = [torch.randn(8, 8, generator=generator(seed)) * (1 + seed) for seed in range(6)]
    first = initial_steps(lsq_net(), batches[0])
    net = lsq_net()
    train(net, batches)
    for initial, replicated, (message, sharded) in in_processes(lsq_in_process, batches):
        for key, value in first.items():
            torch.testing.assert_close(initial[key], value, rtol=1e-6, atol=1e-7, msg=key)
        assert "the step must be initialised before fully_shard" in message
        assert "run one batch in training mode before sharding" in message
        for key, value in net.state_dict().items():
            for other in (replicated, sharded):
                torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)


# ---------------------------------------------------------------- parameter groups


def test_parameter_groups() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "linear": shared,
            "again": shared,
            "norm": nn.LayerNorm((4, 4)),
            "embedding": nn.Embedding(3, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "weights": LSQQuantizer(4, True, True, 4),
            "inputs": LSQPlusQuantizer(4),
            "pact": PACTQuantizer(4),
            "prelu": nn.PReLU(),
        }
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight", "embedding.weight"]
    assert [names[id(p)] for p in others["params"]] == [
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "weights.step",
        "inputs.step",
        "inputs.offset",
        "pact.alpha",
        "prelu.weight",
    ]
    torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)


# ---------------------------------------------------------------- errors


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "bits": (
        lambda: LSQQuantizer(1),
        ValueError,
        r"bits must be an integer from 2 to 8, got 1",
    ),
    "num_channels": (
        lambda: LSQQuantizer(4, True, False, 3),
        ValueError,
        r"LSQQuantizer: num_channels must be 1 without per_channel, got 3; pass per_channel=True",
    ),
    "no_channels": (
        lambda: LSQPlusQuantizer(4, True, 0),
        ValueError,
        r"LSQPlusQuantizer: num_channels must be an integer of at least 1, got 0",
    ),
    "num_features": (
        lambda: LSQQuantizer(4, num_features=2.5),  # type: ignore[arg-type]
        ValueError,
        r"LSQQuantizer: num_features must be an integer of at least 1, got 2.5",
    ),
    "axis": (
        lambda: LSQQuantizer(4, axis=None),  # type: ignore[arg-type]
        ValueError,
        r"LSQQuantizer: axis must be an integer, got None",
    ),
    "process_group": (
        lambda: LSQQuantizer(4, process_group=3),
        TypeError,
        r"LSQQuantizer: process_group must be None .*, got int 3",
    ),
    "integers": (
        lambda: LSQQuantizer(4)(torch.ones(2, dtype=torch.int8)),
        TypeError,
        r"LSQQuantizer: input must be float32, bfloat16 or float16, got int8 \[2\]; convert",
    ),
    "device": (
        lambda: LSQQuantizer(4)(torch.ones(2, device="meta")),
        ValueError,
        r"LSQQuantizer: input must be on the module's device cpu, got meta; move one of them",
    ),
    "channels": (
        lambda: LSQQuantizer(4, True, True, 3)(torch.ones(2, 3)),
        ValueError,
        r"LSQQuantizer: input must have num_channels = 3 along axis 0, got \[2, 3\]",
    ),
    "no_such_axis": (
        lambda: LSQQuantizer(4, True, True, 3, axis=1).initialize(torch.ones(3)),
        ValueError,
        r"LSQQuantizer: input must have num_channels = 3 along axis 1, got \[3\]",
    ),
    "alpha": (
        lambda: PACTQuantizer(4, alpha=-1.0),
        ValueError,
        r"PACTQuantizer: alpha must be a positive number, got -1.0",
    ),
    "pact_integers": (
        lambda: PACTQuantizer(4)(torch.ones(2, dtype=torch.int8)),
        TypeError,
        r"PACTQuantizer: input must be float32, bfloat16 or float16, got int8 \[2\]",
    ),
    "groups": (
        lambda: parameter_groups([]),  # type: ignore[arg-type]
        TypeError,
        r"parameter_groups: model must be an nn.Module, got list",
    ),
    "weight_decay": (
        lambda: parameter_groups(nn.Linear(1, 1), -0.1),
        ValueError,
        r"parameter_groups: weight_decay must be a number of at least 0, got -0.1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_low_precision_step_is_refused() -> None:
    quantizer = LSQQuantizer(4)
    quantizer(floats(2, 2))
    quantizer.step.data = quantizer.step.data.bfloat16()
    with pytest.raises(TypeError, match=r"step must be float32, .* fully_shard\(quantizer\)"):
        quantizer(floats(2, 2))


def test_exported_at_top_level() -> None:
    for name in ("LSQQuantizer", "LSQPlusQuantizer", "PACTQuantizer", "parameter_groups"):
        assert name in torchquant.__all__
