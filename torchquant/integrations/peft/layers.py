"""Which layers of torchquant an adapter can be added to, and what an adapter needs of them."""

# peft may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import kind_of, weight_shape

Layer = QuantizedModule | TrainedModule


def base_of(module: Any) -> Any:
    """The layer inside a module of peft, or the module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_in(module: Any) -> Layer | None:
    """The linear layer of torchquant that ``module`` is or wraps."""
    base = base_of(module)
    if not isinstance(base, (QuantizedModule, TrainedModule)):
        return None
    kind = kind_of(base)
    return base if kind is not None and nn.Linear in kind.float_types else None


def quantized_in(module: Any) -> QuantizedModule | None:
    """The quantized layer that ``module`` is or wraps."""
    base = base_of(module)
    return base if isinstance(base, QuantizedModule) else None


def sizes(layer: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)``, in the order of peft."""
    rows, columns = weight_shape(layer)
    return columns, rows


def is_transposed(layer: nn.Module) -> bool:
    """True if the weight is ``[inputs, outputs]``, as that of transformers' Conv1D is."""
    return bool(getattr(getattr(layer, "float_form", None), "transposed", False))


def check_activation(who: str, layer: Layer, name: str) -> None:
    """Raise if the layer computes an activation: an adapter belongs in front of the activation."""
    if layer.activation == "none":
        return
    where = f"{name!r}, which computes" if name else "one that computes"
    remedy = (
        "add the adapters before prepare_qat_"
        if isinstance(layer, TrainedModule)
        else "call quantize_ with fusion=torchquant.Fusion(activations=False), or add the adapters "
        "before quantize_"
    )
    raise ValueError(
        f"{who}: target_modules must name layers that compute no activation, got {where} "
        f"{layer.activation!r} itself; {remedy}"
    )
