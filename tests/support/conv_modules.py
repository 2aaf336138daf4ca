"""Convolutions of all sizes, float, quantized and in training, with inputs and expected outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from support import floats, generator
from torchquant import (
    Dynamic,
    ObservedQuantizer,
    PerTensor,
    QATConfig,
    QuantizationConfig,
    Static,
    Weights,
    functional,
)
from torchquant.nn import QATConv1d, QATConv2d, QuantizedConv1d, QuantizedConv2d

# name -> (sizes of nn.Conv2d, shape of an input)
SIZES_2D: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "3x3": ({"kernel_size": 3, "padding": 1}, (2, 8, 9, 7)),
    "1x1": ({"kernel_size": 1}, (3, 8, 5, 6)),
    "stride": ({"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)}, (2, 8, 11, 10)),
    "dilation": ({"kernel_size": 3, "dilation": (1, 2), "padding": (0, 2)}, (2, 8, 7, 9)),
    "groups": ({"kernel_size": 3, "groups": 2, "padding": 1}, (2, 8, 6, 6)),
    "depthwise": ({"kernel_size": 3, "groups": 8, "padding": 1}, (2, 8, 9, 7)),
    "same": ({"kernel_size": (4, 3), "padding": "same"}, (2, 8, 7, 9)),
    "valid": ({"kernel_size": 3, "padding": "valid", "bias": False}, (2, 8, 7, 9)),
    "reflect": ({"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (2, 8, 6, 5)),
    "replicate": ({"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, (2, 8, 6, 5)),
    "circular": (
        {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
        (2, 8, 6, 5),
    ),
}
SIZES_1D: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "1d": ({"kernel_size": 5, "stride": 2, "padding": 2}, (2, 8, 20)),
    "1d_same": ({"kernel_size": 4, "padding": "same", "groups": 4}, (2, 8, 11)),
    "1d_reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (2, 8, 11)),
}
SIZES = {**SIZES_2D, **SIZES_1D}

CONFIGS = {
    "default": QuantizationConfig(),
    "symmetric": QuantizationConfig(activations=Dynamic(symmetric=True)),
    "w4a6": QuantizationConfig(Weights(4), Dynamic(6)),
    "per_tensor": QuantizationConfig(Weights(granularity=PerTensor())),
    "static": QuantizationConfig(activations=Static()),
    "static_symmetric": QuantizationConfig(Weights(3), Static(5, symmetric=True)),
}

TRAINING = {
    "dynamic": QATConfig(),
    "dynamic_w4a6": QATConfig(4, 6, activation_symmetric=True),
    "dynamic_lsq": QATConfig(weight_bits=3, learned_weights=True),
    "static": QATConfig(activations="static"),
    "static_symmetric": QATConfig(activations="static", activation_symmetric=True),
    "lsq": QATConfig(4, 4, "static", learned_weights=True, learned_activations=True),
    "lsq_unsigned": QATConfig(
        activations="static", learned_activations=True, activation_signed=False
    ),
    "lsq_plus": QATConfig(
        8, 4, "static", learned_activations=True, learned_offset=True, learned_weights=True
    ),
}


def float_conv(
    name: str = "3x3", out_channels: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Conv1d | nn.Conv2d:
    sizes, shape = SIZES[name]
    kind = nn.Conv2d if name in SIZES_2D else nn.Conv1d
    conv = kind(shape[1], out_channels, **sizes, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(floats(out_channels, *conv.weight.shape[1:], seed=seed))
        if conv.bias is not None:
            conv.bias.copy_(floats(out_channels, seed=seed + 1))
    return conv


def input_of(name: str = "3x3", seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples of different ranges that are not centred at 0."""
    shape = SIZES[name][1]
    x = torch.randn(shape, generator=generator(seed)) + 0.4
    scale = torch.exp2(torch.arange(shape[0]).float()).reshape(-1, *[1] * (len(shape) - 1))
    return (x * scale).to(dtype)


def quantized(
    name: str = "3x3",
    config: QuantizationConfig | None = None,
    activation: str = "none",
    **options: Any,
) -> QuantizedConv1d | QuantizedConv2d:
    static: dict[str, Tensor] = {}
    if config is not None and isinstance(config.activations, Static):
        zero = 0 if config.activations.symmetric else -11
        static = {
            "input_scale": torch.tensor([0.02]),
            "input_zero_point": torch.tensor([zero], dtype=torch.int32),
        }
    kind: Any = QuantizedConv2d if name in SIZES_2D else QuantizedConv1d
    layer: QuantizedConv1d | QuantizedConv2d = kind.from_float(
        float_conv(name, **options), config, activation, **static
    )
    return layer


def trained(
    name: str = "3x3",
    config: str = "dynamic",
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
) -> QATConv1d | QATConv2d:
    """A layer whose ranges and steps were initialised by a batch."""
    kind: Any = QATConv2d if name in SIZES_2D else QATConv1d
    layer: QATConv1d | QATConv2d = kind.from_float(
        float_conv(name, dtype=dtype), TRAINING[config], activation
    )
    layer(input_of(name, seed=11, dtype=dtype))
    return layer


def frozen(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, ObservedQuantizer):
            module.freeze()
    return layer


def torch_padding(conv: Any) -> list[int]:
    """The padding before and after each dimension, from torch's own private attribute."""
    last_first = list(conv._reversed_padding_repeated_twice)
    pairs = [last_first[i : i + 2] for i in range(0, len(last_first), 2)]
    return [side for pair in reversed(pairs) for side in pair]


def expected_output(layer: Any, name: str, x: Tensor) -> Tensor:
    """The specification's result, from the canonical state and the sizes of the float layer."""
    conv = float_conv(name)
    if x.dim() == len(conv.kernel_size) + 1:
        return expected_output(layer, name, x.unsqueeze(0)).squeeze(0)
    padding = torch_padding(conv)
    if conv.padding_mode != "zeros":
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode)
        padding = [0] * len(padding)
    options = {
        "stride": conv.stride,
        "padding": padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "activation": layer.activation,
        "output_dtype": x.dtype,
    }
    bias = None if layer.bias is None else layer.bias.detach()
    part = layer.config.activations
    if isinstance(part, Static):
        qmin, qmax = part.range
        return functional.conv_static(
            x,
            layer.input_scale,
            layer.input_zero_point,
            layer.qweight,
            layer.qweight_scale,
            bias,
            **options,
            input_qmin=qmin,
            input_qmax=qmax,
        )
    return functional.conv_dynamic(
        x,
        layer.qweight,
        layer.qweight_scale,
        bias,
        **options,
        symmetric=part.symmetric,
        activation_bits=part.bits,
    )
