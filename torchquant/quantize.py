"""quantize_: the verb. Plan first, check the plan, then change the model layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchquant.configs import Config, Int8DynamicActivationInt8WeightConfig
from torchquant.nn.linear import QuantizedLinear, refusal
from torchquant.report import LayerReport, QuantizationReport

FilterFn = Callable[[nn.Module, str], bool]

# Below these a layer stays in float. Fixed, and a function of the shape alone, so that a model converts
# the same way on every machine: the packed weight is padded to 16 outputs and 64 inputs, so small layers
# do not shrink, and a call costs more than its arithmetic.
MIN_OUT_FEATURES = 16
MIN_IN_FEATURES = 32
MIN_WEIGHTS = 4096

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def too_small(out_features: int, in_features: int) -> bool:
    """Whether a linear layer is too small to gain from int8; the same answer on every CPU.

    Example:
        >>> too_small(10, 768), too_small(64, 64)
        (True, False)
    """
    return (
        out_features < MIN_OUT_FEATURES
        or in_features < MIN_IN_FEATURES
        or out_features * in_features < MIN_WEIGHTS
    )


def quantize_(
    model: nn.Module,
    config: Config | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
) -> QuantizationReport:
    """Quantize a model's linear layers, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QuantizedLinear`. What stays in float is reported
    with the reason: subclasses of ``nn.Linear``, layers whose weight is read by a fused fast path
    (``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``), layers too small to gain. A weight shared
    with an embedding is untied: the layer gets its own int8 copy. Memory never exceeds the float model
    plus its largest layer.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place: use
            :meth:`torchquant.nn.QuantizedLinear.from_float`.
        config: :class:`torchquant.Int8DynamicActivationInt8WeightConfig` when None.
        filter_fn: called with each linear-like layer and its name; True asks for it, also where it is
            too small to gain. None asks for all but those.
        strict: raise, before anything is changed, where a layer that was asked for cannot be quantized.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model, config or filter_fn is not what it must be.
        ValueError: the model is a bare linear layer; or, with ``strict``, the layers and reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = quantize_(model)
        >>> [(layer.name, layer.action, layer.reason) for layer in report.layers]
        [('0', 'quantized', ''), ('2', 'skipped', 'too small to gain')]
    """
    config = _check_arguments(model, config, filter_fn)
    plan = list(_plan(model, filter_fn))
    refused = [step for step in plan if step.asked and step.refusal]
    if strict and refused:
        listing = "; ".join(f"{step.name}: {step.refusal}" for step in refused)
        raise ValueError(
            f"quantize_: strict=True and {len(refused)} of the layers asked for cannot be quantized "
            f"({listing}); exclude them with filter_fn, or pass strict=False to leave them in float"
        )
    bytes_before = tensor_bytes(model)
    rows = [_carry_out(step, config) for step in plan]
    notes = tuple(row.name for row in rows if "untied" in row.reason)
    return QuantizationReport(
        tuple(rows),
        bytes_before,
        tensor_bytes(model),
        (f"untied from a shared weight (own int8 copy): {', '.join(notes)}",) if notes else (),
    )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def replace_module(owners: list[tuple[nn.Module, str]], new: nn.Module) -> None:
    """Put ``new`` into every place that ``owners`` names (parent, attribute)."""
    for parent, attribute in owners:
        parent._modules[attribute] = new


def owners_by_module(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each submodule's id, every (parent, attribute) under which it is registered."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, attribute))
    return owners


@dataclass
class _Step:
    """One linear-like layer of the model and what is to become of it."""

    name: str
    module: nn.Module
    owners: list[tuple[nn.Module, str]]
    asked: bool
    refusal: str | None  # why it cannot be quantized
    leave: str | None  # why it should not be, although it could
    tied: bool


def _check_arguments(
    model: nn.Module, config: Config | None, filter_fn: FilterFn | None
) -> Config:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.Linear, QuantizedLinear)):
        raise ValueError(
            f"quantize_: model must contain layers, got a bare {type(model).__name__}, which cannot be "
            "replaced in place; use torchquant.nn.QuantizedLinear.from_float(linear, config)"
        )
    if config is None:
        config = Int8DynamicActivationInt8WeightConfig()
    if not isinstance(config, Int8DynamicActivationInt8WeightConfig):
        raise TypeError(
            "quantize_: config must be a torchquant configuration such as "
            f"Int8DynamicActivationInt8WeightConfig(), got {config!r}"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"quantize_: filter_fn must be a function of (module, name), got {filter_fn!r}"
        )
    return config


def _plan(model: nn.Module, filter_fn: FilterFn | None) -> Iterator[_Step]:
    owners = owners_by_module(model)
    uses = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    fused = _fast_path_layers(model)
    for name, module in model.named_modules():
        if not _linear_like(module) or isinstance(module, QuantizedLinear):
            continue
        asked = True if filter_fn is None else bool(filter_fn(module, name))
        cannot = fused.get(id(module)) or _why_not(module)
        leave = None
        if not asked:
            leave = "filter_fn"
        elif filter_fn is None and cannot is None and too_small(*_features(module)):
            leave = "too small to gain"
        weight = module._parameters.get("weight")
        tied = weight is not None and uses[id(weight)] > 1
        yield _Step(name, module, owners.get(id(module), []), asked, cannot, leave, tied)


def _linear_like(module: nn.Module) -> bool:
    """Layers that people expect a quantizer to take: nn.Linear, its subclasses, GPT-2's Conv1D."""
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2


def _fast_path_layers(model: nn.Module) -> dict[int, str]:
    """Linears whose weight another module's forward reads directly, with the reason to leave them."""
    layers: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            layers[id(module.out_proj)] = "nn.MultiheadAttention reads its weight"
        if isinstance(module, nn.TransformerEncoderLayer):
            for linear in (module.linear1, module.linear2):
                layers[id(linear)] = "nn.TransformerEncoderLayer's fast path reads its weight"
    return layers


def _why_not(module: nn.Module) -> str | None:
    reason = refusal(module)
    if reason is not None:
        return reason
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors (weight_norm, pruning)"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if weight.is_meta:
        return "on the meta device, without values"
    if not weight.device.type == "cpu":
        return f"on {weight.device}; move the model to the CPU to quantize it"
    if not _all_finite(weight):
        return "its weight holds NaN or infinity"
    return None


def _all_finite(weight: torch.Tensor) -> bool:
    least, greatest = torch.aminmax(weight.detach())  # no temporary of the weight's size
    return bool(torch.isfinite(least)) and bool(torch.isfinite(greatest))


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return columns, rows  # Conv1D holds its weight transposed


def _carry_out(step: _Step, config: Config) -> LayerReport:
    before = tensor_bytes(step.module)
    kind = type(step.module).__name__
    skip = step.leave or step.refusal
    if skip is not None:
        return LayerReport(step.name, kind, "skipped", skip, *_features(step.module), before, before)
    module = step.module
    assert isinstance(module, nn.Linear)
    new = QuantizedLinear.from_float(module, config)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(module, hooks))
    replace_module(step.owners, new)
    step.module = new  # the float weights go now, not when the plan does
    features = (new.out_features, new.in_features)
    reason = "untied" if step.tied else ""
    return LayerReport(step.name, kind, "quantized", reason, *features, before, tensor_bytes(new))
