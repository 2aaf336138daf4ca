"""Gradients of the convolution operators."""

from collections.abc import Callable

import pytest
import torch
from support import ACTIVATIONS, assert_same_bits, floats, integers, leaf, positive
from torch import Tensor
from torch.nn import functional as F

from torchquant import functional, ops

WEIGHT, SCALE, BIAS = integers(6, 4, 3, 2, seed=1), positive(6, seed=2), floats(6, seed=3)
LINE = integers(6, 4, 3, seed=1)
STEP, ZERO = torch.tensor([0.05]), torch.tensor([-7], dtype=torch.int32)


def float_conv(x: Tensor, w: Tensor, bias: Tensor | None, options: dict) -> Tensor:
    padding = options["padding"]
    before_last = [
        n for d in reversed(range(len(padding) // 2)) for n in padding[2 * d : 2 * d + 2]
    ]
    conv = F.conv2d if x.dim() == 4 else F.conv1d
    values = w.float() * SCALE.reshape(-1, *[1] * (w.dim() - 1))
    x = F.pad(x.float(), before_last)
    return conv(x, values, bias, options["stride"], 0, options["dilation"], options["groups"])


def activated(x: Tensor, name: str) -> Tensor:
    return ops.activation(x, name)


def check(call: Callable, reference: Callable, *tensors: Tensor) -> None:
    first, again, expected = [], [], []
    for results, function in ((first, call), (again, call), (expected, reference)):
        leaves = [leaf(t) for t in tensors]
        y = function(*leaves)
        direction = floats(*y.shape, seed=11)
        results.extend(torch.autograd.grad((y.float() * direction).sum(), leaves))
    for one, two, want in zip(first, again, expected, strict=True):
        assert_same_bits(two, one, "the same call twice")
        assert (one.dtype, one.shape) == (want.dtype, want.shape)
        tolerance = 1e-5 if one.dtype == torch.float32 else 2e-2
        scale = float(want.float().abs().max())
        torch.testing.assert_close(one, want, rtol=tolerance, atol=tolerance * scale)


LAYERS = {
    "two dimensions": (
        WEIGHT,
        {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1},
    ),
    "all sizes": (
        WEIGHT,
        {"stride": [3, 2], "padding": [1, 2, 0, 3], "dilation": [2, 1], "groups": 1},
    ),
    "groups": (
        WEIGHT[:, :2],
        {"stride": [2, 3], "padding": [2, 1, 1, 0], "dilation": [1, 2], "groups": 2},
    ),
    "one dimension": (LINE, {"stride": [3], "padding": [2, 0], "dilation": [2], "groups": 1}),
}
layers = pytest.mark.parametrize(("weight", "options"), LAYERS.values(), ids=LAYERS)


def image(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return floats(*((2, 4, 9, 8)[: weight.dim()]), seed=6).to(dtype)


@layers
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_conv_dynamic(weight, options, activation, dtype) -> None:
    packed = ops.pack_conv_weight(weight, options["groups"])
    common = {"weight_shape": list(weight.shape), "activation": activation, **options}

    def call(x: Tensor, b: Tensor) -> Tensor:
        return ops.conv_dynamic(x, packed, SCALE, b, **common)

    def reference(x: Tensor, b: Tensor) -> Tensor:
        float_options = {"activation": "none", **options}
        values = functional.conv_dynamic(
            x.detach().float(), weight, SCALE, b.detach(), **float_options
        )
        pre = float_conv(x, weight, b, options)
        return activated(pre + (values - pre).detach(), activation).to(dtype)

    check(call, reference, image(weight, dtype), BIAS)


@layers
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_conv_static(weight, options, activation) -> None:
    packed = ops.pack_conv_weight(weight, options["groups"])
    common = {"weight_shape": list(weight.shape), "activation": activation, **options}
    x = image(weight)
    shape = functional.conv_static(x, STEP, ZERO, weight, SCALE, **options).shape
    residual = floats(*shape, seed=8)

    def call(x: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return ops.conv_static(x, STEP, ZERO, packed, SCALE, b, residual=r, **common)

    def reference(x: Tensor, b: Tensor, r: Tensor) -> Tensor:
        inside = ops.fake_quantize(x, STEP, ZERO, qmin=-128, qmax=127)
        values = functional.conv_static(
            x.detach(), STEP, ZERO, weight, SCALE, b.detach(), residual=r.detach(), **options
        )
        pre = float_conv(inside, weight, b, options) + r
        return activated(pre + (values - pre).detach(), activation)

    check(call, reference, x, BIAS, residual)


def test_each_gradient_alone() -> None:
    weight, options = LAYERS["all sizes"]
    packed = ops.pack_conv_weight(weight, 1)
    common = {"weight_shape": list(weight.shape), "activation": "tanh", **options}
    x = image(weight)
    residual = floats(*functional.conv_static(x, STEP, None, weight, SCALE, **options).shape)

    def gradients(*which: bool) -> list[Tensor | None]:
        given = [leaf(t) if w else t for t, w in zip((x, BIAS, residual), which, strict=True)]
        y = ops.conv_static(
            given[0], STEP, None, packed, SCALE, given[1], residual=given[2], **common
        )
        y.sum().backward()
        return [t.grad for t in given]

    every = gradients(True, True, True)
    for i in range(3):
        one = gradients(*(i == j for j in range(3)))
        assert [g is not None for g in one] == [i == j for j in range(3)]
        assert_same_bits(one[i], every[i])


def test_an_int8_result_has_no_gradient() -> None:
    weight, options = LAYERS["groups"]
    packed = ops.pack_conv_weight(weight, 2)
    int8 = {"output_dtype": torch.int8, "output_scale": torch.ones(1)}
    x = leaf(image(weight))
    y = ops.conv_static(
        x, STEP, None, packed, SCALE, weight_shape=list(weight.shape), **options, **int8
    )
    assert not y.requires_grad


def test_second_derivatives() -> None:
    weight, options = LAYERS["groups"]
    packed = ops.pack_conv_weight(weight, 2)
    x = leaf(image(weight))
    y = ops.conv_dynamic(
        x, packed, SCALE, weight_shape=list(weight.shape), activation="tanh", **options
    )
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    assert second.shape == x.shape and second.abs().max() > 0
