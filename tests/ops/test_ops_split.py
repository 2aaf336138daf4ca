"""linear_dynamic_split: several layers on one input give the bits that each gives alone."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    Shape,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from torch import Tensor

from torchquant import functional, ops
from torchquant._extension import load

OUTPUTS = (1, 5, 16, 17, 31, 32, 48, 63, 64, 100, 128)  # multiples of a tile's 16 and others


@dataclass
class Layers:
    """What one call takes: the layers' tensors, one by one and concatenated."""

    weights: list[Tensor]
    scales: list[Tensor]
    zero_points: list[Tensor] | None
    biases: list[Tensor] | None
    activations: list[str]
    symmetric: bool = True
    output_dtype: torch.dtype | None = None

    @property
    def packed(self) -> Tensor:
        return torch.cat([ops.pack_weight(weight) for weight in self.weights])

    def arguments(self) -> dict[str, Any]:
        def together(parts: list[Tensor] | None) -> Tensor | None:
            return None if parts is None else torch.cat(parts)

        return {
            "packed": self.packed,
            "weight_scale": together(self.scales),
            "weight_zero_point": together(self.zero_points),
            "bias": together(self.biases),
            "out_features": [weight.shape[0] for weight in self.weights],
            "symmetric": self.symmetric,
            "activations": self.activations,
            "output_dtype": self.output_dtype,
        }

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every layer by itself."""
        return tuple(
            ops.linear_dynamic(
                x,
                ops.pack_weight(weight),
                self.scales[i],
                None if self.zero_points is None else self.zero_points[i],
                None if self.biases is None else self.biases[i],
                out_features=weight.shape[0],
                symmetric=self.symmetric,
                activation=self.activations[i] if self.activations else "none",
                output_dtype=self.output_dtype,
            )
            for i, weight in enumerate(self.weights)
        )

    def together(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.linear_dynamic_split(x, **self.arguments()))


def layers(
    outputs: tuple[int, ...],
    inputs: int,
    *,
    zero_points: bool = False,
    biases: bool = True,
    activations: tuple[str, ...] = (),
    seed: int = 0,
    **options: Any,
) -> Layers:
    def each(make: Callable[[int, int], Tensor]) -> list[Tensor]:
        return [make(n, seed + number) for number, n in enumerate(outputs)]

    return Layers(
        weights=each(lambda n, s: integers(n, inputs, seed=s)),
        scales=each(lambda n, s: positive(n, seed=s)),
        zero_points=each(lambda n, s: integers(n, seed=s).int()) if zero_points else None,
        biases=each(lambda n, s: floats(n, seed=s)) if biases else None,
        activations=list(activations),
        **options,
    )


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# ---------------------------------------------------------------- the same bits


@settings(max_examples=150)
@given(data=st.data())
def test_bits_of_the_layers_alone(data):
    """On every instruction set, for any number of layers of any size and kind."""
    outputs = tuple(data.draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, max_size=5)))
    inputs = data.draw(st.integers(1, 200) | st.sampled_from((256, 384, 577)))
    rows = data.draw(st.integers(0, 40) | st.sampled_from((64, 130)))
    names = st.lists(st.sampled_from(ACTIVATIONS), min_size=len(outputs), max_size=len(outputs))
    case = layers(
        outputs,
        inputs,
        zero_points=data.draw(st.booleans()),
        biases=data.draw(st.booleans()),
        activations=tuple(data.draw(st.just([]) | names)),
        symmetric=data.draw(st.booleans()),
        output_dtype=data.draw(st.sampled_from((None, *FLOATS))),
        seed=data.draw(st.integers(0, 9)),
    )
    x = floats(rows, inputs, seed=len(outputs)).to(data.draw(st.sampled_from(FLOATS)))
    check_everywhere(lambda: case.together(x), case.alone(x), (1, 2))


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        (Shape(600, 1152, 384), (384, 384, 384)),
        (Shape(70, 1100, 300), (1000, 1, 99)),
        (Shape(1, 3072, 2048), (2048, 512, 512)),
        (Shape(33, 96, 4097), (16, 80)),
        (Shape(2, 5000, 96), (2500, 2500)),
        (Shape(1025, 33, 130), (32, 1)),
    ],
    ids=["encoder", "odd", "grouped_queries", "deep", "wide", "many_rows"],
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_bits_of_large_layers(shape, outputs, symmetric):
    """Several panels of rows, slices of K and threads that share a layer or span two."""
    assert sum(outputs) == shape.outputs
    case = layers(outputs, shape.inputs, zero_points=not symmetric, symmetric=symmetric)
    x = floats(shape.rows, shape.inputs)
    check_everywhere(lambda: case.together(x), case.alone(x), (1, 2, 3))


def test_bits_of_the_specification():
    names = ("gelu", "none", "silu")
    for symmetric, zero_points in itertools.product((True, False), repeat=2):
        case = layers(
            (20, 16, 3), 70, zero_points=zero_points, activations=names, symmetric=symmetric
        )
        x = floats(6, 70)
        for i, got in enumerate(case.together(x)):
            expected = functional.linear_dynamic(
                x,
                case.weights[i],
                case.scales[i],
                case.zero_points[i] if zero_points else None,
                case.biases[i],
                symmetric=symmetric,
                activation=names[i],
            )
            assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_memory_layout(isa, layout):
    case = layers((48, 5, 16), 77, symmetric=False)
    x = floats(9, 77)
    for dtype in FLOATS:
        got, expected = case.together(in_layout(x.to(dtype), layout)), case.alone(x.to(dtype))
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"{layout}, {dtype}")


@pytest.mark.parametrize("leading", [(0,), (2, 0, 3), (2, 3), (1, 1), ()], ids=str)
def test_leading_dimensions(isa, leading):
    case = layers((17, 32), 40, activations=("none", "relu"))
    x = floats(*leading, 40)
    got = case.together(x)
    assert [tuple(y.shape) for y in got] == [(*leading, 17), (*leading, 32)]
    for a, b in zip(got, case.alone(x), strict=True):
        assert_same_bits(a, b)


def test_rows_that_are_not_finite(isa):
    """NaN in all outputs of all layers for such a row; the others are what they are without it."""
    case = layers((16, 33), 64)
    x = sprinkle(floats(20, 64), NOT_FINITE, seed=3)
    broken = ~x.isfinite().all(-1)
    assert 0 < broken.sum() < 20
    for got, expected in zip(case.together(x), case.alone(x), strict=True):
        assert got[broken].isnan().all()
        assert_same_bits(got[~broken], expected[~broken])


def test_outputs_are_tensors_of_their_own():
    case = layers((16, 16, 5), 64)
    x = floats(4, 64)
    first, second, third = case.together(x)
    storages = {y.untyped_storage().data_ptr() for y in (first, second, third)}
    assert len(storages) == 3
    assert all(y.is_contiguous() for y in (first, second, third))
    before = second.clone()
    first.fill_(0)
    assert torch.equal(second, before)


def test_a_member_s_packed_weight_may_be_a_view_of_all():
    case = layers((48, 16, 32), 100, biases=False)
    packed, x = case.packed, floats(7, 100)
    together = ops.linear_dynamic_split(
        x, packed, torch.cat(case.scales), out_features=[48, 16, 32]
    )
    tile = 0
    for weight, scale, expected in zip(case.weights, case.scales, together, strict=True):
        tiles = -(-len(weight) // 16)
        view = packed[tile : tile + tiles]
        got = ops.linear_dynamic(x, view, scale, out_features=len(weight))
        assert_same_bits(got, expected)
        tile += tiles


def test_the_entry_without_the_dispatcher_s_parsing():
    """The same operator; inside an autocast region the outputs have autocast's type."""
    case, x = layers((48, 16), 100, activations=("gelu", "none")), floats(7, 100)
    options = case.arguments()
    options.pop("output_dtype")
    fast = load().linear_dynamic_split
    for got, expected in zip(fast(x, *options.values()), case.alone(x), strict=True):
        assert_same_bits(got, expected)
    case.output_dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(fast(x, *options.values()), case.alone(x), strict=True):
            assert_same_bits(got, expected)


