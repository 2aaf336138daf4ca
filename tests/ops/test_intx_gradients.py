"""Gradients of the linear operators on weights of 2 to 8 bits."""

from collections.abc import Callable

import pytest
import torch
from support import ACTIVATIONS, NAN, Shape, assert_same_bits, floats, generator, leaf
from support.intx_layers import Layer
from torch import Tensor
from torch.nn import functional as F

from torchquant import ops

N, K = 20, 70
LAYERS = {
    "channels": Layer(Shape(6, N, K), 4, None),
    "groups": Layer(Shape(6, N, K), 3, 32, bias=True),
    "groups with zero points": Layer(Shape(6, N, K), 5, 20, True, bias=True),
}
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
ONE, SEVEN = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)
X = floats(6, K, seed=6)
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "relu6")},
    **{name: getattr(F, name) for name in ("hardswish", "hardsigmoid", "leaky_relu")},
}
assert set(TORCH_ACTIVATIONS) == set(ACTIVATIONS)


def float_weight(layer: Layer) -> Tensor:
    """What the integers represent, one input after the other."""
    columns, (scale, zero) = [], layer.scales
    for k in range(K):
        group = () if layer.size is None else (slice(None), k // layer.size)
        column = layer.weight[:, k].float()
        if zero is not None:
            column = column - zero[group].float()
        columns.append(column * scale[group])
    return torch.stack(columns, 1)


def float_layer(
    layer: Layer, x: Tensor, bias: Tensor | None, values: Tensor, activation: str
) -> Tensor:
    """The float formulation, straight through the quantizer: torch's gradients at our values."""
    pre = F.linear(x.float(), float_weight(layer), bias)
    return TORCH_ACTIVATIONS[activation](pre + (values - pre).detach())


def check_gradients(
    call: Callable[[Tensor, Tensor | None], Tensor],
    reference: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    bias: Tensor | None,
) -> None:
    direction = floats(*x.shape[:-1], N, seed=11)
    results = []
    for function in (call, call, reference):
        leaves = [leaf(x)] + ([] if bias is None else [leaf(bias)])
        y = function(leaves[0], None if bias is None else leaves[1])
        results.append(torch.autograd.grad((y.float() * direction).sum(), leaves))
    for first, again, expected in zip(*results, strict=True):
        assert_same_bits(again, first, "the same call twice")
        assert first.dtype == expected.dtype and first.shape == expected.shape
        tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance * scale)


def without_bias(layer: Layer) -> dict[str, object]:
    return {**layer.packed, "bias": None}


@EVERY_LAYER
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_linear_dynamic_intx(layer, activation, dtype):
    packed, symmetric = without_bias(layer), layer.zero_points

    def call(x: Tensor, b: Tensor | None, name: str = activation, **options: object) -> Tensor:
        given = {**packed, "bias": b, "symmetric": symmetric}
        return ops.linear_dynamic_intx(x, **given, activation=name, **options)

    for shape in ((6, K), (2, 3, K), (K,)) if activation in ("none", "gelu") else ((6, K),):
        x, bias = floats(*shape, seed=6).to(dtype), layer.bias_tensor
        values = call(x, bias, "none", output_dtype=torch.float32)
        check_gradients(
            call,
            lambda x, b: float_layer(layer, x, b, values, activation),  # noqa: B023
            x,
            bias,
        )


@EVERY_LAYER
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [None, SEVEN], ids=["centred", "shifted"])
def test_gradient_of_linear_static_intx(layer, activation, zero):
    """The gradient passes where the rounded value is in the range and is zero elsewhere."""
    x = torch.randn(6, K, generator=generator(0)) * 2  # about a third of it saturates
    packed, limits = without_bias(layer), {"input_qmin": -100, "input_qmax": 90}

    def call(x: Tensor, b: Tensor | None, name: str = activation) -> Tensor:
        given = {**packed, "bias": b, **limits}
        return ops.linear_static_intx(x, ONE, zero, **given, activation=name)

    q = (x * (1 / ONE)).round() + (0 if zero is None else zero)
    inside = (q >= -100) & (q <= 90)
    assert 0.2 < inside.logical_not().float().mean() < 0.5
    bias = layer.bias_tensor
    values = call(x, bias, "none")
    check_gradients(
        call,
        lambda x, b: float_layer(layer, torch.where(inside, x, x.detach()), b, values, activation),
        x,
        bias,
    )


