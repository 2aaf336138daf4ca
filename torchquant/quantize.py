"""quantize_: the verb. Plan first, check the plan, then change the model layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.configs import Config, Fusion, check_config, check_fusion
from torchquant.fuse.activations import fuse_activations
from torchquant.fuse.dataflow import Dataflow, owners_by_module
from torchquant.fuse.projections import group_projections
from torchquant.nn.linear import QuantizedLinear, refusal, value_refusal
from torchquant.report import FusionReport, LayerReport, QuantizationReport

FilterFn = Callable[[nn.Module, str], bool]

# Below these a layer stays in float. Fixed, and a function of the shape alone, so that a model
# converts the same way on every machine: the packed weight is padded to 16 outputs and 64 inputs,
# so small layers do not shrink, and a call costs more than its arithmetic.
MIN_OUT_FEATURES = 16
MIN_IN_FEATURES = 32
MIN_WEIGHTS = 4096

# All that calling a module consults. Hooks on its state dict stay behind: they know another state.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
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
    *,
    fusion: Fusion | None = None,
) -> QuantizationReport:
    """Quantize a model's linear layers, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QuantizedLinear`, its hooks included. What
    stays in float is reported with the reason: subclasses of ``nn.Linear``, weights computed from
    other tensors, layers whose weight is read by a fused fast path (``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``), layers too small to gain. Layers that are quantized already are
    reported and left alone. A weight shared with an embedding is untied: the layer gets its own
    int8 copy.

    Memory never exceeds the float model plus its largest layer. Should a conversion fail halfway
    (out of memory), the layers before it are quantized, the others in float, and the model works.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place:
            use :meth:`torchquant.nn.QuantizedLinear.from_float`.
        config: :class:`torchquant.Int8DynamicActivationInt8WeightConfig` when None.
        filter_fn: called with each linear-like layer and each of its names; true asks for it, also
            where it is too small to gain. None asks for all but those.
        strict: raise, before anything is changed, where a layer that was asked for cannot be
            quantized.
        fusion: what may be computed together with the quantized layers;
            :class:`torchquant.Fusion` when None, which fuses what changes results by rounding
            alone. An activation that became part of the layer before it leaves a
            :class:`torchquant.nn.FusedActivation` in its place.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model, config, filter_fn or fusion is not what it must be.
        ValueError: the model is a bare linear layer; or, with ``strict``, the layers and reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = quantize_(model)
        >>> [(layer.name, layer.action, layer.reason) for layer in report.layers]
        [('0', 'quantized', ''), ('2', 'skipped', 'too small to gain')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
    """
    config = _check_arguments(model, config, filter_fn)
    fusion = check_fusion("quantize_", fusion)
    plan = list(_plan(model, config, filter_fn))
    refused = [step for step in plan if step.asked and step.refusal]
    if strict and refused:
        listing = "; ".join(f"{step.name}: {step.refusal}" for step in refused)
        raise ValueError(
            "quantize_: with strict=True every layer asked for must be quantizable, got "
            f"{len(refused)} that cannot be quantized ({listing}); exclude them with filter_fn, or "
            "pass strict=False to leave them in float"
        )
    bytes_before = tensor_bytes(model)
    rows = tuple(_carry_out(step, config) for step in plan)
    fusions = tuple(_fuse(model, plan, fusion))
    return QuantizationReport(rows, bytes_before, tensor_bytes(model), tuple(_notes(plan)), fusions)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, shared ones once.

    Example:
        >>> tensor_bytes(nn.Linear(10, 10))
        440
    """
    tensors = [t for t in [*model.parameters(), *model.buffers()] if not is_lazy(t)]
    return sum(t.numel() * t.element_size() for t in {memory_key(t): t for t in tensors}.values())


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Equal where tensors are the same values in the same memory: a tie may be of two objects.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4))
        >>> memory_key(weight) == memory_key(weight.detach())
        True
    """
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), *layout


def replace_module(owners: list[tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` into ``old``'s places, the (parent, attribute) pairs of ``owners``.

    Hooks go along, and the handles that remove them keep working: they hold the same dictionaries.
    """
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    for parent, attribute in owners:
        parent._modules[attribute] = new


@dataclass
class _Step:
    """One linear-like layer of the model and what is to become of it."""

    names: list[str]
    module: nn.Module
    owners: list[tuple[nn.Module, str]]
    asked: bool = False
    refusal: str | None = None  # why it cannot be quantized
    leave: str | None = None  # why it should not be, although it could
    tied: bool = False
    dtype: torch.dtype = torch.float32  # of the float weight

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def skip(self) -> str | None:
        return self.leave or self.refusal

    def remark(self) -> str:
        """The report's last word on the layer."""
        parts = [self.skip or ("untied" if self.tied else "")]
        if len(self.names) > 1:
            parts.append(f"also at {', '.join(self.names[1:])}")
        return "; ".join(part for part in parts if part)


