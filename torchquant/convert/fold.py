"""Folds batch norms into the convolutions and linear layers before them.

``norm(layer(x))`` with running statistics is a layer with the weight ``w * factor`` and the bias
``shift + (bias - mean) * factor``. A pair is found in the record of a region, where every reader of
a result is known, and elsewhere in bytecode (:mod:`torchquant.graph.neighbours`). Each pair is then
compared on random input; one whose results differ stays as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchquant.graph.held import held_modules
from torchquant.graph.modules import has_hooks, memory_key, owners_by_module
from torchquant.graph.neighbours import neighbours
from torchquant.graph.regions import Region
from torchquant.graph.trace import refs
from torchquant.graph.weight_reads import weight_reads
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.report import FusionReport, LayerReport

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVS, *_TRANSPOSED, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Pair:
    layer: nn.Module
    norm: nn.Module
    problem: str  # why the layer's output does not go to the norm alone; or empty


def fold_batch_norms(
    model: nn.Module, regions: Sequence[Region], wanted: Callable[[nn.Module], bool]
) -> list[FusionReport]:
    """Fold batch norms into the layers before them, in place.

    Args:
        model: the model, whose parameters are on devices with values.
        regions: the regions of the model; all pairs in them are folded.
        wanted: takes a layer outside of the regions; True if a norm may be folded into it.

    Returns:
        A report for each batch norm after a layer; the reason says why it stays.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> print(fold_batch_norms(model, [], lambda layer: True)[0])
        fused: 0 with 1 (BatchNorm2d)
        >>> model[1]
        FoldedNorm()
    """
    inside = {id(module) for region in regions for module in region.module.modules()}
    pairs = [pair for region in regions for pair in _pairs_in(region)]
    pairs += (
        pair
        for pair in _pairs_outside(model)
        if id(pair.layer) not in inside and wanted(pair.layer)
    )
    if not pairs:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    owners = owners_by_module(model)
    places = _places(model)
    seen = _seen_elsewhere(model)
    reports: list[FusionReport] = []
    done: set[tuple[int, int]] = set()
    for pair in pairs:
        key = (id(pair.layer), id(pair.norm))
        if key in done:
            continue
        done.add(key)
        problem = (
            pair.problem
            or _shared(pair, owners, places)
            or seen(pair.layer)
            or seen(pair.norm)
            or _refusal(pair.layer, pair.norm)
            or _fold(pair.layer, pair.norm)
        )
        if not problem:
            place = FoldedNorm.in_place_of(pair.norm)
            for parent, attribute in owners[id(pair.norm)]:
                parent._modules[attribute] = place
        what = f"{names[id(pair.norm)]} ({type(pair.norm).__name__})"
        action: Any = "not fused" if problem else "fused"
        reports.append(FusionReport("batch norm", (names[id(pair.layer)],), what, action, problem))
    return reports


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


# ---------------------------------------------------------------- finding pairs


def _pairs_in(region: Region) -> Iterator[_Pair]:
    calls, readers = region.trace.calls, region.trace.readers()
    modules = {
        index: region.module.get_submodule(call.target)
        for index, call in enumerate(calls)
        if call.kind == "module"
    }
    times = Counter(id(module) for module in modules.values())
    for index, norm in modules.items():
        reads = calls[index].reads()
        layer = modules.get(reads[0]) if len(reads) == 1 else None
        if type(norm) not in _NORMS or type(layer) not in _LAYERS or layer is None:
            continue
        problem = ""
        if times[id(layer)] > 1:
            problem = "the layer is called more than once"
        elif times[id(norm)] > 1:
            problem = "the batch norm is called more than once"
        elif len(readers[reads[0]]) > 1:
            problem = "the output of the layer has other readers"
        yield _Pair(layer, norm, problem)
    yield from _extended_pairs(region, modules, readers)


def _extended_pairs(
    region: Region, modules: dict[int, nn.Module], readers: list[list[int]]
) -> Iterator[_Pair]:
    """Batch norms of derived classes, which apply modules of their own afterwards (timm's)."""
    times = Counter(scope.path for scope in region.trace.scopes)
    layers = Counter(id(module) for module in modules.values())
    for scope in region.trace.scopes:
        norm = region.module.get_submodule(scope.path)
        reads = tuple(refs([*scope.args, *scope.kwargs.values()]))
        layer = modules.get(reads[0]) if len(reads) == 1 else None
        if not isinstance(norm, _NORMS) or type(layer) not in _LAYERS or layer is None:
            continue
        problem = ""
        if layers[id(layer)] > 1:
            problem = "the layer is called more than once"
        elif times[scope.path] > 1:
            problem = "the batch norm is called more than once"
        elif any(not scope.start <= reader < scope.end for reader in readers[reads[0]]):
            problem = "the output of the layer has other readers"
        else:
            problem = _extension_problem(norm)
        yield _Pair(layer, norm, problem)


def _extension_problem(norm: Any) -> str:
    """Why a derived batch norm is no batch norm followed by its own modules; or empty.

    The forward was recorded, so it only computes; it runs in a copy.
    """
    name = type(norm).__name__
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm has no running statistics (track_running_stats=False)"
    if norm.running_mean.is_meta:
        return "the tensors have no values (meta device)"
    copied = copy.deepcopy(norm).eval()
    dimensions = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    spatial = next(count for cls, count in dimensions.items() if isinstance(norm, cls))
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, norm.num_features, *[5] * spatial)
    x = torch.randn(shape, generator=generator, dtype=norm.running_mean.dtype)
    x = x.to(norm.running_mean.device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            got = type(copied).forward(copied, x.clone())
            wanted = FoldedNorm.in_place_of(copied)(_frozen(copied, x))
        except Exception as error:
            return f"{name} does not take a batch of {list(shape)}: {error}"
        same = isinstance(got, Tensor) and got.shape == wanted.shape
        if same and bool((got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()):
            return ""
    return f"{name} computes more than a batch norm and its own modules"


def _pairs_outside(model: nn.Module) -> Iterator[_Pair]:
    for found in neighbours(model):
        norm = found.receiver
        if type(norm) in _NORMS and norm is not None and type(found.module) in _LAYERS:
            problem = "" if found.follow is norm else found.obstacle or "it has other readers"
            yield _Pair(found.module, norm, problem)


def _places(model: nn.Module) -> dict[int, list[nn.Module | None]]:
    """For each module the modules that alone receive its result, one for each call in the code."""
    places: dict[int, list[nn.Module | None]] = {}
    for found in neighbours(model):
        places.setdefault(id(found.module), []).append(found.follow)
    return places


def _shared(
    pair: _Pair,
    owners: dict[int, list[tuple[nn.Module, str]]],
    places: dict[int, list[nn.Module | None]],
) -> str:
    """Why code of the model would notice, because it calls the two apart from each other."""
    for what, module in (("layer", pair.layer), ("batch norm", pair.norm)):
        if len(owners.get(id(module), ())) != 1:
            return f"the {what} is registered in more than one place"
    follows = places.get(id(pair.layer), [])
    if len(follows) > 1 and not all(follow is pair.norm for follow in follows):
        return "the layer is called in more than one place"
    if len(places.get(id(pair.norm), [])) > max(len(follows), 1):
        return "the batch norm is called in more than one place"
    return ""


def _seen_elsewhere(model: nn.Module) -> Callable[[nn.Module], str]:
    """A function that says who else could notice that a module's values change; or empty."""
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
        if has_hooks(module, before_forward=isinstance(module, _NORMS)):
            return f"a hook sees the output of the {type(module).__name__}"
        if id(module) in held:
            return f"{held[id(module)][0].name} holds the {type(module).__name__}"
        if id(module) in reads:
            return reads[id(module)].remark
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(is_lazy(parameter) for parameter in own):
            return "its parameters have no values yet"
        if any(uses[memory_key(parameter)] > 1 for parameter in own):
            return f"another module shares a parameter of the {type(module).__name__}"
        return ""

    return seen


def _refusal(layer: nn.Module, norm: Any) -> str:
    weight = layer._parameters.get("weight")
    if weight is None or hasattr(layer, "parametrizations"):
        return "the weight of the layer is computed from other tensors"
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm has no running statistics (track_running_stats=False)"
    if norm.num_features != _channels(layer):
        return f"a batch norm of {norm.num_features} channels after {_channels(layer)}"
    tensors = [weight, norm.running_mean, norm.running_var]
    if any(tensor.is_meta for tensor in tensors):
        return "the tensors have no values (meta device)"
    if any(tensor.device != weight.device for tensor in tensors):
        return "the batch norm is on another device than the layer"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, which would round more"
    return ""


# ---------------------------------------------------------------- folding


def _channels(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _fold(layer: Any, norm: Any) -> str:
    """Fold the norm into the layer; the reason why it stays, or empty."""
    old_weight, old_bias = layer._parameters["weight"], layer._parameters["bias"]
    with torch.inference_mode(False), torch.no_grad():
        input = _probe(layer)
        wanted = _frozen(norm, _apply(layer, input))
        weight, bias = _folded(layer, norm)
        layer._parameters["weight"] = nn.Parameter(weight, old_weight.requires_grad)
        trained = old_weight.requires_grad if old_bias is None else old_bias.requires_grad
        layer._parameters["bias"] = nn.Parameter(bias, trained)
        got = _apply(layer, input)
        allowed = _TOLERANCE * wanted.abs().max()
        error = (got - wanted).abs().max()
        if bool(error <= allowed):
            return ""
        layer._parameters["weight"], layer._parameters["bias"] = old_weight, old_bias
    relative = float(error / wanted.abs().max())
    return f"the folded layer differs by {relative:.1e} of the greatest result"


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    ones = torch.ones_like(variance)
    gain = ones if norm.weight is None else norm.weight.detach().double()
    shift = 0 * ones if norm.bias is None else norm.bias.detach().double()
    bias = 0 * ones if layer.bias is None else layer.bias.detach().double()
    factor = gain / torch.sqrt(variance + norm.eps)
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...], groups after each other
        groups = layer.groups
        grouped = weight.double().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        by_group = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (grouped * by_group).reshape(weight.shape)
    else:
        scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), (shift + (bias - mean) * factor).to(weight.dtype)


def _apply(layer: nn.Module, input: Tensor) -> Tensor:
    """The forward of the layer's class, without hooks."""
    output: Tensor = type(layer).forward(layer, input)
    return output


def _frozen(norm: Any, x: Tensor) -> Tensor:
    """The norm with its running statistics, in either mode."""
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def _probe(layer: Any) -> Tensor:
    """Random input, large enough for a few outputs in each dimension."""
    weight = layer.weight
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape: Iterable[int] = (4, layer.in_features)
    elif isinstance(layer, _TRANSPOSED):
        shape = (2, layer.in_channels, *[3] * (weight.dim() - 2))
    else:
        spans = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape = (2, layer.in_channels, *[(k - 1) * d + 1 + s for k, d, s in spans])
    input = torch.randn(tuple(shape), generator=generator, dtype=weight.dtype)
    return input.to(weight.device)


__all__ = ["fold_batch_norms", "folded_rows", "is_outdated"]