@EVERY_LAYER
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("operator", ["dynamic", "static"])
def test_gradients_of_gradients(layer, operator, activation):
    """A gradient penalty: the pre-activation that backward computes again is part of the graph."""

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = leaf(X / 4)
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    packed = without_bias(layer)

    def call(x: Tensor, name: str = activation) -> Tensor:
        if operator == "dynamic":
            return ops.linear_dynamic_intx(x, **packed, activation=name)
        wide = torch.tensor([1.0])  # nothing saturates
        return ops.linear_static_intx(x, wide, None, **packed, activation=name)

    values = call(X / 4, "none")
    got = second(call)
    expected = second(lambda x: float_layer(layer, x, None, values, activation))
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


def test_rows_outside_fp32_have_no_gradient_of_their_own():
    """A NaN stays visible and does not change the gradients of other rows."""
    x, rest = X.clone(), torch.arange(6) != 2
    x[2, 3] = NAN
    packed = LAYERS["groups"].packed
    for activation in ACTIVATIONS:
        for call in (
            lambda x, name=activation: ops.linear_dynamic_intx(x, **packed, activation=name),
            lambda x, name=activation: ops.linear_static_intx(
                x, ONE, None, **packed, activation=name
            ),
        ):
            grads = []
            for values in (X, x):
                input = leaf(values)
                call(input).sum().backward()
                grads.append(input.grad)
            assert_same_bits(grads[1][rest], grads[0][rest])


def test_only_what_is_asked_for_is_computed():
    layer, x = LAYERS["groups with zero points"], leaf(X)
    packed, bias = layer.packed, leaf(layer.bias_tensor)
    packed["bias"] = bias
    for call in (
        lambda x: ops.linear_dynamic_intx(x, **packed),
        lambda x: ops.linear_static_intx(x, ONE, SEVEN, **packed),
    ):
        bias.grad = None
        call(X).sum().backward()
        assert torch.equal(bias.grad, torch.full((N,), 6.0))
        (grad,) = torch.autograd.grad(call(x).sum(), x)
        assert grad.shape == x.shape
        with torch.no_grad():
            assert not call(x).requires_grad
        with torch.inference_mode():
            assert call(X).is_inference()
        assert_same_bits(call(x).detach(), call(X).detach())
    packed["bias"] = None
    assert not ops.linear_dynamic_intx(X, **packed).requires_grad


def test_an_adapter_below_a_layer_trains():
    """LoRA: y = quantized(x + x A B); the loss falls, the weight stays."""
    torch.manual_seed(0)
    packed = LAYERS["groups"].packed
    a, b = leaf(torch.randn(K, 4) * 0.1), leaf(torch.zeros(4, K))
    before = packed["packed"].clone()
    x = torch.randn(6, K)
    target = ops.linear_dynamic_intx(x + x @ torch.randn(K, 4) @ torch.randn(4, K) / 30, **packed)
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(ops.linear_dynamic_intx(x + x @ a @ b, **packed), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(packed["packed"], before)


def test_checkpointing_and_compiled_backward():
    packed, x = LAYERS["groups with zero points"].packed, leaf(X)

    def dynamic(x: Tensor) -> Tensor:
        return ops.linear_dynamic_intx(x, **packed, activation="silu")

    def static(x: Tensor) -> Tensor:
        return ops.linear_static_intx(x, ONE, SEVEN, **packed, activation="silu")

    for layer in (dynamic, static):
        expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
        again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        assert_same_bits(torch.autograd.grad(again.square().sum(), x)[0], expected)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x).square().sum(), x)[0]
        torch.testing.assert_close(got, expected)
