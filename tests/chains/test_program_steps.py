"""Steps that move channels and pixels, scale channels, or work on floats: the specified bits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import check_everywhere, floats
from support.programs import NARROW, WIDE, Chain, Q, expected, layer_of
from torch import Tensor, nn

from torchquant import functional
from torchquant.chains.program import Program
from torchquant.chains.steps import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    Add,
    Affine,
    AvgPool,
    Channels,
    Concat,
    Crop,
    Flatten,
    Linear,
    Map,
    MaxPool,
    Mul,
    Norm,
    Output,
    Pad,
    PixelShuffle,
    Qparams,
    Upsample,
)
from torchquant.configs import QuantizationConfig, Static, Weights

LAST = torch.channels_last
BOTH = pytest.mark.parametrize("q", [Q, None], ids=["int8", "float32"])


def check(chain: Chain, *inputs: Tensor, counts: Sequence[int] = (1, 2)) -> None:
    program = Program(chain.steps)
    check_everywhere(
        lambda: tuple(program.run(inputs)), tuple(expected(chain.steps, inputs)), counts
    )


def single(kind: type, *, q: Qparams | None = Q, to: Qparams | None = Q, **rest: Any) -> Chain:
    chain = Chain()
    chain.output(chain.add(kind, chain.input(q), to=to, **rest))
    return chain


def shuffle(channels: int, groups: int) -> tuple[int, ...]:
    return tuple(torch.arange(channels).view(groups, -1).t().flatten().tolist())


INDICES = {
    "slice": tuple(range(3, 19)),
    "shuffle by 2": shuffle(24, 2),
    "shuffle by 3": shuffle(24, 3),
    "shuffle by 4": shuffle(24, 4),
    "shuffle by 6": shuffle(24, 6),
    "reversed": tuple(range(23, -1, -1)),
    "some twice": (5, 5, 0, 23, 7),
    "almost a shuffle": (*shuffle(24, 2)[:-1], 22),
}


@BOTH
@pytest.mark.parametrize("name", INDICES)
def test_channels(name: str, q: Qparams | None) -> None:
    for shape in ((2, 24, 3, 5), (3, 24), (2, 24, 7)):
        check(single(Channels, q=q, to=q, index=INDICES[name]), floats(*shape))


@BOTH
def test_wide_shuffles(q: Qparams | None) -> None:
    for channels, groups in ((232, 2), (270, 3), (260, 4), (2, 2)):
        chain = single(Channels, q=q, to=q, index=shuffle(channels, groups))
        check(chain, floats(2, channels, 2, 3))


@BOTH
def test_crops(q: Qparams | None) -> None:
    end = 2**31 - 1
    for begin, to in (((1, 2), (-1, end)), ((0, -3), (4, -1)), ((-4, 0), (99, 5))):
        check(single(Crop, q=q, to=q, begin=begin, end=to), floats(2, 9, 6, 7))
    check(single(Crop, q=q, to=q, begin=(0, 2), end=(end, -2)), floats(2, 9, 7))


@BOTH
def test_padding(q: Qparams | None) -> None:
    for before, after in (((1, 2), (0, 3)), ((0, 0), (0, 0)), ((2, 0), (1, 0))):
        check(single(Pad, q=q, to=q, before=before, after=after), floats(2, 9, 3, 4))
    check(single(Pad, q=q, to=q, before=(0, 2), after=(0, 1)), floats(2, 9, 4))


@BOTH
def test_pixel_shuffles(q: Qparams | None) -> None:
    for factor in (2, 3):
        x = floats(2, 3 * factor * factor, 3, 4)
        check(single(PixelShuffle, q=q, to=q, factor=factor), x)
        x = floats(2, 5, 3 * factor, 2 * factor)
        check(single(PixelShuffle, q=q, to=q, factor=factor, inverse=True), x)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (None, 1)], ids=str)
def test_adaptive_max_pools(size: tuple[int | None, int | None]) -> None:
    check(single(AdaptiveMaxPool, size=size), floats(2, 70, 8, 7))


SIZES = [(1, 3, 5, 7), (2, 64, 4, 4), (3, 17, 4, 1), (5, 300), (2, 24, 7)]


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
@pytest.mark.parametrize("q", [Q, None], ids=["of int8", "of float32"])
def test_numbers_for_each_channel(q: Qparams | None, to: Qparams | None) -> None:
    for shape in SIZES:
        gain, shift = floats(shape[1], seed=1), floats(shape[1], seed=2)
        for numbers in ((gain, shift), (gain, None), (None, shift), (None, None)):
            for activation in ("none", "relu6", "silu"):
                rest = {"channels": shape[1], "gain": numbers[0], "shift": numbers[1]}
                chain = single(Affine, q=q, to=to, **rest, activation=activation)
                check(chain, floats(*shape), counts=(2,))


def test_a_product_and_a_sum_for_each_channel_have_one_rounding() -> None:
    x = torch.full((1, 1, 1, 1), 1.0 + 2.0**-12)
    chain = single(
        Affine, q=None, to=None, channels=1, gain=x.flatten(), shift=torch.tensor([-1.0])
    )
    (got,) = Program(chain.steps).run([x])
    assert got.item() == 2.0**-11 + 2.0**-24


def test_integers_show_the_one_rounding_too() -> None:
    """The sum is what the product's rounding would have lost."""
    x = torch.full((1, 64, 1, 1), 16 * Q.scale)
    gain = 1000 * floats(64)
    shift = -(functional.dequantize(torch.full((64,), 19).char(), Q.scale, Q.zero_point) * gain)
    to = Qparams(2.0**-17, 0)
    chain = single(Affine, to=to, channels=64, gain=gain, shift=shift)
    assert bool((expected(chain.steps, [x])[0] != 0).any())
    check(chain, x)


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
@pytest.mark.parametrize("other", [NARROW, None], ids=["int8 residual", "float residual"])
def test_residuals(other: Qparams | None, to: Qparams | None) -> None:
    """Of linear layers, on vectors and on images, and of numbers for each channel."""
    for shape in ((5, 40), (2, 40, 3, 2)):
        chain = Chain()
        x, residual = chain.input(), chain.input(other)
        y = chain.linear(x, 70, 40, to, residual=residual, activation="relu")
        chain.output(y)
        check(chain, floats(*shape), floats(shape[0], 70, *shape[2:], seed=1))
        for q in (Q, None):
            chain = Chain()
            x, residual = chain.input(q), chain.input(other)
            rest = {"channels": 40, "gain": floats(40, seed=3), "activation": "gelu"}
            chain.output(chain.add(Affine, x, to=to, residual=residual, **rest))
            check(chain, floats(*shape), floats(*shape, seed=1))


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
def test_linear_layers_on_images(to: Qparams | None) -> None:
    """Also with zero points of the weight, and on a part of another image's channels."""
    config = QuantizationConfig(Weights(symmetric=False), Static())
    for layer in (layer_of(nn.Linear(33, 50)), layer_of(nn.Linear(33, 50), config=config)):
        chain = Chain()
        chain.output(chain.add(Linear, chain.input(), to=to, layer=layer, activation="gelu"))
        check(chain, floats(2, 33, 3, 5))
        check(chain, floats(4, 33))
        chain = Chain()
        part = chain.add(Channels, chain.input(), to=Q, index=tuple(range(33)))
        first = chain.add(Linear, part, to=Q, layer=layer)
        chain.output(chain.add(Linear, part, to=to, layer=layer, residual=first))
        check(chain, floats(2, 40, 3, 5))
        check(chain, floats(4, 40))


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
@pytest.mark.parametrize("q", [Q, None], ids=["of int8", "of float32"])
def test_norms_of_the_channels(q: Qparams | None, to: Qparams | None) -> None:
    for shape in ((2, 40, 3, 5), (3, 70)):
        numbers = floats(shape[1], seed=1), floats(shape[1], seed=2)
        for weight, bias in (numbers, (None, None)):
            rest = {"channels": shape[1], "eps": 1e-5, "weight": weight, "bias": bias}
            check(single(Norm, q=q, to=to, **rest), floats(*shape))
    chain = Chain()  # of a part of another image, into a part of a concatenation
    part = chain.add(Channels, chain.input(None), to=None, index=tuple(range(2, 20)))
    normed = chain.add(Norm, part, to=None, channels=18, eps=1e-5)
    chain.output(chain.add(Concat, (part, normed), to=None))
    check(chain, floats(2, 24, 3, 5))


