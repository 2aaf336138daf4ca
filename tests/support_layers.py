"""What the tests of modules share: float and quantized layers, and what to expect of them."""

from typing import Any

import torch
from support import assert_same_bits, floats
from torch import Tensor, nn

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import functional
from torchquant.nn import QuantizedLinear

CONFIGS = {
    "default": Config(),
    "symmetric": Config(activation_symmetric=True),
    "asymmetric_weight": Config(activation_symmetric=True, symmetric=False),
    "asymmetric": Config(activation_symmetric=False, symmetric=False),
}
ASYMMETRIC = Config(activation_symmetric=False, symmetric=False)


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


def layer_of(config: Config | None = None, activation: str = "none", **kw: Any) -> QuantizedLinear:
    return QuantizedLinear.from_float(float_layer(**kw), config, activation)


def expected_output(
    layer: QuantizedLinear, x: Tensor, output_dtype: torch.dtype | None = None
) -> Tensor:
    """The specification's, from the canonical state."""
    return functional.dynamic_linear(
        x,
        layer.qweight,
        None if layer.bias is None else layer.bias.detach(),
        weight_scale=layer.weight_scale,
        weight_zero_point=layer.weight_zero_point,
        symmetric=layer.config.activation_symmetric,
        output_dtype=output_dtype,
        activation=layer.activation,
    )


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert_same_bits(ours[key], theirs[key], key)
