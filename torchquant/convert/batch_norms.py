"""Which batch norms can become part of the layer before them, and their places in the model.

A pair is read from bytecode (:mod:`torchquant.graph.neighbours`): the batch norm alone receives the
output of the layer, each of the two is called in one place, and nobody else can notice. A
:class:`torchquant.nn.folded_norm.FoldedNorm` takes the place of the batch norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from torchquant.convert.plan import Step
from torchquant.graph.held import held_modules
from torchquant.graph.modules import has_hooks, owners_by_module
from torchquant.graph.neighbours import Neighbours, neighbours
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
    model: nn.Module, steps: Iterable[Step]
) -> tuple[dict[int, Pair], list[FusionReport]]:
    """Find the batch norms after the layers of some steps.

    Args:
        model: the model.
        steps: the layers that will be changed.

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
    counts = _call_counts(model, calls)
    pairs: dict[int, Pair] = {}
    rows: dict[tuple[int, int], FusionReport] = {}
    for found in calls:
        step, norm = wanted.get(id(found.module)), found.receiver
        if step is None or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        layer, key = found.module, (id(found.module), id(norm))
        if key in rows:
            continue
        problem = (
            (found.obstacle if found.follow is None else "")
            or step.kind.trained_with_norm.norm_refusal(layer, norm)
            or _noticed("layer", layer, owners, counts)
            or _noticed("batch norm", norm, owners, counts)
            or ("a hook sees the output of the layer" if has_hooks_after(layer) else None)
            or ("the batch norm has hooks" if has_hooks(norm) else None)
            or ("the forward of the batch norm is replaced" if "forward" in vars(norm) else None)
            or (f"{held[id(norm)][0].name} holds the batch norm" if id(norm) in held else None)
            or (reads[id(norm)].remark if id(norm) in reads else None)
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


def _call_counts(model: nn.Module, calls: Iterable[Neighbours]) -> Counter[int]:
    """How many places in the methods of a model call each module."""
    counts = Counter(id(found.module) for found in calls)
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and module._modules:
            counts[id([*module._modules.values()][-1])] += 1  # nothing follows the last one
    return counts


def _noticed(what: str, module: nn.Module, owners: Owners, counts: Counter[int]) -> str | None:
    """The reason why other code could notice that a module changed, or None."""
    if len(owners.get(id(module), ())) != 1:
        return f"the {what} is registered in more than one place"
    return f"the {what} is called in more than one place" if counts[id(module)] > 1 else None


__all__ = ["Pair"]
