"""replace_norms_: a model's LayerNorm and RMSNorm modules, of any class, as one operator each.

Models bring norms of their own (``LlamaRMSNorm``, ``T5LayerNorm``), in Python and of six operators,
which beside int8 layers take a tenth of the time. So a norm is recognised by what it computes on a
probe, not by its name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from torchquant.graph.modules import HOOKS, owners_by_module, replace_module
from torchquant.nn.norm import LayerNorm, RMSNorm

_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")  # a block's number in a norm's name


@dataclass(frozen=True)
class NormReport:
    """What became of one norm: its name in the model, its class, and why it was left if it was.

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
    """Result of :func:`torchquant.replace_norms_`; in print, a model's blocks share a line.

    Example:
        >>> names = [f"blocks.{index}.norm" for index in range(6)]
        >>> print(NormsReport(tuple(NormReport(name, "LayerNorm", "replaced") for name in names)))
        6 of 6 norms replaced
        replaced: blocks.*.norm (LayerNorm) (6 times)
    """

    norms: tuple[NormReport, ...]

    @property
    def replaced(self) -> tuple[NormReport, ...]:
        """The norms that are torchquant's now."""
        return tuple(norm for norm in self.norms if norm.action == "replaced")

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for line in map(str, self.norms):
            alike.setdefault(_NUMBER.sub("*", line), []).append(line)
        lines = [
            same[0] if len(same) == 1 else f"{pattern} ({len(same)} times)"
            for pattern, same in alike.items()
        ]
        return "\n".join([f"{len(self.replaced)} of {len(self.norms)} norms replaced", *lines])


def replace_norms_(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> NormsReport:
    """Replace a model's LayerNorm and RMSNorm modules by torchquant's, in place.

    An RMSNorm of any class is replaced where on a probe it computes what
    :class:`torchquant.nn.RMSNorm` does, which also finds out whether it rounds before or behind its
    weight. Parameters are the same objects as before under the same names, so state dicts, ties and
    optimizers stay valid; hooks move along. Results change by rounding only: sums are taken in
    another order, the same one on every device.

    A LayerNorm can then take the addition before it: ``norm(x, residual=y)``. That is for the code
    that calls it to do.

    Args:
        model: any module that contains norms.
        filter_fn: called with each norm and its name; true asks for it. None asks for all.

    Returns:
        A report with a line for each module that looks like a norm.

    Raises:
        TypeError: model is not a module, or filter_fn not a function.

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
    """Whether people would take a module for a norm: a leaf with one in its class's name.

    Example:
        >>> looks_like_a_norm(nn.RMSNorm(8)), looks_like_a_norm(nn.Linear(8, 8))
        (True, False)
    """
    return not module._modules and "norm" in type(module).__name__.lower()


def _own(module: nn.Module) -> nn.Module | str:
    """torchquant's module in place of a norm, on its parameters; or why there is none."""
    if isinstance(module, (LayerNorm, RMSNorm)):
        return "torchquant's already"
    if getattr(module, "parametrizations", None):
        return "parametrized"
    if "forward" in module.__dict__:
        return "forward replaced on the instance"
    if any(p is not None and p.is_meta for p in module._parameters.values()):
        return "on the meta device, without values; load its weights first"
    module = copy.copy(module)  # the same parameters, but no hook shall see the probe
    for hooks in HOOKS:
        setattr(module, hooks, type(getattr(module, hooks))())
    with torch.inference_mode(False), torch.no_grad():
        try:
            if type(module) is nn.LayerNorm:
                return LayerNorm.from_float(module)
            return RMSNorm.from_float(module)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error).partition("from_float: ")[2] or f"a probe failed: {error}"
