"""replace_norms_ and restore_norms_: the norms of a model, computed by one operator each.

Many models have their own norm classes (``LlamaRMSNorm``, ``T5LayerNorm``), written in Python with
six operators. In a model with int8 layers these norms take a tenth of the time. A norm is therefore
recognised by what it computes, not by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from torchquant.nn.norm import LayerNorm, RMSNorm
from torchquant.nn.norm_probe import find_recipe
from torchquant.nn.norm_recipe import NormRecipe
from torchquant.nn.norm_replacement import recipe_of, replace_norm, restore_norm
from torchquant.report import Report, RowReport


@dataclass(frozen=True)
class NormReport(RowReport):
    """What a verb did to one norm.

    Attributes:
        name: the norm's name in the model.
        kind: the name of its class.
        action: "replaced", "restored" or "left".
        reason: why the norm was left, or a remark; may be empty.

    Example:
        >>> print(NormReport("bn", "BatchNorm1d", "left", "filter_fn"))
        left: bn (BatchNorm1d): filter_fn
    """

    action: Literal["replaced", "restored", "left"]
    reason: str = ""


@dataclass(frozen=True, repr=False)
class NormsReport(Report):
    """Result of :func:`torchquant.replace_norms_` and :func:`torchquant.restore_norms_`.

    Attributes:
        norms: one row per norm, in the order of the model's modules.
        notes: sentences that the user should read.
        action: what the verb does to a norm: "replaced" or "restored".

    Example:
        >>> names = [f"blocks.{index}.norm" for index in range(6)]
        >>> report = NormsReport(tuple(NormReport(name, "LayerNorm", "replaced") for name in names))
        >>> report, report.lines()[0].names
        (<NormsReport: 6 of 6 norms replaced>, ('blocks.{0..5}.norm',))
    """

    norms: tuple[NormReport, ...]
    notes: tuple[str, ...] = ()
    action: Literal["replaced", "restored"] = "replaced"

    @property
    def rows(self) -> tuple[NormReport, ...]:  # type: ignore[override]
        """The same as ``norms``."""
        return self.norms

    @property
    def replaced(self) -> tuple[NormReport, ...]:
        """The norms that were replaced."""
        return tuple(norm for norm in self.norms if norm.action == "replaced")

    @property
    def restored(self) -> tuple[NormReport, ...]:
        """The norms that were restored."""
        return tuple(norm for norm in self.norms if norm.action == "restored")

    def summary(self) -> str:
        """One line with the number of norms."""
        changed = self.replaced if self.action == "replaced" else self.restored
        return f"{len(changed)} of {len(self.norms)} norms {self.action}"


def replace_norms_(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> NormsReport:
    """Let one operator compute each LayerNorm and RMSNorm of a model, in place.

    A norm of any class is replaced if a copy of it gives the values, the dtype and the gradients of
    :func:`torchquant.ops.layer_norm` or :func:`torchquant.ops.rms_norm`. That includes weights of
    ``1 + w`` as in Gemma. The comparison covers float32, bfloat16 and float16, one to five
    dimensions, training and evaluation mode, and autocast; the norm itself is not run.

    A replaced norm is still the same object: its class is a subclass of the class that it had, so
    ``isinstance``, attributes, parameters, hooks, state dicts, ties and optimizers stay as they
    are. Calls that the comparison does not cover run the forward of the norm's own class: more
    arguments (a gate), float64, sizes or dtypes that come later. An attribute that is set later
    ends the replacement of that norm. Results change only by rounding: sums use a different order,
    which is the same on every device.

    A replaced LayerNorm can also compute the addition before it: ``norm(x, residual=y)``. The code
    that calls the norm has to be changed for that.

    :func:`torchquant.restore_norms_` undoes the replacement, and so does
    :func:`torchquant.to_float_`. The replacement is part of a pickled model, but not of a file of
    :func:`torchquant.save`; call this function again after :func:`torchquant.load`.

    Args:
        model: any module that contains norms, or a norm.
        filter_fn: called with each norm and its name; returns True for norms to replace. None
            replaces all.

    Returns:
        A report with one row per norm: modules without children whose class is derived from
        ``nn.LayerNorm`` or ``nn.RMSNorm`` or has "norm" in its name.

    Raises:
        TypeError: model is not a module, or filter_fn is not callable.

    If filter_fn raises, the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6))
        >>> replace_norms_(model)
        <NormsReport: 2 of 2 norms replaced>
        >>> print(*replace_norms_(nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 8))), sep="\\n")
        replaced: 0 (LayerNorm)
        left: 1 (GroupNorm): it normalizes groups of channels, not the last dimension
    """
    _check_model("replace_norms_", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"replace_norms_: filter_fn must be a function of (module, name), got {filter_fn!r}"
        )
    known: dict[Any, NormRecipe | str] = {}
    rows = []
    plan: list[tuple[nn.Module, NormRecipe]] = []
    for name, module in model.named_modules():
        if not looks_like_a_norm(module):
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(module, name):
            rows.append(NormReport(name, kind, "left", "filter_fn"))
            continue
        recipe = _recipe(module, known)
        if isinstance(recipe, str):
            rows.append(NormReport(name, kind, "left", recipe))
        else:
            plan.append((module, recipe))
            rows.append(NormReport(name, kind, "replaced", recipe.remark))
    for module, recipe in plan:  # from here on the model changes; nothing can fail
        replace_norm(module, recipe)
    return NormsReport(tuple(rows))


def restore_norms_(model: nn.Module) -> NormsReport:
    """Undo :func:`torchquant.replace_norms_`, in place: each norm gets its own class back.

    Args:
        model: any module, with or without replaced norms.

    Returns:
        A report with one row per norm that was restored.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8))
        >>> _ = replace_norms_(model)
        >>> restore_norms_(model), type(model[0]) is nn.LayerNorm
        (<NormsReport: 1 of 1 norms restored>, True)
    """
    _check_model("restore_norms_", model)
    rows = [
        NormReport(name, type(module).__name__, "restored")
        for name, module in model.named_modules()
        if restore_norm(module)
    ]
    return NormsReport(tuple(rows), action="restored")


def looks_like_a_norm(module: nn.Module) -> bool:
    """True for modules without children that are norms by their class or by its name.

    Example:
        >>> looks_like_a_norm(nn.RMSNorm(8)), looks_like_a_norm(nn.Linear(8, 8))
        (True, False)
    """
    named = "norm" in type(module).__name__.lower()
    return not module._modules and (named or isinstance(module, (nn.LayerNorm, nn.RMSNorm)))


def _recipe(module: nn.Module, known: dict[Any, NormRecipe | str]) -> NormRecipe | str:
    """How an operator computes a norm, or the reason why the norm is left."""
    if isinstance(module, (LayerNorm, RMSNorm)) or recipe_of(module) is not None:
        return "already a norm of torchquant"
    if getattr(module, "parametrizations", None):
        return "parametrized"
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        return "on the meta device, without values; load its weights first"
    return find_recipe(module, known)


def _check_model(verb: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be an nn.Module, got {type(model).__name__}")
