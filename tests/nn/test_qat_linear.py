"""QATLinear gives the output of the converted layer, in every mode, on every instruction set."""

import pytest
import torch
from support import assert_same_bits, check_everywhere, floats
from support.qat_layers import CONFIGS, frozen, inputs, layer_of
from torch import nn

from torchquant import ObservedQuantizer, QATLinear
from torchquant.nn import QuantizedLinear


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_training_and_deployed_give_the_same_bits(config: str, activation: str) -> None:
    layer = frozen(layer_of(config, activation=activation))
    deployed = layer.to_quantized()
    for x in inputs():
        want = deployed(x).detach()
        for mode in (True, False):
            layer.train(mode)
            check_everywhere(
                lambda x=x: layer(x).detach(), want, counts=(1, 2), what=(mode, x.shape)
            )
            with torch.no_grad():
                check_everywhere(lambda x=x: layer(x), want, counts=(1, 2), what=(mode, x.shape))
        check_everywhere(lambda x=x: layer.to_quantized()(x).detach(), want, what=x.shape)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(config: str, dtype: torch.dtype) -> None:
    layer = frozen(layer_of(config, activation="relu"))
    deployed = layer.to_quantized()
    x = floats(9, 40)
    with torch.autocast("cpu", dtype):
        want, got = deployed(x), layer(x)
        with torch.no_grad():
            assert_same_bits(layer(x), want.detach())
    assert want.dtype == dtype
    assert_same_bits(got.detach(), want.detach())
    got.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_of_low_precision_parameters(dtype: torch.dtype) -> None:
    for config in ("dynamic", "static", "lsq_w4a4"):
        layer = frozen(layer_of(config).to(dtype))
        x = floats(9, 40, dtype=dtype)
        assert_same_bits(layer(x).detach(), layer.to_quantized()(x).detach())
        layer(x).float().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("config", ["dynamic", "dynamic_w4", "dynamic_weight_zero_points"])
def test_to_quantized_is_from_float(config: str) -> None:
    layer = layer_of(config)
    deployed = layer.config.deployed()
    other = QuantizedLinear.class_for(deployed).from_float(layer.to_float(), deployed)
    for (name, got), (_, want) in zip(
        layer.to_quantized().state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert_same_bits(got, want, name)


@pytest.mark.parametrize("config", CONFIGS)
def test_deployed_integers_are_in_their_ranges(config: str) -> None:
    layer = layer_of(config)
    deployed = layer.to_quantized()
    qmin, qmax = layer.config.weights.range
    assert qmin <= int(deployed.integers.min())
    assert int(deployed.integers.max()) <= qmax
    assert deployed.config == layer.config.deployed()
    if deployed.input_zero_point is not None:
        low, high = deployed.config.activations.range
        assert low <= int(deployed.input_zero_point) <= high


@pytest.mark.parametrize("config", CONFIGS)
def test_the_simulation_differs_by_rounding_only(config: str) -> None:
    layer = frozen(layer_of(config, activation="relu"))
    x = torch.randn(32, 40)
    layer(x).sum().backward()
    exact = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer.simulate = True
    y = layer(x)
    layer.simulate = False
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (name in exact)
        if name in exact:
            torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-4, atol=1e-4)


def test_ranges_are_updated_in_training_mode_only() -> None:
    layer = layer_of("static")
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ObservedQuantizer)
    before = quantizer.qparams()[0].clone()
    layer.eval()(torch.randn(4, 40) * 100)
    assert_same_bits(quantizer.qparams()[0], before)
    layer.train()(torch.randn(4, 40) * 100)
    assert float(quantizer.qparams()[0]) > float(before)
    quantizer.freeze()
    before = quantizer.qparams()[0].clone()
    layer(torch.randn(4, 40) * 1e4)
    assert_same_bits(quantizer.qparams()[0], before)


@pytest.mark.parametrize("config", ["dynamic", "static", "lsq"])
def test_the_first_stage_computes_in_float_and_observes(config: str) -> None:
    torch.manual_seed(0)
    layer = QATLinear(40, 24, config=CONFIGS[config], activation="relu").enable_quantization(False)
    x = torch.randn(8, 40)
    want = torch.relu(nn.functional.linear(x, layer.weight, layer.bias))
    assert_same_bits(layer(x).detach(), want.detach())
    assert ", in float" in repr(layer)
    if layer.input_quantizer is not None:
        scale, _ = layer.input_quantizer.qparams()
        assert bool(torch.isfinite(scale))
    layer.enable_quantization()
    assert_same_bits(frozen(layer)(x).detach(), layer.to_quantized()(x).detach())


def test_static_without_a_range_is_refused() -> None:
    layer = QATLinear(8, 4, config=CONFIGS["static"])
    with pytest.raises(RuntimeError, match="there is no range yet"):
        layer.to_quantized()
    with pytest.raises(RuntimeError, match="there is no range yet"):
        layer.eval()(torch.randn(2, 8))
    lsq = QATLinear(8, 4, config=CONFIGS["lsq"])
    with pytest.raises(RuntimeError, match="not initialised"):
        lsq.to_quantized()
