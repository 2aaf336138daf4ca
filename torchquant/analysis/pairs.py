"""The pairs of layers that :func:`torchquant.verify` compares."""

from __future__ import annotations

from torch import nn

from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import kind_of

Layer = TrainedModule | QuantizedModule


def pairs_of(qat_model: nn.Module, quantized_model: nn.Module) -> dict[str, tuple[Layer, Layer]]:
    """The trained and the converted layer of each name, without layers that are left in float.

    Raises:
        TypeError, ValueError: the models cannot be compared; see :func:`torchquant.verify`.
    """
    for argument, model in (("qat_model", qat_model), ("quantized_model", quantized_model)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"verify: {argument} must be an nn.Module, got {type(model).__name__}")
    ours, theirs = _layers(qat_model), _layers(quantized_model)
    elsewhere = {m.device for m in ours.values()} != {m.device for m in theirs.values()}
    trained = {n: m for n, m in ours.items() if isinstance(m, TrainedModule)}
    converted = {n: m for n, m in theirs.items() if isinstance(m, QuantizedModule)}
    if elsewhere:  # on different devices, copies of one model may be compared
        trained = trained or ours  # type: ignore[assignment]
        converted = converted or theirs  # type: ignore[assignment]
    if not trained:
        raise ValueError(
            "verify: qat_model must hold layers that prepare_qat_ prepared, got none; keep a "
            "copy.deepcopy of the model before convert_"
        )
    prepared = [
        item for item in (*trained.items(), *theirs.items()) if isinstance(item[1], TrainedModule)
    ]
    floating = [name for name, layer in prepared if not bool(layer.quantize_enabled)]
    if floating:
        raise ValueError(
            "verify: qat_model must compute with integers, got layers in the stage 'observe' "
            f"({', '.join(floating)}); call torchquant.qat.train_(model) first"
        )
    left = left_in_float(qat_model, quantized_model)
    trained = {name: layer for name, layer in trained.items() if name not in left}
    missing = [name or "the model" for name in trained if name not in converted]
    if missing:
        raise ValueError(
            "verify: quantized_model must be the converted qat_model, got one without a "
            f"quantized layer at {', '.join(missing)}"
        )
    return {name: (layer, converted[name]) for name, layer in trained.items()}


def left_in_float(qat_model: nn.Module, quantized_model: nn.Module) -> tuple[str, ...]:
    """Names of layers that ``convert_`` left in float, because they have no range."""
    there = dict(quantized_model.named_modules())
    return tuple(
        name
        for name, layer in qat_model.named_modules()
        if isinstance(layer, TrainedModule) and layer.missing_range() is not None
        if (kind := kind_of(layer)) and type(there.get(name)) in kind.float_types
    )


def _layers(model: nn.Module) -> dict[str, Layer]:
    kinds = (TrainedModule, QuantizedModule)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
