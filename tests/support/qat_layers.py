"""QATLinear layers of every kind, initialised by a batch, and inputs for them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from support import FLOATS, NOT_FINITE, floats, sprinkle
from torchquant import ObservedQuantizer, QATConfig, QATLinear, TrainingConfig

CONFIGS = {
    "dynamic": QATConfig(),
    "dynamic_symmetric": QATConfig(activation_symmetric=True),
    "dynamic_w4": QATConfig(weight_bits=4),
    "dynamic_w2a4": QATConfig(weight_bits=2, activation_bits=4),
    "dynamic_a3_symmetric": QATConfig(activation_bits=3, activation_symmetric=True),
    "dynamic_weight_zero_points": QATConfig(weight_symmetric=False),
    "dynamic_w5_zero_points": QATConfig(weight_bits=5, weight_symmetric=False),
    "dynamic_lsq_w3": QATConfig(weight_bits=3, learned_weights=True),
    "dynamic_lsq_w8": QATConfig(learned_weights=True),
    "static": QATConfig(activations="static"),
    "static_symmetric": QATConfig(activations="static", activation_symmetric=True),
    "static_w4a6": QATConfig(weight_bits=4, activation_bits=6, activations="static"),
    "lsq": QATConfig(activations="static", learned_weights=True, learned_activations=True),
    "lsq_w4a4": QATConfig(4, 4, "static", learned_weights=True, learned_activations=True),
    "lsq_unsigned": QATConfig(
        activations="static", learned_activations=True, activation_signed=False
    ),
    "lsq_unsigned_a2": QATConfig(
        2, 2, "static", learned_weights=True, learned_activations=True, activation_signed=False
    ),
    "lsq_plus": QATConfig(
        activation_bits=4, activations="static", learned_activations=True, learned_offset=True
    ),
    "groups": QATConfig(weight_bits=4, group_size=32),
    "groups_w2_zero_points": QATConfig(2, weight_symmetric=False, group_size=16),
    "groups_w8_symmetric": QATConfig(group_size=7, activation_symmetric=True),
    "groups_w5a4": QATConfig(5, 4, group_size=40),
    "groups_lsq_w3": QATConfig(weight_bits=3, learned_weights=True, group_size=32),
    "float_w4": QATConfig(weight_bits=4, activations=None, group_size=16),
    "float_w8": QATConfig(activations=None),
    "float_lsq_w3": QATConfig(3, activations=None, learned_weights=True, group_size=32),
    "float_w5_zero_points": QATConfig(5, activations=None, weight_symmetric=False, group_size=40),
}


def layer_of(
    config: TrainingConfig | str,
    out_features: int = 24,
    in_features: int = 40,
    activation: str = "none",
    bias: bool = True,
    seed: int = 0,
) -> QATLinear:
    """A layer whose ranges and steps were initialised by a batch."""
    torch.manual_seed(seed)
    if isinstance(config, str):
        config = CONFIGS[config]
    layer = QATLinear(in_features, out_features, bias, config, activation)
    layer(torch.randn(16, in_features) + 0.3)
    return layer


def frozen(layer: QATLinear) -> QATLinear:
    if isinstance(layer.input_quantizer, ObservedQuantizer):
        layer.input_quantizer.freeze()
    return layer


def inputs(in_features: int = 40) -> Iterator[Tensor]:
    for dtype in FLOATS:
        yield sprinkle(floats(9, in_features, seed=1, dtype=dtype), NOT_FINITE, seed=1)
    yield floats(2, 3, in_features, seed=2)
    yield floats(in_features, seed=3)
    yield torch.empty(0, in_features)
    yield torch.empty(2, 0, in_features)
