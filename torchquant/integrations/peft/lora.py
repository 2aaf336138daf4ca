"""LoRA on layers of torchquant: which configurations fit, and how an adapter is merged."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import inspect
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

# Initialisations that neither read nor change the weight of the layer.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def extend_lora() -> None:
    """Make peft's LoRA accept the layers of torchquant.

    Raises:
        ImportError: peft is too old.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.tuners.lora.model import LoraModel

    if "config" not in inspect.signature(LoraLayer.update_layer).parameters:
        raise ImportError("peft must be 0.21 or newer")
    extend(LoraModel, "_create_new_module", _create)
    extend(LoraLayer, "_get_in_out_features", _features)
    extend(LoraLayer, "update_layer", _update)
    extend(Linear, "merge", _merge)
    extend(Linear, "unmerge", _unmerge)


def _create(original: Any, config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
    from peft.tuners.lora.layer import Linear

    layer = layer_in(target)
    custom = tuple(config._custom_modules or ())
    for_parameter = options.pop("parameter_name", None)
    # The user's own class for this layer comes first.
    if layer is None or for_parameter is not None or isinstance(layer, custom):
        return original(config, adapter_name, target, parameter_name=for_parameter, **options)
    config.fan_in_fan_out = is_transposed(layer)  # as peft does for its own layers
    return Linear(target, adapter_name, config=config, **options)


def _features(original: Any, self: Any, module: nn.Module) -> Any:
    layer = layer_in(module)
    return original(self, module) if layer is None else sizes(layer)


def _update(original: Any, self: Any, *args: Any, **options: Any) -> None:
    layer = layer_in(self)
    if layer is not None:
        check_activation("LoraConfig", layer, options.get("target_name", ""))
    if quantized_in(self) is not None:
        _check_config(options["config"] if "config" in options else args[3])
    original(self, *args, **options)


def _check_config(config: Any) -> None:
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            "LoraConfig: init_lora_weights must be True, False, 'gaussian', 'orthogonal' or 'eva' "
            f"for quantized layers, got {config.init_lora_weights!r}, which changes the weight of "
            "the layer; add the adapters to the float model and call quantize_ afterwards"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError(
            "LoraConfig: kasa_config must be None for quantized layers, got one: it changes the "
            "weight of the layer; add the adapters to the float model and call quantize_ afterwards"
        )


def _merge(
    original: Any, self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    if quantized_in(self) is None:
        original(self, safe_merge=safe_merge, adapter_names=adapter_names)
        return
    asked = check_adapters_to_merge(self, adapter_names)
    names = [name for name in asked if name in self.lora_A]
    if names:
        merge(self, names, lambda layer, name: _add(self, layer, name))


def _unmerge(original: Any, self: Any) -> None:
    if quantized_in(self) is None or not self.merged:
        forget(self)  # the layer became float after the merge
        original(self)
        return
    names = [name for name in self.merged_adapters if name in self.lora_A]
    unmerge(self, names, lambda layer, name: _subtract(self, layer, name))


def _add(wrapper: Any, layer: Any, name: str) -> None:
    weight = layer.weight.data
    variant = wrapper.lora_variant.get(name)
    if variant is None:
        layer.weight.data = weight + wrapper.get_delta_weight(name).to(weight.dtype)
    else:
        layer.weight.data = variant.merge_safe(wrapper, name, weight).to(weight.dtype)
    if wrapper.lora_bias[name]:
        if layer.bias is None:
            raise RuntimeError("merge: lora_bias=True needs a layer with a bias, got one without")
        layer.bias.data = layer.bias.data + wrapper.lora_B[name].bias * wrapper.scaling[name]


def _subtract(wrapper: Any, layer: Any, name: str) -> None:
    weight = layer.weight.data
    variant = wrapper.lora_variant.get(name)
    if variant is None:
        layer.weight.data = weight - wrapper.get_delta_weight(name).to(weight.dtype)
    else:
        layer.weight.data = variant.unmerge(wrapper, name, weight).to(weight.dtype)
    if wrapper.lora_bias[name]:
        layer.bias.data = layer.bias.data - wrapper.lora_B[name].bias * wrapper.scaling[name]
