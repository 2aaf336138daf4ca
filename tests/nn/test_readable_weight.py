"""``layer.weight`` of a quantized layer: metadata, values, ``F.linear``, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import CONFIGS, float_layer, layer_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

import torchquant
from torchquant import Int8StaticActivationInt8WeightConfig, QuantizationConfig
from torchquant.nn import QuantizedLinear

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STATIC = Int8StaticActivationInt8WeightConfig()


def without_dequantizing(layer: QuantizedLinear) -> Any:
    """The weight of a layer that fails if it is dequantized."""

    def fail() -> Tensor:
        raise AssertionError("dequantized")

    layer.dequantized = fail  # type: ignore[method-assign]
    return layer.weight


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_metadata_costs_nothing(dtype: torch.dtype, bias: bool) -> None:
    weight = without_dequantizing(layer_of(dtype=dtype, bias=bias))
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.size(), weight.size(0)) == ((32, 64), (32, 64), 32)
    assert (weight.dtype, weight.device, weight.layout) == (
        dtype,
        torch.device("cpu"),
        torch.strided,
    )
    assert (weight.ndim, weight.dim(), len(weight), weight.numel()) == (2, 2, 32, 2048)
    assert (weight.stride(), weight.is_contiguous(), weight.itemsize) == (
        (64, 1),
        True,
        dtype.itemsize,
    )
    assert weight.is_floating_point()
    assert torch.is_floating_point(weight)
    assert not (weight.requires_grad or weight.is_meta or weight.is_cuda)
    assert weight.grad is None
    assert weight.is_leaf


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_other_use_reads_the_dequantized_values(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    values = layer.to_float().weight.detach()
    assert values.dtype == dtype
    for read in (
        layer.weight + 0,
        layer.weight.t().t(),
        layer.weight.clone(),
        layer.weight.data.clone(),
        layer.weight.detach()[:],
        torch.cat([layer.weight[:16], layer.weight[16:]]),
        torch.empty_like(values).copy_(layer.weight),
        torch.empty(32, 64, dtype=dtype).set_(layer.weight.clone()),
        copy.deepcopy(layer.weight),
        pickle.loads(pickle.dumps(layer.weight)),
        torch.tensor(layer.weight.tolist(), dtype=dtype),
    ):
        assert type(read) is Tensor
        assert_same_bits(read, values)
    assert layer.weight.to(torch.float64).dtype == torch.float64
    assert repr(layer.weight) == repr(values)
    with torch._C.DisableTorchFunctionSubclass():  # code in C++ reads the same values
        assert_same_bits(torch.mul(layer.weight, 1), values)


@pytest.mark.parametrize("config", [*CONFIGS.values(), STATIC], ids=[*CONFIGS, "static"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_linear_has_the_bits_of_the_layer(
    config: QuantizationConfig, dtype: torch.dtype, activation: str
) -> None:
    given = {"input_scale": torch.tensor([0.05])} if config is STATIC else {}
    linear, other = float_layer(dtype=dtype), floats(32, seed=9).to(dtype)
    layer = QuantizedLinear.from_float(linear, config, activation, **given)
    x = floats(3, 5, 64, dtype=dtype)
    for bias in (linear.bias, None, other):
        same = QuantizedLinear.from_tensors(linear.weight, bias, config, **given)
        wanted = same(x).detach()
        weight = without_dequantizing(layer)
        assert_same_bits(F.linear(x, weight, bias).detach(), wanted)
        assert_same_bits(F.linear(input=x, weight=weight, bias=bias).detach(), wanted)
        assert_same_bits(F.linear(x[0, 0], weight, bias).detach(), wanted[0, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, layer.weight).dtype == torch.bfloat16


def test_gradients_reach_the_input_and_the_bias() -> None:
    layer, gradients = layer_of(), []
    for call in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        x = floats(3, 64).requires_grad_()
        layer.bias.grad = None
        call(x).square().sum().backward()
        gradients.append((x.grad, layer.bias.grad))
    for here, there in zip(*gradients, strict=True):
        assert_same_bits(here, there)
    x = floats(3, 64).requires_grad_()
    (x @ layer.weight.T).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_float().weight.detach().sum(0).expand(3, 64))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "fill_": lambda weight: weight.fill_(0),
    "normal_": lambda weight: nn.init.normal_(weight),
    "zero_": lambda weight: nn.init.zeros_(weight),
    "kaiming_uniform_": lambda weight: nn.init.kaiming_uniform_(weight),
    "uniform_": lambda weight: weight.data.uniform_(),
    "copy_": lambda weight: weight.copy_(torch.zeros(32, 64)),
    "mul_": lambda weight: weight.detach().mul_(2),
    "add": lambda weight: torch.add(weight, 1, out=weight),
    "_foreach_add_": lambda weight: torch._foreach_add_([weight], 1.0),
    "__setitem__": lambda weight: weight.__setitem__(0, 1),
    "div_": lambda weight: weight.__itruediv__(2),
    "requires_grad_": lambda weight: weight.requires_grad_(),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES)
def test_changes_raise(name: str, change: Callable[[Any], Any]) -> None:
    layer = layer_of()
    before = layer.qweight
    with pytest.raises(RuntimeError) as raised, torch.no_grad():
        change(layer.weight)
    assert str(raised.value) == (
        f"{name}: weight must not be changed, it is the read-only weight of a quantized layer, "
        "which holds integers; to change it, convert the layer back with "
        "torchquant.to_float_(model), change the weight, and quantize again"
    )
    assert torch.equal(layer.qweight, before)


def test_attributes_cannot_be_changed_either() -> None:
    weight = layer_of().weight
    for name, value in (("data", torch.zeros(32, 64)), ("grad", torch.zeros(32, 64))):
        with pytest.raises(RuntimeError, match="read-only"):
            setattr(weight, name, value)
    with pytest.raises(RuntimeError, match="read-only"):
        weight.requires_grad = True
    with pytest.raises(RuntimeError, match="read-only"):
        nn.Parameter(weight)
    weight.requires_grad = False  # what it is already
    weight.grad = None
    assert weight.requires_grad_(False) is weight
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="read-only"):
        weight.mul_(2)


def test_an_assigned_parameter_is_ignored_with_a_warning() -> None:
    layer, x = layer_of(), floats(3, 64)
    expected, state = layer(x).detach(), layer.state_dict()
    with pytest.warns(UserWarning, match=r"weight is read-only.* ignored.*to_float_\(model\)"):
        layer.weight = nn.Parameter(torch.randn(32, 64))  # transformers' tie_weights()
    assert_same_bits(layer(x).detach(), expected)
    assert layer.state_dict().keys() == state.keys()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(
        ValueError, match=r"keep its shape \[32, 64\], got .* \[40, 64\].*to_float_"
    ):
        layer.weight = nn.Parameter(torch.randn(40, 64))
    with pytest.raises(TypeError, match="must not be assigned, it is read-only, got Tensor"):
        layer.weight = torch.zeros(32, 64)
    with pytest.raises(AttributeError):
        del layer.weight


def test_no_tensor_but_the_placeholder_has_a_name_that_begins_with_weight() -> None:
    for config in CONFIGS.values():
        for bias in (True, False):
            layer = layer_of(config, bias=bias)
            named = [*layer.named_parameters(), *layer.named_buffers()]
            names = [name for name, _ in named if name.startswith("weight")]
            assert names == ["weight_placeholder"]
            assert not any(name.startswith("weight") for name in layer.state_dict())


def test_copies_of_a_model_have_readable_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    torchquant.quantize_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer, same in zip(other, model, strict=True):
            assert_same_bits(layer.weight + 0, same.weight + 0)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.fc.weight, self.fc.bias)
        result: Tensor = self.last(hidden.to(self.last.weight.dtype))
        return result


def reader() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Reader().eval(), floats(3, 64)
    torchquant.quantize_(model)
    return model, x, model(x).detach()


def test_functional_transforms_and_traces() -> None:
    model, x, expected = reader()
    with torch.inference_mode():
        assert_same_bits(model(x), expected)
    state = dict(model.named_parameters())
    assert_same_bits(functional_call(model, state, (x,)).detach(), expected)
    assert_same_bits(torch.func.vmap(model)(x[:, None])[:, 0].detach(), expected)
    assert_same_bits(torch.fx.symbolic_trace(model)(x).detach(), expected)
    assert_same_bits(torch.export.export(model, (x,)).module()(x).detach(), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(3, 64)).shape == (3, 64)
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == (3, 64)
    assert meta.fc.weight.is_meta


def test_compile_computes_with_the_dequantized_weight() -> None:
    model, x, expected = reader()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert F.cosine_similarity(compiled(x).flatten(), expected.flatten(), 0) > 0.999
