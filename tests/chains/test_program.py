"""Programs: each step has the bits of its specification, in one call for all."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import assert_same_bits, check_everywhere, floats, threads
from support.programs import NARROW, WIDE, Chain, Q, block, expected, layer_of
from torch import Tensor, nn

from torchquant.chains.program import Program, refusal
from torchquant.chains.steps import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    Add,
    AvgPool,
    Concat,
    Flatten,
    Input,
    Linear,
    Map,
    MaxPool,
    Mul,
    Output,
    Qparams,
    Upsample,
    Value,
)
from torchquant.functional import ACTIVATIONS

LAST = torch.channels_last


def check(chain: Chain, *inputs: Tensor, counts: Sequence[int] = (1, 2)) -> None:
    """The program has the specification's bits, under all instruction sets."""
    program = Program(chain.steps)
    check_everywhere(
        lambda: tuple(program.run(inputs)), tuple(expected(chain.steps, inputs)), counts
    )


def single(kind: type, *, q: Qparams | None = Q, to: Qparams | None = WIDE, **rest: Any) -> Chain:
    """A program of one step between input and output."""
    chain = Chain()
    chain.output(chain.add(kind, chain.input(q), to=to, **rest))
    return chain


SHAPES = [(1, 3, 5, 7), (2, 64, 8, 8), (3, 17, 4, 1), (5, 8, 1, 1)]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 7, 11), (4, 33)], ids=str)
def test_input_and_output(shape: tuple[int, ...]) -> None:
    chain = Chain()
    for q in (Q, NARROW, None):
        chain.output(chain.input(q))
    x = floats(*shape)
    check(chain, x, x * 2, x * 3)
    if len(shape) == 4:
        check(chain, x.contiguous(memory_format=LAST), x, x[:].flip(0))
        program = Program(chain.steps)
        results = program.run([x.contiguous(memory_format=LAST), x, x])
        assert all(result.is_contiguous(memory_format=LAST) for result in results)
        wide = floats(shape[0], shape[1] * 2, *shape[2:])[:, ::2]
        check(chain, wide, wide.transpose(2, 3).contiguous().transpose(2, 3), x)