def _check_arguments(model: nn.Module, config: Config | None, filter_fn: FilterFn | None) -> Config:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, QuantizedLinear):
        raise ValueError(
            "quantize_: model must contain layers, got a bare QuantizedLinear, which is quantized "
            "already; use it as it is"
        )
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"quantize_: model must contain layers, got a bare {type(model).__name__}, which "
            "cannot be replaced in place; use "
            "torchquant.nn.QuantizedLinear.from_float(linear, config)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "quantize_: model must be an nn.Module in Python, got a scripted one, whose layers are "
            "compiled already; quantize the model that it was made from"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"quantize_: filter_fn must be a function of (module, name), got {filter_fn!r}"
        )
    return check_config("quantize_", config)


def _plan(model: nn.Module, config: Config, filter_fn: FilterFn | None) -> Iterator[_Step]:
    owners = owners_by_module(model)
    uses = Counter(
        memory_key(p)
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None
    )
    fused = _fast_path_layers(model)
    layers: dict[int, _Step] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear) or _linear_like(module):
            step = _Step([], module, owners.get(id(module), []))
            layers.setdefault(id(module), step).names.append(name)
    for step in layers.values():
        module = step.module
        if isinstance(module, QuantizedLinear):
            other = "" if module.config == config else ", with another configuration"
            step.leave = f"already quantized{other}"
        else:
            step.asked = filter_fn is None or any(filter_fn(module, name) for name in step.names)
            step.refusal = fused.get(id(module)) or refusal(module) or value_refusal(module)
            weight = module._parameters.get("weight")
            step.tied = weight is not None and uses[memory_key(weight)] > 1
            if not step.asked:
                step.leave = "filter_fn"
            elif filter_fn is None and not step.refusal and too_small(*_features(module)):
                step.leave = "too small to gain"
        yield step


def _linear_like(module: nn.Module) -> bool:
    """Layers that people expect a quantizer to take: nn.Linear, its subclasses, GPT-2's Conv1D."""
    if isinstance(module, nn.Linear):
        return True
    if type(module).__name__ != "Conv1D":
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _fast_path_layers(model: nn.Module) -> dict[int, str]:
    """Linears whose weight another module's forward reads, with the reason to leave them."""
    layers: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            layers[id(module.out_proj)] = "nn.MultiheadAttention reads its weight"
        if isinstance(module, nn.TransformerEncoderLayer):
            for name in ("linear1", "linear2"):  # a subclass may have other ones
                linear = getattr(module, name, None)
                layers[id(linear)] = "nn.TransformerEncoderLayer's fast path reads its weight"
    return layers


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return module.out_features, module.in_features
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return columns, rows  # Conv1D holds its weight transposed


def _carry_out(step: _Step, config: Config) -> LayerReport:
    old = step.module
    kind, before = type(old).__name__, tensor_bytes(old)
    if step.skip is not None:
        features = _features(old)
        return LayerReport(step.name, kind, "skipped", step.remark(), *features, before, before)
    assert isinstance(old, nn.Linear)
    new = QuantizedLinear.from_float(old, config)
    replace_module(step.owners, old, new)
    step.dtype = old.weight.dtype
    step.module = new  # the float weights go now, not when the plan does
    features, after = _features(new), tensor_bytes(new)
    return LayerReport(step.name, kind, "quantized", step.remark(), *features, before, after)


def _fuse(model: nn.Module, plan: list[_Step], fusion: Fusion) -> Iterator[FusionReport]:
    layers = [
        (step.module, step.dtype)
        for step in plan
        if step.skip is None and isinstance(step.module, QuantizedLinear)
    ]
    if not layers or not (fusion.activations or fusion.projections):
        return
    only = [layer for layer, _ in layers]
    flow = Dataflow(model, only)
    if fusion.activations:
        yield from fuse_activations(flow, layers, owners_by_module(model))
    if fusion.projections:
        yield from group_projections(flow, only, owners_by_module(model))


def _notes(plan: list[_Step]) -> Iterator[str]:
    if not plan:
        yield "The model has no linear layers; there was nothing to quantize."
    untied = [step.name for step in plan if step.tied and not step.skip]
    if untied:
        yield f"Untied from a shared weight, with an int8 copy of their own: {', '.join(untied)}."
