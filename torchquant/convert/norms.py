"""replace_norms_: replace LayerNorm and RMSNorm modules of any class by one operator each.

Many models have their own norm classes (``LlamaRMSNorm``, ``T5LayerNorm``), written in Python with
six operators. In a model with int8 layers these norms take a tenth of the time. A norm is therefore
recognised by its values on a probe, not by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from torchquant.graph.modules import HOOKS, owners_by_module, replace_module
from torchquant.nn.norm import LayerNorm, RMSNorm
from torchquant.report import fold


@dataclass(frozen=True)
class NormReport:
    """What a verb did to one norm.

    Attributes:
        name: the norm's name in the model.
        kind: the name of its class.
        action: "replaced" or "left".
        reason: why the norm was left; empty if it was replaced.

    Example:
        >>> print(NormReport("bn", "BatchNorm1d", "left", "filter_fn"))
        left: bn (BatchNorm1d): filter_fn
    """

    name: str
    kind: str
    action: Literal["replaced", "left"]
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.action}: {self.name} ({self.kind})"
        return f"{line}: {self.reason}" if self.reason else line


@dataclass(frozen=True)
class NormsReport:
    """Result of :func:`torchquant.replace_norms_`; the blocks of a model share a printed line.

    Attributes:
        norms: one report per norm, in the order of the model's modules.

    Example:
        >>> names = [f"blocks.{index}.norm" for index in range(6)]
        >>> print(NormsReport(tuple(NormReport(name, "LayerNorm", "replaced") for name in names)))
        6 of 6 norms replaced
        replaced: blocks.{0..5}.norm (LayerNorm) (6 times)
    """

    norms: tuple[NormReport, ...]

    @property
    def replaced(self) -> tuple[NormReport, ...]:
        """The norms that were replaced."""
        return tuple(norm for norm in self.norms if norm.action == "replaced")

    def __str__(self) -> str:
        summary = f"{len(self.replaced)} of {len(self.norms)} norms replaced"
        return "\n".join([summary, *fold(map(str, self.norms))])


def replace_norms_(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> NormsReport:
    """Replace a model's LayerNorm and RMSNorm modules by torchquant's, in place.

    An RMSNorm of any class is replaced if it computes the same values as
    :class:`torchquant.nn.RMSNorm` on a probe. The probe also shows whether the norm rounds before
    or after its weight. Parameters remain the same objects under the same names, so state dicts,
    ties and optimizers stay valid; hooks are moved. Results change only by rounding: sums use a
    different order, which is the same on every device.

    A replaced LayerNorm can also compute the addition before it: ``norm(x, residual=y)``. The code
    that calls the norm has to be changed for that.

    The replacement is not saved; call this function again after :func:`torchquant.load`.

    Args:
        model: any module that contains norms.
        filter_fn: called with each norm and its name; returns True for norms to replace. None
            replaces all.

    Returns:
        A report with one row per module whose class name contains "norm".

    Raises:
        TypeError: model is not a module, or filter_fn is not callable.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6))
        >>> print(replace_norms_(model))
        2 of 2 norms replaced
        replaced: 1 (LayerNorm)
        replaced: 2 (RMSNorm)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_norms_: model must be an nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"replace_norms_: filter_fn must be a function of (module, name), got {filter_fn!r}"
        )
    owners = owners_by_module(model)
    rows = []
    for name, module in list(model.named_modules()):
        if id(module) not in owners or not looks_like_a_norm(module):
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(module, name):
            rows.append(NormReport(name, kind, "left", "filter_fn"))
            continue
        new = _own(module)
        if isinstance(new, str):
            rows.append(NormReport(name, kind, "left", new))
        else:
            replace_module(owners[id(module)], module, new)
            rows.append(NormReport(name, kind, "replaced"))
    return NormsReport(tuple(rows))


def looks_like_a_norm(module: nn.Module) -> bool:
    """True for leaf modules whose class name contains "norm".

    Example:
        >>> looks_like_a_norm(nn.RMSNorm(8)), looks_like_a_norm(nn.Linear(8, 8))
        (True, False)
    """
    return not module._modules and "norm" in type(module).__name__.lower()


def _own(module: nn.Module) -> nn.Module | str:
    """The module that replaces a norm, with the same parameters, or the reason why none can."""
    if isinstance(module, (LayerNorm, RMSNorm)):
        return "already a norm of torchquant"
    if getattr(module, "parametrizations", None):
        return "parametrized"
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        return "on the meta device, without values; load its weights first"
    module = copy.copy(module)  # the same parameters, but without hooks
    for hooks in HOOKS:
        setattr(module, hooks, type(getattr(module, hooks))())
    with torch.inference_mode(False), torch.no_grad():
        try:
            if type(module) is nn.LayerNorm:
                return LayerNorm.from_float(module)
            return RMSNorm.from_float(module)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error).partition("from_float: ")[2] or f"a probe failed: {error}"
