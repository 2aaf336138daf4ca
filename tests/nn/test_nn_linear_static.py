"""QuantizedLinear with static activations and with fewer than 8 bits."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from support import FLOATS, NOT_FINITE, assert_same_bits, check_everywhere, floats, sprinkle
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    functional,
)
from torchquant.configs import Dynamic, QuantizationConfig, Static
from torchquant.nn import QuantizedLinear

STATIC: dict[str, QuantizationConfig] = {
    "static": Int8StaticActivationInt8WeightConfig(),
    "symmetric": Int8StaticActivationInt8WeightConfig(True),
    "zero_points": Int8StaticActivationInt8WeightConfig(False, False),
    "w4a8": IntxActivationIntxWeightConfig(4, 8, True),
    "w3a5": IntxActivationIntxWeightConfig(3, 5, True),
    "w2a2_zero_points": IntxActivationIntxWeightConfig(2, 2, True, False, False),
}
DYNAMIC: dict[str, QuantizationConfig] = {
    f"w{weight}a{activation}{'' if symmetric else '_zero_points'}": IntxActivationIntxWeightConfig(
        weight, activation, False, symmetric, symmetric
    )
    for weight, activation in ((8, 8), (4, 8), (8, 4), (7, 6), (5, 3), (2, 2))
    for symmetric in (True, False)
}
CONFIGS = {**STATIC, **{f"dynamic_{name}": config for name, config in DYNAMIC.items()}}


def layer_of(config: QuantizationConfig, activation: str = "none") -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(70, 33)
    if not isinstance(config.activations, Static):
        return QuantizedLinear.from_float(linear, config, activation)
    zero = 0 if config.activations.symmetric else config.activations.range[0] + 1
    return QuantizedLinear.from_float(
        linear,
        config,
        activation,
        input_scale=torch.tensor([4.0 / config.activations.range[1]]),
        input_zero_point=torch.tensor([zero], dtype=torch.int32),
    )


def specification(layer: QuantizedLinear, x: Tensor) -> Tensor:
    qmin, qmax = layer.config.activations.range
    rows = functional.quantize_rows(
        x,
        layer.input_scale,
        layer.input_zero_point,
        qmin=qmin,
        qmax=qmax,
        symmetric=layer.config.activations.symmetric,
    )
    return functional.quantized_linear(
        rows.q,
        layer.qweight,
        None if layer.bias is None else layer.bias.detach(),
        input_scale=rows.scale,
        input_zero_point=rows.zero_point,
        weight_scale=layer.weight_scale,
        weight_zero_point=layer.weight_zero_point,
        output_dtype=x.dtype,
        activation=layer.activation,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_has_the_bits_of_the_specification(name: str) -> None:
    for activation in ("none", "gelu"):
        layer = layer_of(CONFIGS[name], activation)
        for dtype in FLOATS:
            x = sprinkle(floats(9, 70, dtype=dtype), NOT_FINITE, seed=1)
            check_everywhere(
                lambda x=x, layer=layer: layer(x).detach(), specification(layer, x), counts=(1, 2)
            )


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_layer_of_few_bits_has_the_bits_of_the_specification(name: str) -> None:
    config = DYNAMIC[name]
    layer = layer_of(config)
    x = sprinkle(floats(9, 70), NOT_FINITE, seed=1)
    want = functional.linear_dynamic(
        x,
        layer.qweight,
        layer.weight_scale,
        layer.weight_zero_point,
        layer.bias.detach(),
        symmetric=config.activations.symmetric,
        activation_bits=config.activations.bits,
    )
    check_everywhere(lambda: layer(x).detach(), want)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_in_their_range_and_survive_a_round_trip(name: str) -> None:
    layer = layer_of(CONFIGS[name])
    qmin, qmax = layer.config.weights.range
    assert qmin <= int(layer.qweight.min())
    assert int(layer.qweight.max()) <= qmax
    error = (layer.to_float().weight - layer_of(STATIC["static"]).to_float().weight).abs().max()
    assert error.item() <= 1.1 * float(layer.weight_scale.max())


@pytest.mark.parametrize("name", CONFIGS)
def test_state_copies_and_files(name: str, tmp_path: Path) -> None:
    layer = layer_of(CONFIGS[name], "relu")
    x = floats(5, 70)
    want = layer(x).detach()
    other = QuantizedLinear(70, 33, True, CONFIGS[name], "relu")
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(copied(x).detach(), want)
        assert list(copied.state_dict()) == list(layer.state_dict())
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert_same_bits(torch.load(stream, weights_only=False)(x).detach(), want)
    torchquant.save(nn.Sequential(layer), tmp_path / "model.safetensors")
    model = torchquant.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(70, 33)))
    assert_same_bits(model(x).detach(), want)
    assert model[0].config == layer.config
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(70, 33))
    assert_same_bits(torchquant.load(tmp_path / "model.safetensors", empty)(x).detach(), want)


def test_a_static_layer_stays_float32() -> None:
    layer = layer_of(STATIC["static"]).to(torch.bfloat16)
    assert layer.input_scale is not None
    assert layer.input_scale.dtype == torch.float32
    assert layer(floats(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    state = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    assert layer.input_scale.dtype == torch.float32


def test_a_layer_pickled_before_static_activations_existed() -> None:
    layer = layer_of(Int8DynamicActivationInt8WeightConfig())
    state = layer.__getstate__()
    del state["_buffers"]["input_scale"], state["_buffers"]["input_zero_point"]
    old = QuantizedLinear.__new__(QuantizedLinear)
    old.__setstate__(state)
    x = floats(2, 70)
    assert_same_bits(old(x).detach(), layer(x).detach())
    assert list(old.state_dict()) == list(layer.state_dict())


def test_repr() -> None:
    assert "int4 per channel, activations int8 per tensor with zero point" in repr(
        layer_of(STATIC["w4a8"])
    )
    assert "int5 per channel, activations int3 per token" in repr(layer_of(DYNAMIC["w5a3"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_input_and_bias(name: str) -> None:
    """The straight-through estimator: through relu, and where the rounded input is in range."""
    layer = layer_of(CONFIGS[name], "relu")
    x, grad = floats(9, 70).requires_grad_(), floats(9, 33, seed=1)
    y = layer(x)
    y.backward(grad)
    masked = torch.where(y > 0, grad, 0.0).double()
    assert 0 < int((y > 0).sum()) < y.numel()
    zero = 0 if layer.weight_zero_point is None else layer.weight_zero_point.double().view(-1, 1)
    weight = (layer.qweight.double() - zero) * layer.weight_scale.double().view(-1, 1)
    passes = torch.ones(9, 70, dtype=torch.bool)
    if name in STATIC:
        qmin, qmax = layer.config.activations.range
        passes = functional.in_range(
            x.detach(), layer.input_scale, layer.input_zero_point, qmin=qmin, qmax=qmax
        )
        assert 0 < int(passes.sum()) < passes.numel()
    want = torch.where(passes, masked @ weight, 0.0)
    assert bool((x.grad[~passes] == 0).all())
    for got, wanted in ((x.grad, want), (layer.bias.grad, masked.sum(0))):
        tolerance = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=tolerance)


def test_autocast() -> None:
    layer = layer_of(STATIC["static"])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(floats(2, 70)).dtype == torch.bfloat16


def test_compiled() -> None:
    for config in (STATIC["static"], DYNAMIC["w2a2_zero_points"]):
        layer = layer_of(config)
        x = floats(3, 70)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_same_bits(compiled(x), layer(x))


def test_errors() -> None:
    linear, static = nn.Linear(8, 4), STATIC["static"]
    scale, zero = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    cases = (
        ({"config": static}, "input_scale must be given for static activations"),
        ({"config": static, "input_scale": scale, "input_zero_point": zero + 200}, "from -128 to"),
        ({"config": static, "input_scale": -scale}, "input_scale must be finite and at least"),
        ({"config": static, "input_scale": scale.repeat(2)}, "input_scale must have shape [1]"),
        ({"input_scale": scale}, "input_scale and input_zero_point must be None for dynamic"),
        ({"input_zero_point": zero}, "input_scale and input_zero_point must be None for dynamic"),
    )
    for arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            QuantizedLinear.from_float(linear, **arguments)
    with pytest.raises(
        TypeError, match="narrow_range"
    ):  # dynamic activations always use all integers
        Dynamic(narrow_range=False)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="activation_bits must be from 2 to 8, got 9"):
        torchquant.ops.linear_dynamic(
            torch.ones(1, 8),
            torchquant.ops.pack_weight(torch.ones(4, 8, dtype=torch.int8)),
            torch.ones(4),
            out_features=4,
            activation_bits=9,
        )
    layer = layer_of(static)
    with pytest.raises(RuntimeError, match="input_scale must be float32 \\[1\\]"):
        layer.load_state_dict({**layer.state_dict(), "input_scale": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*input_scale"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "input_scale"})


def test_layers_with_static_activations_are_not_computed_together() -> None:
    from torchquant.nn.projections import ProjectionGroup

    for config in (STATIC["static"], DYNAMIC["w8a4"]):
        layers = [layer_of(config), layer_of(config)]
        assert "8 bits" in str(ProjectionGroup.obstacle(layers))
