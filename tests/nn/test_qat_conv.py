"""QATConv1d and QATConv2d: the bits of the deployed layer, and gradients through the rounding."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import FLOATS, INF, NAN, assert_same_bits, check_everywhere, leaf
from support.conv_modules import (
    SIZES,
    SIZES_2D,
    TRAINING,
    float_conv,
    frozen,
    input_of,
    trained,
)
from torch import Tensor, nn

from torchquant import Dynamic, LSQQuantizer
from torchquant.nn import QATConv1d, QATConv2d

# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("config", TRAINING)
@pytest.mark.parametrize("name", SIZES)
def test_training_evaluation_and_deployed_give_the_same_bits(name: str, config: str) -> None:
    layer: Any = frozen(trained(name, config, "relu"))
    deployed = layer.to_quantized()
    x = input_of(name)
    want = deployed(x).detach()
    assert bool((want > 0).any())
    for training in (True, False):
        layer.train(training)
        check_everywhere(lambda: layer(x).detach(), want, what=(name, training))
        with torch.no_grad():
            check_everywhere(lambda: layer(x), want, what=(name, training))
    assert_same_bits(layer(x[0]).detach(), deployed(x[0]).detach())
    assert deployed.config == TRAINING[config].deployed()
    assert deployed.activation == "relu"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("config", ["dynamic", "static", "lsq_plus"])
def test_dtypes_formats_and_autocast(config: str, dtype: torch.dtype) -> None:
    layer: Any = frozen(trained("groups", config, dtype=dtype))
    x = input_of("groups", dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(y.detach(), layer.to_quantized()(x).detach())
    y.float().sum().backward()
    assert layer.weight.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x.float()), layer.to_quantized()(x.float())
    assert got.dtype == torch.bfloat16
    assert_same_bits(got.detach(), want.detach())


@pytest.mark.parametrize("config", TRAINING)
def test_samples_that_are_not_finite(config: str) -> None:
    layer: Any = frozen(trained("3x3", config))
    x = input_of()
    x[0, 1, 2, 3] = NAN
    assert layer(x)[0].isnan().all() and layer(x)[1].isfinite().all()
    assert_same_bits(layer(x).detach(), layer.to_quantized()(x).detach())
    x[0, 1, 2, 3] = INF
    assert_same_bits(layer(x).detach(), layer.to_quantized()(x).detach())


def test_deployed_integers_are_in_their_ranges() -> None:
    for config in TRAINING:
        layer = trained("3x3", config)
        deployed: Any = layer.to_quantized()
        qmin, qmax = layer.config.weights.range
        assert qmin <= int(deployed.qweight.min()) <= int(deployed.qweight.max()) <= qmax
        if deployed.input_zero_point is not None:
            low, high = deployed.config.activations.range
            assert low <= int(deployed.input_zero_point) <= high


def test_to_quantized_is_from_float() -> None:
    for name in SIZES:
        layer = trained(name, "dynamic")
        want = type(layer.to_quantized()).from_float(float_conv(name))
        for key, value in want.state_dict().items():
            assert_same_bits(layer.to_quantized().state_dict()[key], value, key)


# ---------------------------------------------------------------- gradients


def simulation(layer: Any) -> Any:
    """The same layer, which computes with rounded floats and torch's own gradients."""
    other = type(layer).from_float(layer.to_float(), replace(layer.config, simulate=True))
    other.weight, other.activation = nn.Parameter(layer.weight.detach().clone()), layer.activation
    if layer.bias is not None:
        other.bias = nn.Parameter(layer.bias.detach().clone())
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


@pytest.mark.parametrize("config", TRAINING)
@pytest.mark.parametrize("name", SIZES)
def test_gradients_are_those_of_rounded_floats(name: str, config: str) -> None:
    layer: Any = frozen(trained(name, config, "relu"))
    other: Any = frozen(simulation(layer))
    x, same = leaf(input_of(name)), leaf(input_of(name))
    y, want = layer(x), other(same)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    kept = ((y > 1e-3) & (want > 1e-3)) | ((y == 0) & (want == 0))  # the ReLU is the same
    grad = torch.randn_like(y) * kept
    y.backward(grad)
    want.backward(grad)
    assert x.grad is not None and bool(x.grad.any())
    gradients = {"input": x.grad, **{key: p.grad for key, p in layer.named_parameters()}}
    wanted = {"input": same.grad, **{key: p.grad for key, p in other.named_parameters()}}
    assert gradients.keys() == wanted.keys()
    for key, value in gradients.items():
        scale = float(wanted[key].abs().max())
        torch.testing.assert_close(value, wanted[key], atol=2e-5 * scale, rtol=1e-4, msg=key)


