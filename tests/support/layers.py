"""Float and quantized layers with their expected results, for the tests of modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from support import assert_same_bits, floats
from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import (
    Int8DynamicActivationIntxWeightConfig,
    PerGroup,
    QuantizationConfig,
    QuantizationReport,
    functional,
)
from torchquant.nn import QuantizedIntxLinear, QuantizedLinear

CONFIGS = {
    "default": Config(),
    "symmetric": Config(activation_symmetric=True),
    "asymmetric_weight": Config(activation_symmetric=True, weight_symmetric=False),
    "asymmetric": Config(activation_symmetric=False, weight_symmetric=False),
}
# Weights of fewer bits or in groups, which are layers of another class.
INTX_CONFIGS = {
    "int4_groups": Int8DynamicActivationIntxWeightConfig(4, 32),
    "int3_zero_points": Int8DynamicActivationIntxWeightConfig(3, 48, symmetric=False),
    "int6_per_channel": Int8DynamicActivationIntxWeightConfig(6, None, activation_symmetric=True),
}
ALL_CONFIGS = {**CONFIGS, **INTX_CONFIGS}
ASYMMETRIC = Config(activation_symmetric=False, weight_symmetric=False)


def float_layer(
    out_features: int = 32,
    in_features: int = 64,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(floats(out_features, in_features, seed=seed))
        if bias:
            linear.bias.copy_(floats(out_features, seed=seed + 1))
    return linear


def layer_of(
    config: QuantizationConfig | None = None, activation: str = "none", **kw: Any
) -> QuantizedLinear | QuantizedIntxLinear:
    layer_class: Any = QuantizedLinear.class_for(config or Config())
    layer: QuantizedLinear = layer_class.from_float(float_layer(**kw), config, activation)
    return layer


def expected_output(
    layer: QuantizedLinear | QuantizedIntxLinear,
    x: Tensor,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification's, from the canonical state; activations are dynamic."""
    if isinstance(layer, QuantizedIntxLinear):
        return _expected_intx(layer, x, output_dtype)
    return functional.linear_dynamic(
        x,
        layer.qweight,
        layer.weight_scale,
        layer.weight_zero_point,
        None if layer.bias is None else layer.bias.detach(),
        symmetric=layer.config.activations.symmetric,
        output_dtype=output_dtype,
        activation=layer.activation,
    )


def _expected_intx(
    layer: QuantizedIntxLinear, x: Tensor, output_dtype: torch.dtype | None
) -> Tensor:
    weights, activations = layer.config.weights, layer.config.activations
    granularity = weights.granularity
    return functional.linear_dynamic_intx(
        x,
        functional.unpack_integers(layer.qweight, weights.bits, layer.in_features),
        layer.qweight_scale,
        layer.qweight_zero_point,
        None if layer.bias is None else layer.bias.detach(),
        bits=weights.bits,
        group_size=granularity.group_size if isinstance(granularity, PerGroup) else None,
        symmetric=activations.symmetric,
        activation_bits=activations.bits,
        output_dtype=output_dtype,
        activation=layer.activation,
    )


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert_same_bits(ours[key], theirs[key], key)


def outcome(report: QuantizationReport) -> dict[str, str]:
    """The action and reason in the report for each layer's name."""
    return {
        layer.name: f"{layer.action}: {layer.reason}" if layer.reason else layer.action
        for layer in report.layers
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also the non-persistent ones."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block must leave every module, tensor, value and mode as it was."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = tensors_of(model)
    values = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    modes = [module.training for module in model.modules()]
    places = [(list(module._parameters), list(module._buffers)) for module in model.modules()]
    yield
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    now = tensors_of(model)
    assert list(now) == list(tensors)
    for key, tensor in now.items():
        assert tensor is tensors[key]
        if not tensor.is_meta:
            assert_same_bits(tensor.detach(), values[key], key)
    assert [module.training for module in model.modules()] == modes
    assert places == [
        (list(module._parameters), list(module._buffers)) for module in model.modules()
    ]
