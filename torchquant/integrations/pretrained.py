"""``save_pretrained`` of a quantized model: refused, because ``from_pretrained`` cannot read it.

``from_pretrained`` builds a float model. It finds no weights for the layers that are quantized in
the file, gives them random values, and raises nothing. The libraries check for quantizers of their
own only, so their ``save_pretrained`` is extended when the program imports them. The check looks at
the model in each call, so it holds after :func:`torchquant.load`, ``deepcopy`` and pickle, and ends
with :func:`torchquant.to_float_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from torchquant.integrations.extend import extend
from torchquant.integrations.on_import import when_imported
from torchquant.nn.base import QuantizedModule

# Module -> class -> the method that writes the weights.
_SAVERS = {
    "transformers.modeling_utils": ("PreTrainedModel", "save_pretrained"),
    "diffusers.models.modeling_utils": ("ModelMixin", "save_pretrained"),
    "huggingface_hub.hub_mixin": ("PyTorchModelHubMixin", "_save_pretrained"),
}


def refuse_on_import() -> None:
    """Extend the libraries that are imported, and the others when they are."""
    for module in _SAVERS:
        when_imported(module, _extend)


def _extend(module: ModuleType) -> None:
    owner, method = _SAVERS[module.__name__]
    extend(getattr(module, owner), method, _save)


def _save(original: Any, self: Any, *args: Any, **options: Any) -> Any:
    # With transformers' own adapters (model.add_adapter), the call saves the adapters only.
    if not getattr(self, "_hf_peft_config_loaded", False):
        check_saveable(self, options.get("state_dict"))
    return original(self, *args, **options)


def check_saveable(model: nn.Module, state: Mapping[str, Any] | None = None) -> None:
    """Raise if ``save_pretrained`` would write integers that ``from_pretrained`` cannot read.

    Args:
        model: the model to save.
        state: the state dict to save; None is the model's own.

    Raises:
        ValueError: the state holds the integers of quantized layers.

    Example:
        >>> check_saveable(nn.Linear(4, 4))
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule) and (state is None or _holds(state, name, module))
    ]
    if layers:
        raise ValueError(
            f"save_pretrained: the model must be a float model, got {type(model).__name__} with "
            f"{len(layers)} quantized layers (the first is {layers[0][0]!r}), which "
            "from_pretrained would give random weights; use torchquant.save(model, path) and "
            "torchquant.load(path, model), or call torchquant.to_float_(model) first"
        )


def _holds(state: Mapping[str, Any], name: str, layer: QuantizedModule) -> bool:
    own = layer.canonical().keys() - layer._parameters.keys()
    return any((f"{name}.{key}" if name else key) in state for key in own)