def test_the_gradient_stops_where_a_static_input_saturates() -> None:
    layer: Any = frozen(trained("1x1", "static"))
    x = leaf(input_of("1x1"))
    with torch.no_grad():
        x[0, 2, 1, 1], x[1, 3, 0, 0] = 1e4, -1e4
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 2, 1, 1] == 0 == x.grad[1, 3, 0, 0]
    assert int((x.grad == 0).sum()) < 20


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for the backward pass, without parameters and the input."""
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    del result
    return sum(found.values())


def test_the_backward_pass_needs_int8_activations() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    layer = QATConv2d.from_float(conv, activation="relu")
    x = leaf(torch.randn(4, 32, 16, 16))
    inputs, outputs = x.numel(), x.numel()
    weights = conv.weight.numel()
    assert saved_bytes(layer, x) <= inputs + outputs + weights + 1000  # one byte each
    layer = QATConv2d.from_float(conv, TRAINING["static"])
    layer(x)
    assert saved_bytes(layer, x) <= 1.3 * inputs + weights + 1000  # one bit more for saturation


def test_a_second_derivative_is_refused() -> None:
    layer = trained()
    x = leaf(input_of())
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_training_learns() -> None:
    torch.manual_seed(0)
    target = nn.Conv2d(8, 16, 3, padding=1)
    x = torch.randn(16, 8, 6, 6)
    for config in ("dynamic", "static", "lsq"):
        layer = QATConv2d(8, 16, 3, padding=1, config=TRAINING[config])
        optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
        losses = []
        for _ in range(25):
            loss = (layer(x) - target(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], config


# ---------------------------------------------------------------- stages and state


@pytest.mark.parametrize("name", ["3x3", "same", "reflect", "1d", "1d_same"])
def test_in_float_the_layer_is_the_float_layer(name: str) -> None:
    for config in ("dynamic", "static", "lsq_plus"):
        conv = float_conv(name)
        kind: Any = QATConv2d if name in SIZES_2D else QATConv1d
        layer = kind.from_float(conv, TRAINING[config]).enable_quantization(False)
        x = input_of(name)
        assert_same_bits(layer(x).detach(), conv(x).detach())
        assert "in float" in repr(layer)
        layer.enable_quantization()
        layer.eval()  # observers and steps have seen a batch
        assert not torch.equal(layer(x), conv(x))


def test_ranges_are_observed_in_training_only() -> None:
    layer: Any = trained("3x3", "static")
    scale = layer.input_quantizer.scale.clone()
    layer.eval()(10 * input_of())
    assert torch.equal(layer.input_quantizer.scale, scale)
    layer.train()(10 * input_of())
    assert bool(layer.input_quantizer.scale > scale)


def test_without_a_range_the_layer_cannot_be_deployed() -> None:
    for config in ("static", "lsq"):
        layer = QATConv2d.from_float(float_conv(), TRAINING[config])
        assert layer.missing_range() is not None
        with pytest.raises(RuntimeError):
            layer.to_quantized()
        with pytest.raises(RuntimeError):
            layer.eval()(input_of())
    assert QATConv2d.from_float(float_conv()).missing_range() is None


def test_a_weight_that_diverged_is_refused() -> None:
    layer = trained()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match=r"QATConv2d.to_quantized: the weight must be finite"):
        layer.to_quantized()


@pytest.mark.parametrize("config", TRAINING)
def test_copies_and_state_dicts(config: str) -> None:
    layer: Any = frozen(trained("groups", config, "relu")).eval()
    x = input_of("groups")
    want = layer(x).detach()
    other = QATConv2d.from_float(float_conv("groups", seed=9), TRAINING[config], "relu")
    other.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other.eval()]
    for made in copies:
        assert_same_bits(made(x).detach(), want)
        assert made.config == layer.config and made.weight is not layer.weight
    bare = layer.to_float()
    assert bare.weight is layer.weight and bare.bias is layer.bias and type(bare) is nn.Conv2d
    assert repr(bare) == repr(float_conv("groups"))


def test_steps_are_parameters() -> None:
    layer = trained("3x3", "lsq_plus")
    steps = [m for m in layer.modules() if isinstance(m, LSQQuantizer)]
    assert len(steps) == 2 and steps[0].offset is not None
    layer(input_of()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq"])
def test_compiled_training_has_the_bits_of_eager_mode(config: str) -> None:
    layer: Any = frozen(trained("3x3", config))
    x = input_of()
    want = layer(x)
    want.square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in layer.named_parameters()}
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager")
    got = compiled(x)
    assert_same_bits(got.detach(), want.detach())
    got.square().sum().backward()
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], msg=key)
    assert isinstance(layer.config.activations, Dynamic) == (config == "dynamic")
