"""linear_dynamic_split: gradients and refusals."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    assert_same_bits,
    floats,
    integers,
    leaf,
)
from support.split_layers import layers
from torch import Tensor

from torchquant import ops


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
        "activation must be one of none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, "
        "hardswish, hardsigmoid, leaky_relu, got 'mish'",
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
        {"bias": BIAS.double()},
        TypeError,
        "bias must be float32, bfloat16 or float16, got float64 [25]; "
        "convert it with .to(torch.float32)",
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
