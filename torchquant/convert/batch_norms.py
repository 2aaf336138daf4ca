"""Which batch norms can become part of the layer before them, and their places in the model.

A pair is read from bytecode: the batch norm alone receives the output of the layer, on all branches
of all methods (:mod:`torchquant.graph.only_path`), and nobody else can notice. A
:class:`torchquant.nn.folded_norm.FoldedNorm` takes the place of the batch norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchquant.convert.plan import Step
from torchquant.graph.held import held_modules
from torchquant.graph.modules import has_hooks, owners_by_module
from torchquant.graph.neighbours import Neighbours, neighbours
from torchquant.graph.only_path import path_problem
from torchquant.graph.ways import Ways
from torchquant.graph.weight_reads import weight_reads
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.report import FusionReport, LayerReport

Owners = dict[int, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that becomes part of it.

    Args:
        layer: the name of the layer.
        norm: the batch norm.
        name: its name in the model.
        owner: the module that holds it, and the name there.
    """

    layer: str
    norm: nn.Module
    name: str
    owner: tuple[nn.Module, str]

    def fold(self) -> None:
        """Put an identity in the place of the batch norm."""
        parent, attribute = self.owner
        place = FoldedNorm(self.norm)
        parent._modules[attribute] = place.train(self.norm.training)


def pairs_to_fold(
    model: nn.Module,
    steps: Iterable[Step],
    recorded: Iterable[tuple[nn.Module, nn.Module]] = (),
) -> tuple[dict[int, Pair], list[FusionReport]]:
    """Find the batch norms after the layers of some steps.

    Args:
        model: the model.
        steps: the layers that will be changed.
        recorded: layers and batch norms that alone read their outputs in the record of a region.

    Returns:
        A pair for each layer that has one, by the layer's id, and a report for each batch norm that
        receives the output of such a layer.
    """
    wanted = {id(step.module): step for step in steps if step.kind.trained_with_norm is not None}
    if not wanted:
        return {}, []
    names = {id(module): name for name, module in model.named_modules()}
    owners, held, reads = owners_by_module(model), held_modules(model), weight_reads(model)
    calls = [*neighbours(model)]
    candidates: list[tuple[nn.Module, nn.Module, str | None]] = [
        (
            found.module,
            found.receiver,
            (found.obstacle if found.follow is None else "")
            or elsewhere(calls, found.module, found.receiver),
        )
        for found in calls
        if isinstance(found.receiver, _BatchNorm)
    ]
    candidates += [(layer, norm, None) for layer, norm in recorded]
    norms = (norm for _, norm, _ in candidates)
    ways = Ways(model, [*(step.module for step in wanted.values()), *norms])
    pairs: dict[int, Pair] = {}
    rows: dict[tuple[int, int], FusionReport] = {}
    for layer, norm, obstacle in candidates:
        step, key = wanted.get(id(layer)), (id(layer), id(norm))
        if step is None or key in rows:
            continue
        problem = (
            obstacle
            or step.kind.trained_with_norm.norm_refusal(layer, norm)
            or _shared("layer", layer, owners)
            or _shared("batch norm", norm, owners)
            or ("a hook sees the output of the layer" if has_hooks_after(layer) else None)
            or ("the batch norm has hooks" if has_hooks(norm) else None)
            or ("the forward of the batch norm is replaced" if "forward" in vars(norm) else None)
            or (f"{held[id(norm)][0].name} holds the batch norm" if id(norm) in held else None)
            or (reads[id(norm)].remark if id(norm) in reads else None)
            or path_problem(ways, layer, norm)
        )
        what = f"{names.get(id(norm), '?')} ({type(norm).__name__})"
        place = (step.name,)
        if problem:
            rows[key] = FusionReport("batch norm", place, what, "not fused", problem)
            continue
        rows[key] = FusionReport("batch norm", place, what, "fused", "")
        pairs[id(layer)] = Pair(step.name, norm, names[id(norm)], owners[id(norm)][0])
    return pairs, list(rows.values())


def has_hooks_after(layer: nn.Module) -> bool:
    """True if a hook sees the output of a layer."""
    return has_hooks(layer, before_forward=False)


def folded_rows(
    others: Iterable[LayerReport], pairs: Mapping[int, Pair]
) -> tuple[LayerReport, ...]:
    """The rows of modules of other kinds; those of folded batch norms name the layer."""
    layers = {pair.name: pair.layer for pair in pairs.values()}
    return tuple(
        replace(row, action="prepared", reason=f"part of {layers[row.name]}")
        if row.name in layers
        else row
        for row in others
    )


def elsewhere(calls: Iterable[Neighbours], layer: nn.Module, norm: nn.Module) -> str | None:
    """The reason why a neighbouring call shows another way out of a layer or into a norm, or None.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        >>> elsewhere(neighbours(net), net[0], net[1]) is None
        True
    """
    for one in calls:
        if one.module is layer and one.follow is not norm:
            return "the layer is called in more than one place"
        if one.receiver is norm and one.module is not layer:
            return "the batch norm is called in more than one place"
    return None


def _shared(what: str, module: nn.Module, owners: Owners) -> str | None:
    """The reason why a module has another place in the model, or None."""
    if len(owners.get(id(module), ())) != 1:
        return f"the {what} is registered in more than one place"
    return None


__all__ = ["Pair"]
