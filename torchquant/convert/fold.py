"""Folds batch norms into the convolutions and linear layers before them.

``norm(layer(x))`` with running statistics is a layer with the weight ``w * factor`` and the bias
``shift + (bias - mean) * factor``. A pair is folded only where the code of the model shows that the
norm alone reads the output of the layer, on all branches of all methods. Each pair is then compared
on random input; one whose results differ stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchquant.convert.fold_pairs import kept_dimensions, pairs_of, refusal, seen_elsewhere
from torchquant.convert.fold_values import fold
from torchquant.graph.only_path import path_problem
from torchquant.graph.regions import Region
from torchquant.graph.ways import Ways
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.report import FusionReport, LayerReport


def fold_batch_norms(
    model: nn.Module,
    regions: Sequence[Region],
    wanted: Callable[[nn.Module], bool],
    ranks: Mapping[int, Collection[int]] | None = None,
) -> list[FusionReport]:
    """Fold batch norms into the layers before them, in place.

    A folded norm stays folded: no verb separates the two again, because the layer's old weight is
    not kept. All methods and branches of the model compute what they did, up to rounding. What
    changes is the output of the layer itself, for code outside of the model that calls the layer
    alone.

    Args:
        model: the model, whose parameters are on devices with values.
        regions: the regions of the model; all pairs in them are folded.
        wanted: takes a layer outside of the regions; True if a norm may be folded into it.
        ranks: the dimensions of the inputs that batch norms were seen with, by the norm's id. A
            norm after a linear layer is folded only if its inputs have 2 dimensions.

    Returns:
        A report for each batch norm after a layer; the reason says why it stays.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> print(fold_batch_norms(model, [], lambda layer: True)[0])
        fused: 0 with 1 (BatchNorm2d)
        >>> model[1]
        FoldedNorm()
    """
    pairs = pairs_of(model, regions, wanted)
    if not pairs:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    ways = Ways(model, [module for pair in pairs for module in (pair.layer, pair.norm)])
    seen = seen_elsewhere(model)
    reports: list[FusionReport] = []
    for pair in pairs:
        layer, norm = pair.layer, pair.norm
        problem = (
            pair.problem
            or _shared(layer, norm, ways)
            or seen(layer)
            or seen(norm)
            or path_problem(ways, layer, norm)
            or refusal(pair, ranks or {})
            or fold(layer, norm)
        )
        if not problem:
            place = FoldedNorm.in_place_of(norm, kept_dimensions(pair))
            for parent, attribute in ways.owners[id(norm)]:
                parent._modules[attribute] = place
        what = f"{names[id(norm)]} ({type(norm).__name__})"
        action: Any = "not fused" if problem else "fused"
        reports.append(FusionReport("batch norm", (names[id(layer)],), what, action, problem))
    return reports


def _shared(layer: nn.Module, norm: nn.Module, ways: Ways) -> str:
    """Why two modules have more than one place in the model; or empty."""
    for what, module in (("layer", layer), ("batch norm", norm)):
        if len(ways.owners.get(id(module), ())) != 1:
            return f"the {what} is registered in more than one place"
    return ""


def is_outdated(region: Region) -> bool:
    """True if the record of a region follows the forward of a batch norm that was folded.

    Example:
        >>> from torchquant.convert.regions import find
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> (region,) = find(net, lambda module: isinstance(module, nn.Conv2d)).regions
        >>> is_outdated(region)
        False
    """
    return any(
        isinstance(region.module.get_submodule(scope.path), FoldedNorm)
        for scope in region.trace.scopes
    )


def folded_rows(
    rows: Iterable[LayerReport], foldings: Iterable[FusionReport]
) -> tuple[LayerReport, ...]:
    """The rows of modules of other kinds; those of folded batch norms name the layer.

    Example:
        >>> folded_rows([], [])
        ()
    """
    layers = {
        one.what.rpartition(" (")[0]: one.layers[0] for one in foldings if one.action == "fused"
    }
    return tuple(
        replace(row, action="prepared", reason=f"part of {layers[row.name]}")
        if row.name in layers
        else row
        for row in rows
    )


__all__ = ["fold_batch_norms", "folded_rows", "is_outdated"]