# ---------------------------------------------------------------- compiled, traced


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed_sizes", "symbolic_sizes"])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_compiles_in_one_graph(dynamic, trained):
    case = layers((20, 16, 3), 70, zero_points=True, activations=("gelu", "none", "silu"))
    options = case.arguments()

    def call(x: Tensor) -> list[Tensor]:
        y = ops.linear_dynamic_split(x + 0, **options)
        return [part * 2 for part in y]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (6, 3):
        x = floats(rows, 70, seed=rows).requires_grad_(trained)
        got, expected = compiled(x), call(x)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.detach(), b.detach())
        if trained:
            grads = [torch.autograd.grad(sum(y.sum() for y in ys), x)[0] for ys in (got, expected)]
            torch.testing.assert_close(grads[0], grads[1])


def test_exports():
    class Projections(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            case = layers((20, 16), 70)
            self.register_buffer("packed", case.packed)
            self.register_buffer("weight_scale", torch.cat(case.scales))

        def forward(self, x: Tensor) -> list[Tensor]:
            return ops.linear_dynamic_split(
                x, self.packed, self.weight_scale, out_features=[20, 16]
            )

    module, rows = Projections(), torch.export.Dim("rows")
    program = torch.export.export(module, (floats(6, 70),), dynamic_shapes=({0: rows},))
    for x in (floats(6, 70), floats(3, 70)):
        for got, expected in zip(program.module()(x), module(x), strict=True):
            assert_same_bits(got, expected)


def test_meta_tensors_give_shapes():
    options = layers((20, 16), 70).arguments()
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}
    got = ops.linear_dynamic_split(torch.empty(2, 3, 70, device="meta").half(), **on_meta)
    assert [(y.device.type, tuple(y.shape), y.dtype) for y in got] == [
        ("meta", (2, 3, 20), torch.half),
        ("meta", (2, 3, 16), torch.half),
    ]


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("activations", [(), ("gelu", "none", "silu")], ids=["linear", "active"])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_layers_sum(activations, zero_points, dtype):
    case = layers((20, 16, 3), 70, zero_points=zero_points, activations=activations)
    x, directions = floats(2, 3, 70).to(dtype), [floats(2, 3, n, seed=n) for n in (20, 16, 3)]

    def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        losses = [(y.float() * d).sum() for y, d in zip(outputs, directions, strict=True)]
        return torch.autograd.grad(sum(losses), leaves)

    input, bias = leaf(x), leaf(torch.cat(case.biases))
    options = {**case.arguments(), "bias": bias}
    got = gradients(tuple(ops.linear_dynamic_split(input, **options)), [input, bias])

    alone, case.biases = leaf(x), [leaf(part) for part in case.biases]
    expected = gradients(case.alone(alone), [alone, *case.biases])
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], torch.cat(expected[1:]))

    parts = []
    for i in range(3):  # and the sum is one of three terms
        alone = leaf(x)
        loss = (case.alone(alone)[i].float() * directions[i]).sum()
        parts.append(torch.autograd.grad(loss, alone)[0].double())
        assert parts[-1].abs().max() > 0
    eps = 4 * torch.finfo(dtype).eps
    scale = float(sum(part.abs() for part in parts).max())
    torch.testing.assert_close(got[0].double(), sum(parts), rtol=eps, atol=eps * scale)


