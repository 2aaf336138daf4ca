"""Batch norms after convolutions and linear layers: where they are, and what forbids folding.

Pairs are found in the record of a region, where every reader of a result is known, and elsewhere
by :mod:`torchquant.graph.neighbours`. Either shows one path only; whether the code has others is
the question of :mod:`torchquant.graph.only_path`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.convert.batch_norms import elsewhere
from torchquant.convert.fold_values import channels, extension_problem
from torchquant.graph.held import held_modules
from torchquant.graph.modules import has_hooks, memory_key
from torchquant.graph.neighbours import neighbours
from torchquant.graph.ranks import ranks
from torchquant.graph.regions import Region
from torchquant.graph.trace import refs
from torchquant.graph.weight_reads import weight_reads

# The batch norm for each kind of layer, and the dimensions of its input.
_NORMS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Linear: (nn.BatchNorm1d, 2),
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Conv3d: (nn.BatchNorm3d, 5),
    nn.ConvTranspose1d: (nn.BatchNorm1d, 3),
    nn.ConvTranspose2d: (nn.BatchNorm2d, 4),
    nn.ConvTranspose3d: (nn.BatchNorm3d, 5),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Pair:
    """A layer, and a batch norm that reads its output.

    Attributes:
        layer: the layer.
        norm: the batch norm.
        problem: why something else reads the output, on the path that was found; or empty.
        rank: the dimensions of the output, if the record shows them.
    """

    layer: nn.Module
    norm: nn.Module
    problem: str
    rank: int | None = None


def pairs_of(
    model: nn.Module, regions: Sequence[Region], wanted: Callable[[nn.Module], bool]
) -> list[Pair]:
    """The layers with a batch norm after them, each pair once.

    Args:
        model: the model.
        regions: its regions.
        wanted: takes a layer outside of the regions; True if it is of interest.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> pairs_of(model, [], lambda layer: True)[0].problem
        ''
    """
    inside = {id(module) for region in regions for module in region.module.modules()}
    pairs = [pair for region in regions for pair in _pairs_in(region)]
    pairs += _pairs_outside(model, lambda layer: id(layer) not in inside and wanted(layer))
    once: dict[tuple[int, int], Pair] = {}
    for pair in pairs:
        once.setdefault((id(pair.layer), id(pair.norm)), pair)
    return [*once.values()]


def _pairs_in(region: Region) -> Iterator[Pair]:
    calls, readers = region.trace.calls, region.trace.readers()
    known = ranks(region.trace, region.module)
    layers = {
        index: region.module.get_submodule(call.target)
        for index, call in enumerate(calls)
        if call.kind == "module"
    }
    # A call of a norm: the norm, its arguments, and the calls that belong to it. A batch norm of a
    # derived class, which may apply modules of its own afterwards (timm's), has a scope.
    norms = [
        (module, calls[index].reads(), range(index, index + 1))
        for index, module in layers.items()
        if type(module) in BATCH_NORMS
    ]
    for scope in region.trace.scopes:
        module = region.module.get_submodule(scope.path)
        if isinstance(module, BATCH_NORMS):
            reads = tuple(refs([*scope.args, *scope.kwargs.values()]))
            norms.append((module, reads, range(scope.start, scope.end)))
    of_layers = Counter(id(module) for module in layers.values())
    of_norms = Counter(id(norm) for norm, *_ in norms)
    for norm, reads, own in norms:
        layer = layers.get(reads[0]) if len(reads) == 1 else None
        if layer is None or type(layer) not in _NORMS:
            continue
        problem = ""
        if of_layers[id(layer)] > 1:
            problem = "the layer is called more than once"
        elif of_norms[id(norm)] > 1:
            problem = "the batch norm is called more than once"
        elif any(reader not in own for reader in readers[reads[0]]):
            problem = "the output of the layer has other readers"
        yield Pair(layer, norm, problem, known[reads[0]])


def _pairs_outside(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[Pair]:
    found = [*neighbours(model)]
    for one in found:
        layer, norm = one.module, one.receiver
        if norm is None or type(layer) not in _NORMS or type(norm) not in BATCH_NORMS:
            continue
        if wanted(layer):
            problem = "" if one.follow is norm else one.obstacle or "it has other readers"
            yield Pair(layer, norm, problem or elsewhere(found, layer, norm) or "")


def refusal(pair: Pair, seen_ranks: Mapping[int, Collection[int]]) -> str:
    """Why two modules cannot become one; or empty.

    Args:
        pair: the two modules.
        seen_ranks: the dimensions of inputs that batch norms were seen with, by the norm's id.

    Example:
        >>> pair = Pair(nn.Linear(4, 8), nn.BatchNorm1d(8), "")
        >>> refusal(pair, {id(pair.norm): {3}})
        'the batch norm normalizes dimension 1 of 3, which is not that of the outputs'
    """
    layer: Any = pair.layer
    norm: Any = pair.norm
    weight = layer._parameters.get("weight")
    if weight is None or hasattr(layer, "parametrizations"):
        return "the weight of the layer is computed from other tensors"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm has no running statistics (track_running_stats=False)"
    kind, dimensions = _NORMS[type(layer)]
    if not isinstance(norm, kind):
        return f"a {type(norm).__name__} after a {type(layer).__name__}"
    if norm.num_features != channels(layer):
        return f"a batch norm of {norm.num_features} channels after {channels(layer)}"
    tensors = [weight, norm.running_mean, norm.running_var]
    if any(tensor.is_meta for tensor in tensors):
        return "the tensors have no values (meta device)"
    if any(tensor.device != weight.device for tensor in tensors):
        return "the batch norm is on another device than the layer"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, which would round more"
    wrong = _rank_problem(pair, dimensions, seen_ranks.get(id(norm), ()))
    return wrong or ("" if type(norm) in BATCH_NORMS else extension_problem(norm))


def _rank_problem(pair: Pair, dimensions: int, seen: Collection[int]) -> str:
    """Why a batch norm may normalize another dimension than that of the layer's outputs."""
    if kept_dimensions(pair) is None:
        return ""
    if pair.norm._modules:
        return f"{type(pair.norm).__name__} has modules of its own"
    known = {*seen} if pair.rank is None else {*seen, pair.rank}
    for rank in known:
        if rank != dimensions:
            return (
                f"the batch norm normalizes dimension 1 of {rank}, which is not that of the outputs"
            )
    if not known and isinstance(pair.layer, nn.Linear):
        return "its input may have 2 or 3 dimensions, of which only 2 allow it; pass example_inputs"
    return ""


