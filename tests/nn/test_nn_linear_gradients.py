"""QuantizedLinear: gradients, torch.func, tracing, tensor subclasses and hooks."""

import copy

import pytest
import torch
from support import FLOATS, assert_same_bits, floats
from support.layers import ALL_CONFIGS, ASYMMETRIC, assert_same_state, expected_output, layer_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from torchquant import QuantizationConfig
from torchquant.nn import QuantizedLinear

BOTH = pytest.mark.parametrize(
    "config", [ALL_CONFIGS["default"], ALL_CONFIGS["int4_groups"]], ids=["int8", "int4_groups"]
)


@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
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
@BOTH
def test_vmap(config: QuantizationConfig) -> None:
    layer, x = layer_of(config), floats(4, 3, 64)
    assert_same_bits(torch.func.vmap(layer)(x).detach(), expected_output(layer, x))


@BOTH
def test_fake_tensors(config: QuantizationConfig) -> None:
    layer = layer_of(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = layer(torch.empty(3, 64, dtype=torch.bfloat16))
        assert (out.shape, out.dtype) == ((3, 32), torch.bfloat16)
        with pytest.raises(ValueError, match="in_features = 64, got"):
            layer(torch.empty(3, 65))


class Tagged(Tensor):
    pass


@BOTH
def test_tensor_subclasses(config: QuantizationConfig) -> None:
    layer, x = layer_of(config), floats(3, 64)
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


@BOTH
def test_hooks_run(config: QuantizationConfig) -> None:
    layer, seen = layer_of(config), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    x = floats(3, 64).requires_grad_()
    out = layer(x)
    assert_same_bits(out.detach(), expected_output(layer, (2 * x).detach()) + 1)
    out.sum().backward()
    assert seen[1:] == ["backward"]


@BOTH
def test_forward_mode_gradients_raise_instead_of_vanishing(config: QuantizationConfig) -> None:
    layer, x = layer_of(config), floats(3, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp is not implemented"):
            layer(dual)