def test_one_layer_s_gradient_leaves_the_others_out():
    case, x = layers((20, 16), 70), leaf(floats(6, 70))
    first, _ = case.together(x)
    expected = torch.autograd.grad(case.alone(x)[0].sum(), x)[0]
    assert_same_bits(torch.autograd.grad(first.sum(), x)[0], expected)


def test_values_in_training_are_those_without():
    case = layers((20, 16), 70, activations=("gelu", "tanh"), symmetric=False)
    x = leaf(floats(6, 70))
    trained = case.together(x)
    assert all(y.requires_grad for y in trained)
    with torch.no_grad():
        plain = case.together(x)
    with torch.inference_mode():
        inferred = case.together(x)
    for a, b, c in zip(trained, plain, inferred, strict=True):
        assert_same_bits(b, a.detach())
        assert_same_bits(c, b)
        assert not b.requires_grad and c.is_inference()


def test_gradients_of_gradients():
    def second(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
        x = leaf(floats(6, 70) / 4)
        loss = sum(y.square().sum() for y in function(x))
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    case = layers((20, 16), 70, activations=("gelu", "silu"))
    assert_same_bits(second(case.together), second(case.alone))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it sets this up
def test_forward_mode_gradients_raise():
    case, x = layers((20, 16), 70), floats(6, 70)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="jvp is not implemented"),
    ):
        case.together(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


# ---------------------------------------------------------------- refusals

CASE = layers((20, 5), 70, zero_points=True)
GOOD, X = CASE.arguments(), floats(6, 70)
PACKED, SCALE, BIAS = GOOD["packed"], GOOD["weight_scale"], GOOD["bias"]
ZERO = GOOD["weight_zero_point"]
NOT_HELD = "packed must hold 3 tiles of 16 outputs for out_features [20, 5], got int8 "
REMEDY = "; concatenate what torchquant.ops.pack_weight returned for each weight"
PER_CHANNEL = "[25] with one value per output channel, got"

REFUSALS: dict[str, tuple[Tensor, dict[str, Any], type[Exception], str]] = {
    "no layers": (
        X,
        {"out_features": []},
        ValueError,
        "out_features must name at least one layer, got none",
    ),
    "a layer without outputs": (
        X,
        {"out_features": [20, 0, 5]},
        ValueError,
        f"out_features must each be between 1 and {2**40}, got [20, 0, 5]",
    ),
    "more outputs than a sum can hold": (
        X,
        {"out_features": [20, 2**63 - 1]},
        ValueError,
        f"out_features must each be between 1 and {2**40}, got [20, {2**63 - 1}]",
    ),
    "too few activations": (
        X,
        {"activations": ["relu"]},
        ValueError,
        "activations must be empty or one name for each of the 2 layers, got 1 name",
    ),
    "unknown activation": (
        X,
        {"activations": ["relu", "mish"]},
        ValueError,
        "activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, got 'mish'",
    ),
    "a layer too few": (
        X,
        {"packed": PACKED[:2]},
        ValueError,
        f"{NOT_HELD}[2, 2176]{REMEDY}",
    ),
    "a layer too many": (
        X,
        {"packed": torch.cat([PACKED, PACKED[:1]])},
        ValueError,
        f"{NOT_HELD}[4, 2176]{REMEDY}",
    ),
    "one long row": (
        X,
        {"packed": PACKED.reshape(-1)},
        ValueError,
        f"{NOT_HELD}[6528]{REMEDY}",
    ),
    "packed weight's type": (
        X,
        {"packed": PACKED.int()},
        TypeError,
        "packed must be the int8 result of pack_weight, got int32 [3, 2176]",
    ),
    "layers in another order": (
        X,
        {"out_features": [5, 20]},
        ValueError,
        "packed was made for out_features = 20, in_features = 70 (layout 1), but this call has "
        "out_features = 5, in_features = 70 (layout 1); pack the weight again with pack_weight",
    ),
    "layers that were packed as one": (
        X,
        {"packed": ops.pack_weight(integers(36, 70))},
        ValueError,
        "packed was made for out_features = 36, in_features = 70 (layout 1), but this call has "
        "out_features = 20, in_features = 70 (layout 1); pack the weight again with pack_weight",
    ),
    "one scale for all": (
        X,
        {"weight_scale": SCALE[:1]},
        ValueError,
        f"weight_scale must be float32 {PER_CHANNEL} float32 [1]",
    ),
    "scales too many": (
        X,
        {"weight_scale": torch.cat([SCALE, SCALE])},
        ValueError,
        f"weight_scale must be float32 {PER_CHANNEL} float32 [50]",
    ),
    "scale's type": (
        X,
        {"weight_scale": SCALE.bfloat16()},
        TypeError,
        "weight_scale must be float32, got bfloat16 [25]; convert it with .to(torch.float32)",
    ),
    "zero points of one layer": (
        X,
        {"weight_zero_point": ZERO[:20]},
        ValueError,
        f"weight_zero_point must be int32 {PER_CHANNEL} int32 [20]",
    ),
    "zero point's type": (
        X,
        {"weight_zero_point": ZERO.long()},
        TypeError,
        "weight_zero_point must be int32, got int64 [25]; convert it with .to(torch.int32)",
    ),
    "zero point's value": (
        X,
        {"weight_zero_point": torch.full((25,), 128, dtype=torch.int32)},
        ValueError,
        "weight_zero_point must be from -128 to 127, got 128",
    ),
    "bias of one layer": (
        X,
        {"bias": BIAS[:20]},
        ValueError,
        f"bias must be float32 {PER_CHANNEL} float32 [20]",
    ),
    "bias's type": (
        X,
        {"bias": BIAS.half()},
        TypeError,
        "bias must be float32, got float16 [25]; convert it with .to(torch.float32)",
    ),
    "double input": (
        X.double(),
        {},
        TypeError,
        "input must be float32, bfloat16 or float16, got float64 [6, 70]; "
        "convert it with .to(torch.float32)",
    ),
    "scalar input": (
        X[0, 0],
        {},
        ValueError,
        "input must have at least 1 dimension, got float32 []",
    ),
    "empty rows": (X[:, :0], {}, ValueError, "in_features must be between 1 and 8388608, got 0"),
    "input a little too short": (
        X[:, :-1],
        {},
        ValueError,
        "packed was made for out_features = 20, in_features = 70 (layout 1), but this call has "
        "out_features = 20, in_features = 69 (layout 1); pack the weight again with pack_weight",
    ),
    "integer output": (
        X,
        {"output_dtype": torch.int8},
        TypeError,
        "output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "tensors on two devices": (
        X,
        {"packed": PACKED.to("meta")},
        ValueError,
        "packed must be on the input's device cpu, got meta; move it with .to(device)",
    ),
}


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("x", "changes", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_wrong_arguments_raise(x, changes, error, message, trained):
    """The same words with gradients, where the layers are computed one by one."""
    pattern = rf"^linear_dynamic(_split)?: {re.escape(message)}$"
    with pytest.raises(error, match=pattern):
        ops.linear_dynamic_split(leaf(x) if trained else x, **{**GOOD, **changes})
    for got, expected in zip(ops.linear_dynamic_split(X, **GOOD), CASE.alone(X), strict=True):
        assert_same_bits(got, expected)


def test_scales_of_nan_stay_visible_and_at_home():
    scale = SCALE.clone()
    scale[20] = math.nan
    first, second = ops.linear_dynamic_split(X, **{**GOOD, "weight_scale": scale})
    assert_same_bits(first, CASE.alone(X)[0])
    assert second[:, 0].isnan().all() and second[:, 1:].isfinite().all()