@pytest.mark.parametrize("kind", [Add, Mul], ids=["add", "mul"])
@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
@pytest.mark.parametrize("sides", [(None, None), (Q, None), (None, NARROW)], ids=str)
def test_sums_and_products_of_floats(kind: type, to: Qparams | None, sides: Any) -> None:
    for activation in ("none", "relu", "silu"):
        chain = Chain()
        left, right = (chain.input(q) for q in sides)
        chain.output(chain.add(kind, left, right, to=to, activation=activation))
        for shape in SIZES:
            check(chain, floats(*shape), floats(*shape, seed=1), counts=(2,))
        if kind is Mul:
            check(chain, floats(2, 64, 4, 4), floats(2, 64, 1, 1, seed=1))


WINDOWS = [
    {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    {"kernel": (3, 2), "stride": (1, 3), "padding": (1, 0), "ceil_mode": True},
    {"kernel": (2, 3), "stride": (3, 2), "padding": (1, 1), "ceil_mode": True},
]


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
def test_averages_of_floats(to: Qparams | None) -> None:
    x = floats(2, 19, 8, 7)
    for windows in WINDOWS:
        for rest in ({}, {"count_include_pad": False}, {"divisor": 5}):
            chain = single(AvgPool, q=None, to=to, **windows, **rest)
            check(chain, x)
    for size in ((1, 1), (3, 2), (None, 1)):
        check(single(AdaptiveAvgPool, q=None, to=to, size=size), x)
    row = {"kernel": (1, 3), "stride": (1, 2), "padding": (0, 1)}
    check(single(AvgPool, q=None, to=to, **row), floats(2, 9, 14))


def test_float_values_through_functions_and_concatenations() -> None:
    chain = Chain()
    a, b = chain.input(None), chain.input(Q)
    part = chain.add(Channels, a, to=None, index=tuple(range(1, 6)))
    chain.output(chain.add(Map, part, to=None, activation="gelu"))
    chain.output(chain.add(Map, part, to=WIDE, activation="silu"))
    whole = chain.add(Concat, (part, b, a), to=None)
    chain.output(whole)
    chain.output(chain.add(Concat, (whole, part), to=NARROW))
    check(chain, floats(2, 8, 3, 5), floats(2, 4, 3, 5, seed=1))


# ---------------------------------------------------------------- values that lie in others


def arena(chain: Chain, *inputs: Tensor) -> int:
    return Program(chain.steps)._program.arena_bytes(list(inputs))


def test_dense_blocks() -> None:
    """Each concatenation has all values of the one before: they all lie in the last one."""
    chain = Chain()
    parts = [chain.input()]
    for index in range(5):
        whole = chain.add(Concat, tuple(parts), to=Q)
        conv = nn.Conv2d(16 + 8 * index, 8, 3, padding=1)
        parts.append(chain.conv(whole, conv, Q, activation="relu"))
    last = chain.add(Concat, tuple(parts), to=Q)
    chain.output(last)
    x = floats(2, 16, 9, 8)
    check(chain, x)
    assert arena(chain, x[:1]) <= (16 + 5 * 8) * 72 + 2 * 64


def test_shuffled_blocks() -> None:
    """Half of the channels go through, the other half through a branch, then all are mixed."""
    chain = Chain()
    x = chain.input()
    for index in range(3):
        left = chain.add(Channels, x, to=Q, index=tuple(range(20)))
        right = chain.add(Channels, x, to=Q, index=tuple(range(20, 40)))
        right = chain.conv(right, nn.Conv2d(20, 20, 1), Q, activation="relu")
        right = chain.conv(right, nn.Conv2d(20, 20, 3, padding=1, groups=20), Q)
        right = chain.conv(right, nn.Conv2d(20, 20, 1), Q, activation="relu")
        whole = chain.add(Concat, (left, right), to=Q)
        x = chain.add(Channels, whole, to=Q, index=shuffle(40, 2))
        if index == 1:
            chain.output(left)
    chain.output(x)
    check(chain, floats(2, 40, 6, 7))


def test_steps_on_parts_of_images() -> None:
    """Every step reads and writes pixels that are apart."""
    for q in (Q, None):
        chain = Chain()
        x = chain.input(q)
        part = chain.add(Channels, x, to=q, index=tuple(range(3, 21)))
        small = chain.add(Crop, part, to=q, begin=(1, 1), end=(-1, -1))
        made = [
            chain.add(Map, small, to=q, activation="relu"),
            chain.add(Add, small, small, to=q),
            chain.add(Affine, small, to=q, channels=18, shift=floats(18)),
            chain.add(Channels, small, to=q, index=shuffle(18, 3)),
            chain.add(Upsample, chain.add(Upsample, small, to=q, size=(2, 2)), to=q, size=(4, 5)),
            chain.add(AdaptiveAvgPool, small, to=q, size=(4, 5)),
            chain.add(
                Pad,
                chain.add(Crop, small, to=q, begin=(1, 1), end=(9, 9)),
                to=q,
                before=(1, 1),
                after=(0, 0),
            ),
        ]
        if q is not None:
            windows = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}
            made.append(chain.add(MaxPool, small, to=q, **windows))
            made.append(chain.conv(small, nn.Conv2d(18, 7, 3, padding=1), q))
            depthwise = nn.Conv2d(18, 18, 3, padding=1, groups=18)
            made.append(chain.conv(small, depthwise, q, residual=small))
        chain.output(chain.add(Concat, tuple(made), to=q))
        flat = chain.add(Flatten, small, to=q)
        chain.output(flat)
        chain.output(small)
        pooled = chain.add(AdaptiveAvgPool, small, to=q, size=(1, 1))
        chain.output(chain.add(Flatten, pooled, to=q))
        check(chain, floats(2, 24, 6, 7))