def kept_dimensions(pair: Pair) -> int | None:
    """The dimensions that the inputs of a folded pair must have later on; None for any.

    ``BatchNorm1d`` normalizes dimension 1 of inputs with 2 and with 3 dimensions; other batch norms
    take one number of dimensions only.

    Example:
        >>> kept_dimensions(Pair(nn.Linear(4, 8), nn.BatchNorm1d(8), ""))
        2
    """
    kind, dimensions = _NORMS[type(pair.layer)]
    return dimensions if kind is nn.BatchNorm1d else None


def seen_elsewhere(model: nn.Module) -> Callable[[nn.Module], str]:
    """A function that says who else could notice that a module's values change; or empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> seen_elsewhere(model)(model[0])
        ''
    """
    held, reads = held_modules(model), weight_reads(model)
    uses = Counter(
        memory_key(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and not is_lazy(parameter)
    )

    def seen(module: nn.Module) -> str:
        if "forward" in vars(module):
            return f"the forward of {type(module).__name__} is replaced"
        if has_hooks(module, before_forward=isinstance(module, BATCH_NORMS)):
            return f"a hook sees the output of the {type(module).__name__}"
        if id(module) in held:
            return f"{held[id(module)][0].name} holds the {type(module).__name__}"
        read = reads.get(id(module))
        if read is not None and (read.values or read.changes):
            return read.remark
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(is_lazy(parameter) for parameter in own):
            return "its parameters have no values yet"
        if any(uses[memory_key(parameter)] > 1 for parameter in own):
            return f"another module shares a parameter of the {type(module).__name__}"
        return ""

    return seen


__all__ = ["Pair", "kept_dimensions", "pairs_of", "refusal", "seen_elsewhere"]
