"""IA3 on layers of torchquant: the adapter multiplies the input or the output of a layer."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.integrations.extend import extend
from torchquant.integrations.peft.layers import (
    check_activation,
    is_transposed,
    layer_in,
    quantized_in,
    sizes,
)
from torchquant.integrations.peft.merge import forget, merge, unmerge


def extend_ia3() -> None:
    """Make peft's IA3 accept the layers of torchquant."""
    from peft.tuners.ia3.layer import IA3Layer, Linear
    from peft.tuners.ia3.model import IA3Model

    extend(IA3Model, "_create_new_module", _create)
    extend(IA3Layer, "__init__", _init)
    extend(Linear, "merge", _merge)
    extend(Linear, "unmerge", _unmerge)


def _create(original: Any, config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
    from peft.tuners.ia3.layer import Linear

    layer = layer_in(target)
    if layer is None:
        return original(config, adapter_name, target, **options)
    check_activation("IA3Config", layer, "")
    config.fan_in_fan_out = is_transposed(layer)
    feedforward = options.get("is_feedforward", False)
    return Linear(target, adapter_name, config=config, is_feedforward=feedforward)


def _init(
    original: Any, self: Any, base_layer: nn.Module, is_feedforward: bool, **options: Any
) -> None:
    layer = layer_in(base_layer)
    if layer is None:
        original(self, base_layer, is_feedforward, **options)
        return
    # The original accepts torch's layers only, of which it reads the sizes.
    stand_in = nn.Linear(*sizes(layer), device="meta")
    original(self, stand_in, is_feedforward, **options)
    self.base_layer = base_layer


def _merge(
    original: Any, self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    if quantized_in(self) is None:
        original(self, safe_merge=safe_merge, adapter_names=adapter_names)
        return
    asked = check_adapters_to_merge(self, adapter_names)
    names = [name for name in asked if name in self.ia3_l]
    if names:
        merge(self, names, lambda layer, name: _scale(self, layer, name, 1.0))


def _unmerge(original: Any, self: Any) -> None:
    if quantized_in(self) is None or not self.merged:
        forget(self)  # the layer became float after the merge
        original(self)
        return
    names = [name for name in self.merged_adapters if name in self.ia3_l]
    unmerge(self, names, lambda layer, name: _scale(self, layer, name, -1.0))


def _scale(wrapper: Any, layer: Any, name: str, power: float) -> None:
    factor = wrapper.ia3_l[name].data.float()
    factor = factor.T if wrapper.fan_in_fan_out else factor
    factor = factor**power
    layer.weight.data = layer.weight.data * factor
    if not wrapper.is_feedforward and layer.bias is not None:
        layer.bias.data = layer.bias.data * factor.reshape(layer.bias.shape)