def test_a_result_in_channels_last() -> None:
    chain = Chain()
    value = chain.input()
    chain.steps += [Output(value, 0, True), Output(value, 1)]
    x = floats(2, 5, 3, 4)
    for given in (x, x.contiguous(memory_format=LAST)):
        first, second = Program(chain.steps).run([given])
        assert first.is_contiguous(memory_format=LAST)
        assert second.is_contiguous(memory_format=LAST) == (given is not x)
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("chain", "shape", "message"),
    [
        (
            single(Affine, channels=3),
            (1, 4, 2, 2),
            "Program: numbers for each channel: input must have 3 channels, got [1, 4, 2, 2]",
        ),
        (
            single(Channels, index=(0, 4)),
            (1, 4, 2, 2),
            "Program: channels: channel 4 must be in the input, got [1, 4, 2, 2]",
        ),
        (
            single(Crop, begin=(0, 2), end=(9, -2)),
            (1, 4, 3, 4),
            "Program: crop: a pixel must remain, got [1, 4, 3, 4]",
        ),
        (
            single(PixelShuffle, factor=2),
            (1, 6, 3, 4),
            "Program: pixel shuffle: input must be [n, c, h, w] with channels, divided by the "
            "factor, that the factor 2 divides, got [1, 6, 3, 4]",
        ),
    ],
)
def test_shapes_that_do_not_fit(chain: Chain, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Program(chain.steps).run([torch.zeros(shape)])
    assert str(error.value).partition("\n")[0] == message


def test_a_batch_norm_as_two_numbers_for_each_channel() -> None:
    norm = nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.copy_(floats(8, seed=tensor.numel()))
        norm.running_var.copy_(floats(8).abs() + 0.5)
        x = floats(2, 8, 3, 3)
        numbers = functional.norm_as_affine(
            norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        )
        torch.testing.assert_close(functional.channel_affine(x, *numbers), norm(x))