CONVS = {
    "3x3": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "1x1": lambda: nn.Conv2d(8, 20, 1, bias=False),
    "stride": lambda: nn.Conv2d(8, 16, 3, 2, 1),
    "groups": lambda: nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "same": lambda: nn.Conv2d(8, 4, (4, 2), padding="same"),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
def test_conv(name: str, to: Qparams | None) -> None:
    for activation in ("none", "relu6"):
        chain = Chain()
        chain.output(chain.conv(chain.input(), CONVS[name](), to, activation=activation))
        check(chain, floats(2, 8, 9, 6))


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
@pytest.mark.parametrize("other", [NARROW, None], ids=["int8 residual", "float residual"])
def test_conv_with_a_residual(to: Qparams | None, other: Qparams | None) -> None:
    chain = Chain()
    x, residual = chain.input(), chain.input(other)
    module = nn.Conv2d(8, 16, 3, padding=1)
    chain.output(chain.conv(x, module, to, residual=residual, activation="relu"))
    check(chain, floats(2, 8, 5, 6), floats(2, 16, 5, 6, seed=1))


def test_conv_of_sequences() -> None:
    chain = Chain()
    x = chain.conv(chain.input(), nn.Conv1d(8, 16, 5, 2, 2), WIDE, activation="hardswish")
    chain.output(chain.conv(x, nn.Conv1d(16, 16, 3, groups=16), None))
    check(chain, floats(2, 8, 31))


@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
def test_linear(to: Qparams | None) -> None:
    for activation in ("none", "gelu"):
        chain = Chain()
        chain.output(chain.linear(chain.input(), 40, 70, to, activation=activation))
        check(chain, floats(5, 70))


def test_a_layer_with_an_activation_of_its_own() -> None:
    layer = layer_of(nn.Linear(70, 40), activation="silu")
    chain, again = Chain(), Chain()
    chain.output(chain.add(Linear, chain.input(), to=WIDE, layer=layer))
    again.output(again.add(Linear, again.input(), to=WIDE, layer=layer, activation="silu"))
    x = floats(5, 70)
    assert_same_bits(Program(chain.steps).run([x])[0], expected(again.steps, [x])[0])
    assert refusal(again.steps[1]) == (
        "Linear: the layer applies silu itself, before what the step adds"
    )


@pytest.mark.parametrize("kind", [Add, Mul], ids=["add", "mul"])
@pytest.mark.parametrize("to", [WIDE, None], ids=["int8", "float32"])
def test_sums_and_products(kind: type, to: Qparams | None) -> None:
    for activation in ("none", "relu"):
        chain = Chain()
        left, right = chain.input(), chain.input(NARROW)
        chain.output(chain.add(kind, left, right, to=to, activation=activation))
        for shape in (*SHAPES, (2, 7, 11), (4, 33)):
            check(chain, floats(*shape), floats(*shape, seed=1))


def test_products_with_a_factor_for_each_channel() -> None:
    chain = Chain()
    chain.output(chain.add(Mul, chain.input(), chain.input(NARROW), to=WIDE))
    for shape in SHAPES:
        check(chain, floats(*shape), floats(*shape[:2], 1, 1, seed=1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functions(activation: str) -> None:
    for q, to in ((Q, WIDE), (Q, None), (None, WIDE), (None, None)):
        for shape in ((2, 7, 3, 5), (3, 9)):
            check(single(Map, q=q, to=to, activation=activation), floats(*shape))


WINDOWS = [
    {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)},
    {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    {"kernel": (3, 2), "stride": (1, 3), "padding": (1, 0), "ceil_mode": True},
    {"kernel": (2, 3), "stride": (3, 2), "padding": (1, 1), "ceil_mode": True},
]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_pools(windows: dict[str, Any]) -> None:
    x = floats(2, 9, 8, 7)
    check(single(MaxPool, to=Q, **windows), x)
    for to in (WIDE, None):
        check(single(AvgPool, to=to, **windows), x)
        check(single(AvgPool, to=to, **windows, count_include_pad=False), x)
        check(single(AvgPool, to=to, **windows, divisor=5), x)


def test_pools_of_sequences_and_dilated_ones() -> None:
    row = {"kernel": (1, 3), "stride": (1, 2), "padding": (0, 1)}
    check(single(MaxPool, to=Q, **row), floats(2, 9, 14))
    check(single(AvgPool, to=WIDE, **row), floats(2, 9, 14))
    dilated = {"kernel": (3, 2), "stride": (1, 2), "padding": (1, 1), "dilation": (2, 3)}
    check(single(MaxPool, to=Q, **dilated), floats(2, 9, 14, 11))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (None, 1), (9, None)], ids=str)
def test_adaptive_pools(size: tuple[int | None, int | None]) -> None:
    for to in (WIDE, None):
        check(single(AdaptiveAvgPool, to=to, size=size), floats(2, 9, 8, 7))
    check(single(AdaptiveAvgPool, to=WIDE, size=(None, 4)), floats(2, 9, 10))


@pytest.mark.parametrize(
    ("size", "factor"), [(None, (2, 2)), (None, (3, 1)), ((11, 9), None), ((2, 3), None)], ids=str
)
def test_upsampling(size: tuple[int, int] | None, factor: tuple[int, int] | None) -> None:
    for q in (Q, None):
        check(single(Upsample, q=q, to=q, size=size, factor=factor), floats(2, 9, 5, 7))


def test_flattening_has_torchs_order() -> None:
    for q in (Q, None):
        for shape in (*SHAPES, (2, 7, 11)):
            x = floats(*shape)
            check(single(Flatten, q=q, to=q), x)
            chain = Chain()
            flat = chain.add(Flatten, chain.input(), to=Q)
            chain.output(chain.linear(flat, 6, x[0].numel(), None))
            chain.output(flat)
            check(chain, x)


def test_concatenations() -> None:
    """Parts with the same integers and with others, parts that are read again, nested ones."""
    chain = Chain()
    a, b, c = chain.input(), chain.input(), chain.input(None)
    d = chain.add(Map, b, to=Q, activation="relu")
    inner = chain.add(Concat, (a, d), to=Q)
    pooled = chain.add(
        MaxPool, inner, to=Q, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    )
    other = chain.add(Map, a, to=WIDE)
    outer = chain.add(Concat, (inner, other, c, d, d, pooled), to=Q)
    for value in (outer, inner, d, other):
        chain.output(value)
    chain.output(chain.add(Concat, (outer, a), to=NARROW))
    check(chain, *(floats(2, channels, 4, 5, seed=channels) for channels in (5, 16, 3)))


# ---------------------------------------------------------------- whole programs


def test_a_network_with_several_shapes_in_turn() -> None:
    """Plans of other shapes are remembered and do not mix."""
    chain = block()
    program = Program(chain.steps)
    inputs = [
        floats(n, 3, h, w, seed=n).contiguous(memory_format=order)
        for n, h, w in ((1, 16, 16), (2, 9, 13), (3, 16, 16), (7, 8, 8))
        for order in (torch.contiguous_format, LAST)
    ]
    wanted = [expected(chain.steps, [x]) for x in inputs]
    for count in (1, 2, 3):
        with threads(count):
            for x, results in [*zip(inputs, wanted, strict=True)] * 2:
                for got, want in zip(program.run([x]), results, strict=True):
                    assert_same_bits(got, want)
                    assert got.dim() == 2 or got.is_contiguous(
                        memory_format=LAST
                        if x.is_contiguous(memory_format=LAST)
                        else torch.contiguous_format
                    )


def test_images_can_go_through_together_or_apart() -> None:
    chain = block()
    x = floats(11, 3, 12, 12)
    program = Program(chain.steps)
    with threads(1):
        results = program.run([x])
        alone = [program.run([one]) for one in x.split(1)]
    for index, want in enumerate(results):
        assert_same_bits(torch.cat([one[index] for one in alone]), want)
    for team in (True, False):
        program._program.uses_team = team
        for together in (1, 2, 4, 11, 100):
            program._program.images_together = together
            for count in (1, 2, 4):
                with threads(count):
                    for got, want in zip(program.run([x]), results, strict=True):
                        assert_same_bits(got, want, (team, together, count))


def test_values_share_memory() -> None:
    chain = Chain()
    x = chain.input()
    for _ in range(20):
        x = chain.add(Map, x, to=Q, activation="relu")
    chain.output(x)
    program = Program(chain.steps)
    image = torch.zeros(1, 64, 16, 16)
    assert program._program.arena_bytes([image]) <= 2 * (image.numel() + 128)


def test_no_images() -> None:
    results = Program(block().steps).run([torch.zeros(0, 3, 16, 16)])
    assert [tuple(result.shape) for result in results] == [(0, 8, 8, 8), (0, 10)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_integers_cannot_represent(bad: float) -> None:
    program = Program(block().steps)
    x = floats(5, 3, 16, 16)
    for order in (torch.contiguous_format, LAST):
        y = x.contiguous(memory_format=order)
        y[4, 2, 15, 15] = bad
        for count in (1, 2):
            with threads(count):
                assert program.run([y]) is None
                assert program.run([y[:4]]) is not None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(again: Callable[[Program], Program]) -> None:
    program = Program(block().steps)
    x = floats(2, 3, 16, 16)
    results = program.run([x])
    copied = again(program)
    assert copied.steps[1].layer is not program.steps[1].layer
    del program
    for got, want in zip(copied.run([x]), results, strict=True):
        assert_same_bits(got, want)


def test_weights_outlive_their_layers() -> None:
    """A program never reads memory that was given back, whatever happens to its layers."""
    chain = Chain()
    chain.output(chain.linear(chain.input(), 64, 512, None))
    program = Program(chain.steps)
    x = floats(3, 512)
    results = program.run([x])
    layer = chain.steps[1].layer
    layer.packed.data = torch.zeros(1, 1, dtype=torch.int8)
    layer.qweight_scale = None
    layer.bias.data = torch.zeros(1)
    assert_same_bits(program.run([x])[0], results[0])


# ---------------------------------------------------------------- refusals

VALUE, OTHER = Value(0, Q), Value(1, Q)
FLOAT = Value(1, None)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "Program: steps must hold an Input and an Output"),
        ([Input(VALUE, 0)], "Program: steps must hold an Input and an Output"),
        (
            [Input(VALUE, 0), Output(OTHER, 0)],
            "Program: step 1 must read values that an earlier step wrote, got value 1",
        ),
        (
            [Input(VALUE, 0), Input(VALUE, 1)],
            "Program: step 1 must write a value of its own, got value 0",
        ),
        (
            [Input(VALUE, 0), Output(VALUE, 0), Output(VALUE, 0)],
            "Program: step 2 writes result 0 once more",
        ),
        ([Input(VALUE, 0), Output(VALUE, 1)], "Program: no step writes result 0"),
        (
            [Input(VALUE, 0), Output(Value(0, WIDE), 0)],
            f"Program: value 0 must have the same qparams in all steps, got {Q} and {WIDE}",
        ),
        (
            [Input(FLOAT, 0), AdaptiveMaxPool(FLOAT, Value(2, None), (1, 1))],
            "Program: step 1 is not supported: AdaptiveMaxPool: input must be int8",
        ),
        (
            [Input(Value(0, Qparams(0.0, 0)), 0)],
            "Program: scale must be a normal number, got 0",
        ),
        (
            [Input(Value(0, Qparams(1.0, 9, -8, 7)), 0)],
            "Program: qmin <= zero_point <= qmax must lie within -128 .. 127, got -8, 9, 7",
        ),
    ],
)
def test_steps_that_do_not_fit(steps: list[Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Program(steps)
    assert str(error.value).partition("\n")[0] == message


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (AvgPool(FLOAT, OTHER, (1, 1), (1, 1), (0, 0)), None),
        (AdaptiveMaxPool(FLOAT, FLOAT, (1, 1)), "AdaptiveMaxPool: input must be int8"),
        (MaxPool(FLOAT, FLOAT, (1, 1), (1, 1), (0, 0)), "MaxPool: input must be int8"),
        (Concat((FLOAT,), OTHER), None),
        (Upsample(FLOAT, OTHER), "Upsample: input and output must have the same qparams"),
        (Map(FLOAT, OTHER, "relu"), None),
    ],
)
def test_steps_that_are_not_supported(step: Any, reason: str | None) -> None:
    assert refusal(step) == reason
    assert Program.supports(step) == (reason is None)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "Program.run: inputs must be 1 tensors, got 0"),
        (
            [torch.zeros(1, 4, 9, 9)],
            "Program: convolution: input must have 3 channels, got [1, 4, 9, 9]",
        ),
        (
            [torch.zeros(1, 3)],
            "Program: convolution: input must be [n, c, h, w] or [n, c, l], got [1, 3]",
        ),
        (
            [torch.zeros(3)],
            "Program.run: argument 0 must be [n, c], [n, c, l] or [n, c, h, w], got float32 [3]",
        ),
        (
            [torch.zeros(1, 3, 9, 9).bfloat16()],
            "Program.run: argument 0 must be a float32 tensor on the CPU, got bfloat16 "
            "[1, 3, 9, 9]",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs: list[Tensor], message: str) -> None:
    program = Program(block().steps)
    with pytest.raises(ValueError) as error:
        program.run(inputs)
    assert str(error.value) == message


def test_shapes_that_do_not_fit() -> None:
    chain = single(AvgPool, kernel=(9, 9), stride=(1, 1), padding=(0, 0))
    with pytest.raises(ValueError, match="at least as large as the kernel"):
        Program(chain.steps).run([torch.zeros(1, 2, 5, 5)])
    chain = Chain()
    chain.output(chain.add(Add, chain.input(), chain.input(), to=Q))
    with pytest.raises(ValueError, match="both inputs must have one shape"):
        Program(chain.steps).run([torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 5, 4)])


def test_a_layer_with_another_input_scale_is_refused() -> None:
    chain = Chain()
    chain.output(chain.linear(chain.input(), 3, 4, None))
    chain.steps[1].layer.input_scale.fill_(0.25)
    with pytest.raises(ValueError, match=r"must have the layer's scale 0\.25"):
        Program(chain.steps)
