"""LSQ with a step for each group of inputs: the same as a quantizer of each group alone."""

import math
from typing import Any

import pytest
import torch
from support import INF, NAN, assert_same_bits, generator
from support.learned import gradients
from torch import Tensor, nn

from torchquant import LSQQuantizer, PerGroup, functional

SIZES = ((6, 64, 32), (5, 40, 16), (3, 7, 3), (4, 5, 5), (2, 4, 1))  # C, K, group_size


def grouped(channels: int, inputs: int, size: int, bits: int = 4) -> LSQQuantizer:
    return LSQQuantizer(
        bits,
        per_channel=True,
        num_channels=channels,
        group_size=size,
        num_groups=-(-inputs // size),
    )


def weight_of(channels: int, inputs: int) -> Tensor:
    return torch.randn(channels, inputs, generator=generator(3))


@pytest.mark.parametrize(("channels", "inputs", "size"), SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_first_step_output_and_gradients(channels: int, inputs: int, size: int, bits: int) -> None:
    weight, upstream = weight_of(channels, inputs), torch.randn(channels, inputs)
    quantizer = grouped(channels, inputs, size, bits)
    got = gradients(quantizer, weight, upstream)
    out = quantizer(weight).detach()
    assert quantizer.step.shape == (channels, -(-inputs // size))
    expected = functional.fake_quantize(
        weight,
        quantizer.step.detach(),
        qmin=quantizer.qmin,
        qmax=quantizer.qmax,
        granularity=PerGroup(size),
    )
    assert_same_bits(out, expected)
    for channel in range(channels):
        for group, first in enumerate(range(0, inputs, size)):
            part = weight[channel, first : first + size]
            alone = LSQQuantizer(bits, num_features=size)
            theirs = gradients(alone, part, upstream[channel, first : first + size])
            torch.testing.assert_close(quantizer.step[channel, group], alone.step[0])
            torch.testing.assert_close(
                got["step"][channel, group], theirs["step"][0], rtol=1e-5, atol=1e-6
            )
            assert_same_bits(got["input"][channel, first : first + size], theirs["input"])


def test_the_gradient_factor_counts_the_weights_of_a_group() -> None:
    quantizer = grouped(6, 70, 32)
    assert quantizer.grad_factor(nn.Parameter(weight_of(6, 70))) == 1 / math.sqrt(32 * 7)


def test_values_that_are_not_finite_do_not_count() -> None:
    weight = weight_of(2, 10)
    weight[0, 1], weight[1, 9] = NAN, INF
    quantizer = grouped(2, 10, 4)
    assert quantizer.initialize(weight)
    for channel, group, values in (
        (0, 0, weight[0, [0, 2, 3]]),
        (1, 2, weight[1, 8:9]),
        (1, 0, weight[1, :4]),
    ):
        want = 2 * values.abs().double().mean() / math.sqrt(7)
        assert quantizer.step[channel, group].item() == pytest.approx(want.item(), rel=1e-6)


def test_a_group_of_zeros_gets_the_mean_step_of_the_others() -> None:
    weight = torch.ones(2, 4)
    weight[0, :2] = 0.0
    weight[1, :2] = 4.0
    quantizer = grouped(2, 4, 2)
    assert quantizer.initialize(weight)
    others = (quantizer.step.sum() - quantizer.step[0, 0]) / 3
    assert quantizer.step[0, 0].item() == pytest.approx(others.item(), rel=1e-6)
    assert not grouped(2, 4, 2).initialize(torch.zeros(2, 4))


def test_offsets_of_groups() -> None:
    weight = weight_of(3, 10)
    quantizer = LSQQuantizer(
        4, symmetric=False, per_channel=True, num_channels=3, group_size=4, num_groups=3
    )
    out = quantizer(weight)
    scale, zero_point = quantizer.qparams()
    assert scale.shape == zero_point.shape == (3, 3)
    alone = LSQQuantizer(4, symmetric=False)
    assert_same_bits(out[2, 8:].detach(), alone(weight[2, 8:]).detach())
    out.sum().backward()
    assert quantizer.offset is not None
    assert quantizer.offset.grad is not None


def test_a_compiled_first_step() -> None:
    weight = weight_of(5, 40)
    want = grouped(5, 40, 16)(weight).detach()
    quantizer = grouped(5, 40, 16)
    got = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(weight)
    assert_same_bits(got.detach(), want)


def test_state_dict() -> None:
    weight = weight_of(5, 40)
    quantizer, other = grouped(5, 40, 16), grouped(5, 40, 16)
    want = quantizer(weight).detach()
    other.load_state_dict(quantizer.state_dict())
    assert_same_bits(other.eval()(weight).detach(), want)
    assert "5 channels in groups of 16" in repr(quantizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size must be an integer of at least 1, got 0"),
        ({"group_size": 4, "num_groups": 0}, "num_groups must be an integer of at least 1, got 0"),
        ({"num_groups": 3}, "num_groups must be 1 without group_size, got 3; pass group_size"),
        ({"group_size": 4, "axis": 1}, "group_size must be None unless per_channel .* axis is 0"),
        (
            {"group_size": 4, "per_channel": False, "num_channels": 1},
            "group_size must be None unless per_channel is True and axis is 0, got 4",
        ),
    ],
)
def test_errors(options: dict[str, int], message: str) -> None:
    given: dict[str, Any] = {"per_channel": True, "num_channels": 2} | options
    with pytest.raises(ValueError, match=f"LSQQuantizer: {message}"):
        LSQQuantizer(4, **given)


def test_a_weight_of_another_shape() -> None:
    for shape in ((2, 9), (2, 8, 1), (2, 4)):
        with pytest.raises(ValueError, match=r"LSQQuantizer: input must be .num_channels, K. with"):
            grouped(2, 8, 4)(torch.ones(shape).reshape(shape))
