"""QuantizedLinear: results, gradients, errors, tracing and subclasses."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import ACTIVATIONS, FLOATS, LAYOUTS, assert_same_bits, floats, in_layout
from support.layers import (
    ASYMMETRIC,
    CONFIGS,
    assert_same_state,
    expected_output,
    float_layer,
    layer_of,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import PerAxis, QuantizationConfig, cpu, functional, ops
from torchquant.nn import QuantizedLinear

SHAPES = {
    "tile": (16, 64),
    "odd": (33, 67),
    "one_output": (1, 40),
    "one_input": (20, 1),
    "two_blocks": (48, 8191),
}


# ---------------------------------------------------------------- from_float, to_float, repr


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_has_the_bits_of_the_specification(
    shape: tuple[int, int], config: QuantizationConfig
) -> None:
    layer = layer_of(config, out_features=shape[0], in_features=shape[1])
    x = floats(5, shape[1], seed=3)
    assert_same_bits(layer(x), expected_output(layer, x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_from_float_has_the_integers_of_the_specification(
    shape: tuple[int, int], dtype: torch.dtype, config: QuantizationConfig
) -> None:
    linear = float_layer(*shape, dtype=dtype)
    layer = QuantizedLinear.from_float(linear, config)
    weight = linear.weight.detach()
    scale, zero_point = functional.choose_qparams(
        weight, symmetric=config.weights.symmetric, granularity=PerAxis(0)
    )
    qmin = -127 if config.weights.symmetric else -128
    qweight = functional.quantize(weight, scale, zero_point, qmin=qmin, granularity=PerAxis(0))
    assert_same_bits(layer.qweight, qweight)
    assert_same_bits(layer.weight_scale, scale)
    assert (layer.weight_zero_point is None) == (zero_point is None) == config.weights.symmetric
    if layer.weight_zero_point is not None and zero_point is not None:
        assert_same_bits(layer.weight_zero_point, zero_point)
    assert layer.bias is not None
    assert_same_bits(layer.bias.detach(), linear.bias.detach().float())


@pytest.mark.parametrize("rows", [16, 17, 31, 32, 33, 100])
def test_packing_in_blocks_gives_the_same_bits_as_packing_at_once(rows: int) -> None:
    in_features = (1 << 13) + 1
    for config in (Config(), ASYMMETRIC):
        layer = layer_of(config, out_features=rows, in_features=in_features)
        assert torch.equal(layer.packed, ops.pack_weight(layer.qweight))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_from_float_of_a_weight_in_any_layout(layout: str) -> None:
    linear = float_layer(20, 48)
    plain = QuantizedLinear.from_float(linear)
    linear.weight = nn.Parameter(in_layout(linear.weight.detach(), layout))
    assert_same_state(QuantizedLinear.from_float(linear), plain)


def test_from_float_does_not_change_the_float_layer() -> None:
    linear = float_layer()
    weight, bias = linear.weight, linear.bias
    values = copy.deepcopy(linear.state_dict())
    layer = QuantizedLinear.from_float(linear)
    assert linear.weight is weight
    assert linear.bias is bias
    assert all(torch.equal(values[key], value) for key, value in linear.state_dict().items())
    with torch.no_grad():
        linear.bias.fill_(7)
    assert not torch.equal(layer.bias, linear.bias), "the bias must be a copy"


def test_from_float_uses_the_shape_of_the_weight_if_attributes_are_out_of_date() -> None:
    linear = float_layer(32, 64, bias=False)
    linear.weight = nn.Parameter(floats(20, 40))  # pruned or resized by hand
    layer = QuantizedLinear.from_float(linear)
    assert (layer.out_features, layer.in_features) == (20, 40)
    x = floats(3, 40)
    assert_same_bits(layer(x), expected_output(layer, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_from_float_keeps_training_mode_and_requires_grad(
    training: bool, requires_grad: bool
) -> None:
    linear = float_layer().train(training).requires_grad_(requires_grad)
    layer = QuantizedLinear.from_float(linear)
    assert layer.training is training
    assert layer.bias is not None
    assert layer.bias.requires_grad is requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    back = layer.to_float()
    assert back.training is training
    assert back.bias.requires_grad is requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_ignored(dtype: torch.dtype) -> None:
    linear, x = float_layer(), floats(3, 64)
    expected = QuantizedLinear.from_float(linear, ASYMMETRIC)
    try:
        torch.set_default_dtype(dtype)
        layer = QuantizedLinear.from_float(linear, ASYMMETRIC)
        empty = QuantizedLinear(64, 32, config=ASYMMETRIC)
        empty.load_state_dict(layer.state_dict(), assign=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for made in (layer, empty):
        assert_same_state(made, expected)
        assert_same_bits(made(x), expected(x))


def test_the_device_context_is_ignored() -> None:
    linear, x = float_layer(), floats(3, 64)
    with torch.device("meta"):
        layer = QuantizedLinear.from_float(linear, ASYMMETRIC)
    assert_same_bits(layer(x), QuantizedLinear.from_float(linear, ASYMMETRIC)(x))
    assert layer.to_float().weight.device.type == "cpu"


def test_gradients_pass_through_a_layer_created_in_inference_mode() -> None:
    linear = float_layer()
    with torch.inference_mode():
        layer = QuantizedLinear.from_float(linear)
    x = floats(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("config", [Config(), ASYMMETRIC], ids=["default", "asymmetric"])
@pytest.mark.parametrize("bias", [True, False])
def test_to_float_has_the_values_of_the_integers(config: QuantizationConfig, bias: bool) -> None:
    linear = float_layer(33, 67, bias=bias)
    layer = QuantizedLinear.from_float(linear, config)
    back = layer.to_float()
    assert type(back) is nn.Linear
    expected = functional.dequantize(
        layer.qweight, layer.weight_scale, layer.weight_zero_point, granularity=PerAxis(0)
    )
    assert_same_bits(back.weight.detach(), expected)
    step = layer.weight_scale.unsqueeze(1)
    assert bool(((back.weight - linear.weight).abs() <= 0.5001 * step).all())
    assert (back.bias is None) is not bias
    if bias:
        assert_same_bits(back.bias.detach(), linear.bias.detach())
    again = QuantizedLinear.from_float(back, config)
    assert torch.equal(again.qweight, layer.qweight)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            QuantizedLinear(64, 32),
            "QuantizedLinear(in_features=64, out_features=32, bias=True, int8 per channel, "
            "activations int8 per token with zero point)",
        ),
        (
            QuantizedLinear(64, 32, bias=False, config=ASYMMETRIC, activation="gelu"),
            "QuantizedLinear(in_features=64, out_features=32, bias=False, int8 per channel with "
            "zero point, activations int8 per token with zero point, activation=gelu)",
        ),
    ],
    ids=["default", "all_options"],
)
def test_repr(layer: QuantizedLinear, text: str) -> None:
    assert repr(layer) == text


def test_a_new_layer_gives_zero() -> None:
    for config in CONFIGS.values():
        layer = QuantizedLinear(64, 32, config=config)
        assert_same_bits(layer(floats(3, 64)).abs(), torch.zeros(3, 32))


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_dtype_follows_the_input(dtype: torch.dtype, activation: str) -> None:
    layer = layer_of(activation=activation)
    x = floats(7, 64, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert_same_bits(out, expected_output(layer, x))


def test_training_and_evaluation_give_the_same_bits() -> None:
    layer, x = layer_of(), floats(7, 64)
    expected = expected_output(layer, x)
    for mode in (layer.train(), layer.eval()):
        assert_same_bits(mode(x).detach(), expected)
        with torch.no_grad():
            assert_same_bits(mode(x), expected)
        with torch.inference_mode():
            assert_same_bits(mode(x).clone(), expected)
    assert_same_bits(layer(x.requires_grad_()).detach(), expected)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer = layer_of(bias=bias)
    x = floats(*shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    assert_same_bits(out.reshape(-1, 32), expected_output(layer, x.reshape(-1, 64)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (0, 3, 64)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    layer = layer_of()
    x = torch.empty(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_in_any_layout(layout: str) -> None:
    layer, x = layer_of(), floats(6, 64)
    assert_same_bits(layer(in_layout(x, layout)), layer(x))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast_decides_the_output_dtype(dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    layer, x = layer_of(), floats(5, 64, dtype=dtype)
    expected = expected_output(layer, x, output_dtype=autocast_dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        assert_same_bits(layer(x), expected)
        assert_same_bits(layer(nn.Parameter(x)).detach(), expected)  # without the fast call
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype


def test_every_instruction_set_runs_the_same_layer(isa: str) -> None:
    layer, x = layer_of(ASYMMETRIC), floats(5, 64)
    assert_same_bits(layer(x), expected_output(layer, x))
    with cpu.use_isa("scalar"):
        other = layer_of(ASYMMETRIC)
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert_same_bits(other(x), expected_output(layer, x))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            torch.zeros(4, 63),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got [4, 63]",
        ),
        (
            torch.zeros(64, 90),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got [64, 90]",
        ),
        (
            torch.tensor(1.0),
            ValueError,
            "QuantizedLinear: input must be [..., in_features] with in_features = 64, got []",
        ),
        (
            torch.zeros(4, 64, device="meta"),
            ValueError,
            "QuantizedLinear: input must be on the layer's device cpu, got one on meta; move one "
            "of them",
        ),
        (
            torch.zeros(4, 64, dtype=torch.float64),
            TypeError,
            "linear_dynamic: input must be float32, bfloat16 or float16, got float64 [4, 64]; "
            "convert it with .to(torch.float32)",
        ),
        (
            torch.zeros(4, 64, dtype=torch.int64),
            TypeError,
            "linear_dynamic: input must be float32, bfloat16 or float16, got int64 [4, 64]; "
            "convert it with .to(torch.float32)",
        ),
        ([1.0], TypeError, "QuantizedLinear: input must be a tensor, got list"),
    ],
    ids=["narrow", "wide", "scalar", "device", "float64", "int64", "list"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(x: Any, error: type[Exception], text: str, grad: bool) -> None:
    layer = layer_of()
    with torch.set_grad_enabled(grad), pytest.raises(error) as raised:
        layer(x)
    assert str(raised.value).splitlines()[0] == text
    if isinstance(x, Tensor) and x.dim() and x.device.type == "cpu" and error is ValueError:
        with pytest.raises(error, match="in_features = 64"):  # without the fast call
            layer(nn.Parameter(x))


def test_a_layer_without_values_is_refused() -> None:
    """Without this error, the meta kernel would return uninitialised memory."""
    layer = layer_of().to("meta")
    with pytest.raises(ValueError, match="device meta, got one on cpu; load its weights first"):
        layer(floats(3, 64))
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 32)


class Subclass(nn.Linear):
    pass


def pruned() -> nn.Linear:
    return prune.l1_unstructured(float_layer(), "weight", amount=3)


def pruned_bias() -> nn.Linear:
    return prune.l1_unstructured(float_layer(), "bias", amount=3)


def with_forward() -> nn.Linear:
    linear = float_layer()
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def with_value(value: float) -> nn.Linear:
    linear = float_layer()
    with torch.no_grad():
        linear.weight[3, 5] = value
    return linear


def fake() -> nn.Linear:
    with FakeTensorMode():
        return nn.Linear(64, 32)


def old_weight_norm() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(float_layer())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.Conv1d(3, 3, 1), TypeError, "got Conv1d (not an nn.Linear)"),
        (lambda: Subclass(64, 32), TypeError, "got Subclass (subclass of nn.Linear)"),
        (lambda: nn.LazyLinear(32), TypeError, "got LazyLinear (subclass of nn.Linear)"),
        (lambda: nn.Linear(64, 32).double(), TypeError, "got weight of dtype float64"),
        (
            lambda: parametrizations.weight_norm(float_layer()),
            TypeError,
            "got ParametrizedLinear (parametrized)",
        ),
        (
            old_weight_norm,
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            lambda: nn.utils.spectral_norm(float_layer()),
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            pruned,
            TypeError,
            "got weight computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (
            pruned_bias,
            TypeError,
            "got bias computed from other tensors (weight_norm, spectral_norm, pruning)",
        ),
        (with_forward, TypeError, "got forward replaced on the instance"),
        (fake, TypeError, "got weight of type FakeTensor"),
        (
            lambda: with_value(float("nan")),
            ValueError,
            "its weight holds NaN or infinity; check the checkpoint",
        ),
        (
            lambda: with_value(float("-inf")),
            ValueError,
            "its weight holds NaN or infinity; check the checkpoint",
        ),
        (
            lambda: nn.Linear(64, 32, device="meta"),
            ValueError,
            "on the meta device, without values; load its weights first",
        ),
        (lambda: nn.Linear(64, 0), ValueError, "weight of shape [0, 64]"),
        (lambda: nn.Linear(0, 64), ValueError, "weight of shape [64, 0]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_from_float_refuses(
    make: Callable[[], nn.Linear], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        QuantizedLinear.from_float(make())
    start = {
        TypeError: "QuantizedLinear.from_float: linear must be a plain nn.Linear, ",
        ValueError: "QuantizedLinear.from_float: linear cannot be quantized: ",
    }
    assert str(raised.value) == start[error] + text


def test_pruning_made_permanent_is_accepted() -> None:
    linear = prune.remove(pruned(), "weight")
    assert int((QuantizedLinear.from_float(linear).qweight == 0).sum()) >= 3


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"activation": "mish"}, ValueError, "activation must be one of none, relu, gelu"),
        ({"config": "int8"}, TypeError, "config must be a torchquant configuration such as"),
    ],
)
def test_bad_options(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"QuantizedLinear: {text}"):
        QuantizedLinear(64, 32, **arguments)
    with pytest.raises(error, match=text):
        QuantizedLinear.from_float(float_layer(), **arguments)


@pytest.mark.parametrize("size", [0, -3, 2.0, True, None])
@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_bad_sizes(name: str, size: Any) -> None:
    sizes = {"in_features": 64, "out_features": 32, name: size}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {size}"):
        QuantizedLinear(**sizes)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_reach_input_and_bias(dtype: torch.dtype, config: QuantizationConfig) -> None:
    layer = layer_of(config)
    x = floats(2, 5, 64, dtype=dtype).requires_grad_()
    grad = floats(2, 5, 32, seed=9, dtype=dtype)
    layer(x).backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    expected = grad.float() @ layer.to_float().weight.detach()
    torch.testing.assert_close(x.grad, expected.to(dtype))
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, grad.float().sum((0, 1)))


def test_nothing_is_recorded_if_no_gradient_is_needed() -> None:
    layer, x = layer_of().requires_grad_(False), floats(3, 64)
    assert layer(x).grad_fn is None
    with torch.no_grad():
        assert layer(x.requires_grad_()).grad_fn is None


class LoRA(nn.Module):
    """An adapter of low rank on a frozen layer."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(64, rank, bias=False)
        self.up = nn.Linear(rank, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_trains_and_the_layer_does_not_change() -> None:
    below = nn.Linear(64, 64)
    adapted = LoRA(QuantizedLinear.from_float(nn.Linear(64, 32)))
    model = nn.Sequential(below, adapted)
    before = copy.deepcopy(adapted.base)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    x, target = torch.randn(16, 64), torch.randn(16, 32)
    losses = []
    for _ in range(5):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert below.weight.grad is not None, "the gradient must reach what lies below"
        assert bool(below.weight.grad.any())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same_state(adapted.base, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    layer = layer_of(activation="gelu")
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x = floats(4, 64).requires_grad_()
        layer.zero_grad()
        call(x).square().sum().backward()
        assert x.grad is not None
        assert layer.bias is not None
        assert layer.bias.grad is not None
        grads.append((x.grad, layer.bias.grad.clone()))
    assert_same_bits(grads[0][0], grads[1][0])
    assert_same_bits(grads[0][1], grads[1][1])


# ---------------------------------------------------------------- torch.func, tracing, subclasses


def test_functional_call_with_another_bias() -> None:
    layer, x, bias = layer_of(), floats(3, 64), floats(32, seed=5).requires_grad_()
    out = torch.func.functional_call(layer, {"bias": bias}, (x,))
    expected = copy.deepcopy(layer)
    expected.bias = nn.Parameter(bias.detach())
    assert_same_bits(out.detach(), expected_output(expected, x))
    out.sum().backward()
    assert bias.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    layer, x = layer_of(), floats(4, 3, 64)
    assert_same_bits(torch.func.vmap(layer)(x).detach(), expected_output(layer, x))


def test_fake_tensors() -> None:
    layer = layer_of()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = layer(torch.empty(3, 64, dtype=torch.bfloat16))
        assert (out.shape, out.dtype) == ((3, 32), torch.bfloat16)
        with pytest.raises(ValueError, match="in_features = 64, got"):
            layer(torch.empty(3, 65))


class Tagged(Tensor):
    pass


def test_tensor_subclasses() -> None:
    layer, x = layer_of(), floats(3, 64)
    out = layer(x.as_subclass(Tagged))
    assert isinstance(out, Tagged)
    assert_same_bits(out.as_subclass(Tensor).detach(), expected_output(layer, x))


def test_fx_symbolic_trace() -> None:
    model = nn.Sequential(layer_of(ASYMMETRIC), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    x = floats(3, 64)
    assert_same_bits(traced(x).detach(), model(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit_trace() -> None:
    layer = layer_of().requires_grad_(False)
    traced = torch.jit.trace(layer, floats(3, 64))
    x = floats(5, 64, seed=4)
    assert_same_bits(traced(x), layer(x))


# ---------------------------------------------------------------- hooks


def test_hooks_run() -> None:
    layer, seen = layer_of(), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    x = floats(3, 64).requires_grad_()
    out = layer(x)
    assert_same_bits(out.detach(), expected_output(layer, (2 * x).detach()) + 1)
    out.sum().backward()
    assert seen[1:] == ["backward"]


def test_forward_mode_gradients_raise_instead_of_vanishing() -> None:
    layer, x = layer_of(), floats(3, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            layer(dual)
