"""Planning, as all verbs do it: which layers a model has, which are asked for, what each becomes.

A verb plans first, then checks the plan, then changes the model: what it refuses, it refuses before
anything is different.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from torchquant.graph.modules import memory_key, owners_by_module, tensor_bytes
from torchquant.report import LayerReport

FilterFn = Callable[[nn.Module, str], bool]
Reason = Callable[[nn.Module], str | None]

# Below these a layer stays in float. Fixed, and a function of the shape alone, so that a model
# converts the same way on every machine: the packed weight is padded to 16 outputs and 64 inputs,
# so small layers do not shrink, and a call costs more than its arithmetic.
MIN_OUT_FEATURES = 16
MIN_IN_FEATURES = 32
MIN_WEIGHTS = 4096


def too_small(out_features: int, in_features: int) -> bool:
    """Whether a linear layer is too small to gain from int8; the same answer everywhere.

    Example:
        >>> too_small(10, 768), too_small(64, 64)
        (True, False)
    """
    return (
        out_features < MIN_OUT_FEATURES
        or in_features < MIN_IN_FEATURES
        or out_features * in_features < MIN_WEIGHTS
    )


@dataclass
class Step:
    """One linear-like layer of the model and what is to become of it.

    Example:
        >>> linear = nn.Linear(64, 64)
        >>> Step(["first", "second"], linear, [], refusal="lazy").remark()
        'lazy; also at second'
    """

    names: list[str]
    module: nn.Module
    owners: list[tuple[nn.Module, str]]
    asked: bool = False
    refusal: str | None = None  # why it cannot be changed
    leave: str | None = None  # why it should not be, although it could
    tied: bool = False
    dtype: torch.dtype = torch.float32  # of the float weight

    @property
    def name(self) -> str:
        """The layer's first name in the model."""
        return self.names[0]

    @property
    def skip(self) -> str | None:
        """Why the layer stays as it is, or None where it does not."""
        return self.leave or self.refusal

    def remark(self, done: str = "") -> str:
        """The report's last word on the layer; ``done`` is what to say where it was changed."""
        parts = [self.skip or done]
        if len(self.names) > 1:
            parts.append(f"also at {', '.join(self.names[1:])}")
        return "; ".join(part for part in parts if part)

    def skipped(self) -> LayerReport:
        """The report's row on a layer that stays."""
        kind, size = type(self.module).__name__, tensor_bytes(self.module)
        sizes = (*features(self.module), size, size)
        return LayerReport(self.name, kind, "skipped", self.remark(), *sizes)


def check_model(who: str, model: nn.Module, bare: dict[type[nn.Module], str]) -> None:
    """Refuse what is no model that a verb can change.

    Args:
        who: the verb; starts the messages.
        model: what it was given.
        bare: layers that cannot be changed in place for want of a parent, and what to do instead.

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: a bare layer.

    Example:
        >>> check_model("quantize_", nn.Sequential(), {})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")
    for kind, remedy in bare.items():
        if isinstance(model, kind):
            raise ValueError(
                f"{who}: model must contain layers, got a bare {type(model).__name__}, {remedy}"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{who}: model must be an nn.Module in Python, got a scripted one, whose layers are "
            "compiled already; quantize the model that it was made from"
        )


def check_filter(who: str, filter_fn: FilterFn | None) -> None:
    """Refuse a filter that cannot be called.

    Raises:
        TypeError: it is neither None nor callable; ``who`` starts the message.

    Example:
        >>> check_filter("quantize_", lambda module, name: name != "head")
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"{who}: filter_fn must be a function of (module, name), got {filter_fn!r}")


def plan_layers(
    model: nn.Module, filter_fn: FilterFn | None, done: Reason, refusal: Reason
) -> list[Step]:
    """A step for each linear-like layer of a model, in the order of its modules.

    Args:
        model: what holds them.
        filter_fn: called with each float layer and each of its names; true asks for it.
        done: why a module is a layer that nothing is to be done with (it is quantized already);
            None for all others.
        refusal: why a float layer cannot be changed; None where it can.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> steps = plan_layers(model, None, lambda module: None, lambda module: None)
        >>> [(step.name, step.skip) for step in steps]
        [('0', None), ('1', 'too small to gain')]
    """
    fused = _fast_path_layers(model)
    steps = find_layers(model, lambda module: linear_like(module) or done(module) is not None)
    for step in steps:
        module = step.module
        step.leave = done(module)
        if step.leave is not None:
            continue
        step.asked = filter_fn is None or any(filter_fn(module, name) for name in step.names)
        step.refusal = fused.get(id(module)) or refusal(module)
        if not step.asked:
            step.leave = "filter_fn"
        elif filter_fn is None and not step.refusal and too_small(*features(module)):
            step.leave = "too small to gain"
    return steps


def find_layers(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Step]:
    """An empty step for each module that is wanted, in the order of a model's modules.

    Example:
        >>> linear = nn.Linear(4, 4)
        >>> steps = find_layers(nn.Sequential(linear, linear), lambda module: module is linear)
        >>> [step.names for step in steps]
        [['0', '1']]
    """
    owners = owners_by_module(model)
    uses = Counter(
        memory_key(p)
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None
    )
    layers: dict[int, Step] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            step = Step([], module, owners.get(id(module), []))
            layers.setdefault(id(module), step).names.append(name)
    for step in layers.values():
        weight = step.module._parameters.get("weight")
        step.tied = weight is not None and uses[memory_key(weight)] > 1
    return list(layers.values())


def check_strict(who: str, steps: Iterable[Step]) -> None:
    """Refuse a plan in which a layer that was asked for stays as it is.

    Raises:
        ValueError: names the layers and the reasons.

    Example:
        >>> check_strict("quantize_", [])
    """
    refused = [step for step in steps if step.asked and step.refusal]
    if refused:
        listing = "; ".join(f"{step.name}: {step.refusal}" for step in refused)
        raise ValueError(
            f"{who}: with strict=True every layer asked for must be quantizable, got "
            f"{len(refused)} that cannot be quantized ({listing}); exclude them with filter_fn, or "
            "pass strict=False to leave them in float"
        )


def linear_like(module: nn.Module) -> bool:
    """Layers that people expect a quantizer to take: nn.Linear, its subclasses, GPT-2's Conv1D.

    Example:
        >>> linear_like(nn.Linear(4, 4)), linear_like(nn.ReLU())
        (True, False)
    """
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


def features(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer.

    Example:
        >>> features(nn.Linear(64, 32))
        (32, 64)
    """
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features  # type: ignore[return-value]
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return columns, rows  # Conv1D holds its weight transposed
