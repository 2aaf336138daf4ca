"""Gradients of the linear operators."""

import math
from collections.abc import Callable

import pytest
import torch
from support import (
    ACTIVATIONS,
    assert_same_bits,
    floats,
    generator,
    leaf,
)
from support.operands import (
    BIAS,
    IN_SCALE,
    IN_ZERO,
    PACKED,
    SCALE,
    WEIGHT,
    ZERO,
    K,
    N,
    Q,
    X,
)
from torch import Tensor
from torch.nn import functional as F

from torchquant import ops, quantized_linear

TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}


def float_layer(
    x: Tensor, bias: Tensor | None, zero: Tensor | None, values: Tensor, activation: str
) -> Tensor:
    """The float formulation, straight through the quantizer: torch's gradients at our values."""
    weight = WEIGHT.float() if zero is None else WEIGHT.float() - zero.reshape(-1, 1)
    pre = F.linear(x.float(), weight * SCALE.reshape(-1, 1), bias)
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [None, ZERO], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_linear_dynamic(isa, activation, zero, bias, dtype):
    common = {"out_features": N, "symmetric": zero is None}
    for shape in ((6, K), (2, 3, K), (K,)):
        x = floats(*shape, seed=6).to(dtype)
        values = ops.linear_dynamic(
            x, PACKED, SCALE, zero, bias, output_dtype=torch.float32, **common
        )
        check_gradients(
            lambda x, b: ops.linear_dynamic(
                x, PACKED, SCALE, zero, b, activation=activation, **common
            ),
            lambda x, b: float_layer(x, b, zero, values, activation),  # noqa: B023
            x,
            bias,
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [None, ZERO], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("input_zero", [None, IN_ZERO], ids=["centred", "shifted"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no_bias", "bias"])
def test_gradient_of_linear_static(activation, zero, input_zero, bias):
    """The gradient passes where the rounded value is in the range and is zero elsewhere."""
    x = torch.randn(6, K, generator=generator(0)) * 2  # about a third of it saturates
    limits = {"input_qmin": -100, "input_qmax": 90}

    def call(x: Tensor, b: Tensor | None, name: str = activation) -> Tensor:
        side = (PACKED, SCALE, zero, b)
        return ops.linear_static(
            x, IN_SCALE, input_zero, *side, out_features=N, activation=name, **limits
        )

    q = (x * (1 / IN_SCALE)).round() + (0 if input_zero is None else input_zero)
    inside = (q >= -100) & (q <= 90)
    assert 0.2 < inside.logical_not().float().mean() < 0.5
    values = call(x, bias, "none")
    check_gradients(
        call,
        lambda x, b: float_layer(torch.where(inside, x, x.detach()), b, zero, values, activation),
        x,
        bias,
    )


def test_gradient_of_the_bias_behind_integer_input():
    bias = leaf(BIAS)
    y = ops.linear_static(Q, IN_SCALE, None, PACKED, SCALE, bias=bias, out_features=N)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 6.0))
    assert not quantized_linear(Q, WEIGHT, BIAS, input_scale=1.0, weight_scale=1.0).requires_grad


def test_rows_outside_fp32_have_no_gradient_of_their_own():
    """A NaN stays visible and does not change the gradients of other rows."""
    x = X.clone()
    x[2, 3] = math.nan
    for activation in ACTIVATIONS:
        grads = []
        for values in (X, x):
            input = leaf(values)
            ops.linear_dynamic(
                input, PACKED, SCALE, out_features=N, activation=activation
            ).sum().backward()
            grads.append(input.grad)
        rest = torch.arange(6) != 2
        assert_same_bits(grads[1][rest], grads[0][rest])


def test_frozen_tensors_get_no_gradient():
    scale = leaf(SCALE)
    x = leaf(X)
    ops.linear_dynamic(x, PACKED, scale, out_features=N).sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    frozen = ops.linear_dynamic(X, PACKED, scale, bias=BIAS, out_features=N)
    assert not frozen.requires_grad


def test_no_graph_is_built_where_none_is_wanted():
    x = leaf(X)
    with torch.no_grad():
        assert not ops.linear_dynamic(x, PACKED, SCALE, out_features=N).requires_grad
    with torch.inference_mode():
        assert ops.linear_dynamic(x, PACKED, SCALE, out_features=N).is_inference()
    assert ops.linear_dynamic(x, PACKED, SCALE, out_features=N).requires_grad
    assert not ops.quantize(x, 0.1).requires_grad
    assert not any(tensor.requires_grad for tensor in ops.quantize_per_token(x))
    assert not ops.dequantize(Q, leaf(IN_SCALE)).requires_grad
    quantized = ops.linear_static(
        x,
        IN_SCALE,
        None,
        PACKED,
        SCALE,
        out_features=N,
        output_scale=torch.ones(1),
        output_dtype=torch.int8,
    )
    assert not quantized.requires_grad


def test_only_what_is_asked_for_is_computed():
    bias = leaf(BIAS)
    ops.linear_dynamic(X, PACKED, SCALE, None, bias, out_features=N).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 6.0))
    x = leaf(X)
    y = ops.linear_dynamic(x, PACKED, SCALE, ZERO, bias, out_features=N)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


def test_gradients_of_the_same_values_are_the_same_in_training_and_without():
    x = leaf(X)
    trained = ops.linear_dynamic(x, PACKED, SCALE, ZERO, BIAS, out_features=N, activation="gelu")
    with torch.no_grad():
        plain = ops.linear_dynamic(x, PACKED, SCALE, ZERO, BIAS, out_features=N, activation="gelu")
    assert_same_bits(trained.detach(), plain)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("op", ["dynamic", "static"])
def test_gradients_of_gradients(op, activation):
    """A gradient penalty: the pre-activation that backward computes again is part of the graph."""

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = leaf(X / 4)
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    def call(x: Tensor, name: str = activation) -> Tensor:
        if op == "dynamic":
            return ops.linear_dynamic(x, PACKED, SCALE, out_features=N, activation=name)
        wide = torch.tensor([1.0])  # nothing saturates
        return ops.linear_static(x, wide, None, PACKED, SCALE, out_features=N, activation=name)

    values = call(X / 4, "none")
    got = second(call)
    expected = second(lambda x: float_layer(x, None, None, values, activation))
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


def test_an_adapter_below_a_quantized_layer_trains():
    """LoRA: y = quantized(x) + quantized(x A B); the loss falls, the weight stays."""
    torch.manual_seed(0)
    a, b = leaf(torch.randn(K, 4) * 0.1), leaf(torch.zeros(4, K))
    target, before = torch.randn(6, N), PACKED.clone()
    optimizer = torch.optim.Adam([a, b], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        y = ops.linear_dynamic(X + X @ a @ b, PACKED, SCALE / 50, out_features=N)
        loss = F.mse_loss(y, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(PACKED, before)


def test_checkpointing_and_compiled_backward():
    x = leaf(X)

    def layer(x: Tensor) -> Tensor:
        return ops.linear_dynamic(x, PACKED, SCALE, bias=BIAS, out_features=N, activation="silu")

    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(again.square().sum(), x)[0], expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    torch.testing.assert_close(got, expected)
