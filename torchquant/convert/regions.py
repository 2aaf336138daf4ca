"""Regions of a model in the verbs: found, observed in calibration, quantized by convert_.

A verb first finds the regions, then folds batch norms with their help, then covers the layers: a
region observes the values that they read, so that these layers need no observer of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from torchquant.chains.region import Qparams, RegionForward, region_of
from torchquant.configs import Static
from torchquant.graph.regions import Refusal, Region, find_regions
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.training.calibration import observer_for

_LEAVES = ("torch.nn.", "torchquant.nn.")


@dataclass(frozen=True)
class Found:
    """The regions of a model.

    Args:
        regions: the modules that were recorded.
        refusals: the modules that were not, and why; their children were tried.
    """

    regions: Sequence[Region]
    refusals: Sequence[Refusal]


def is_leaf(module: nn.Module) -> bool:
    """True if a call of the module is one entry of a record.

    Example:
        >>> is_leaf(nn.Conv2d(3, 3, 1)), is_leaf(nn.Sequential())
        (True, False)
    """
    if isinstance(module, (QuantizedModule, TrainedModule)):
        return True
    ours = type(module).__module__.startswith(_LEAVES)
    return ours and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def find(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Found:
    """Find the regions of a model.

    Args:
        model: the model; it does not change, and no tensor is computed.
        wanted: takes a module; True for a layer that will have static activations.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> [region.path for region in find(net, lambda m: isinstance(m, nn.Linear)).regions]
        ['']
    """
    return Found(*find_regions(model, wanted, is_leaf))


def cover(
    found: Found, activations_of: Callable[[nn.Module], Static | None]
) -> dict[int, RegionForward]:
    """Let the regions observe the values that their layers read.

    Layers that several regions call are left out: their inputs need one scale.

    Args:
        found: the regions of a model.
        activations_of: takes a module; returns the activations of a layer that is prepared, or
            None for any other module.

    Returns:
        The region of each layer that it observes, by the layer's id.
    """
    calls = Counter(
        identity for region in found.regions for identity in {id(m) for _, m in _called(region)}
    )
    covered: dict[int, RegionForward] = {}
    for region in found.regions:
        own: dict[str, Static] = {}
        ids: list[int] = []
        for path, module in _called(region):
            activations = activations_of(module)
            if activations is not None and calls[id(module)] == 1:
                own[path] = activations
                ids.append(id(module))
        if own:
            forward = RegionForward(
                region.module, region.path, region.trace, own, observer_for, observe_by_hooks
            )
            region.module.forward = forward
            covered.update(dict.fromkeys(ids, forward))
    return covered


def _called(region: Region) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a region calls as one entry, each once, with their paths."""
    paths = dict.fromkeys(call.target for call in region.trace.calls if call.kind == "module")
    for path in paths:
        yield path, region.module.get_submodule(path)


def regions_in(model: nn.Module) -> list[RegionForward]:
    """The regions of a prepared or converted model.

    Example:
        >>> regions_in(nn.Sequential(nn.ReLU()))
        []
    """
    found = (region_of(module) for module in model.modules())
    return [region for region in found if region is not None]


def remove(region: RegionForward) -> None:
    """Give the root of a region the forward of its class again."""
    if region_of(region.root) is region:
        del region.root.__dict__["forward"]


@dataclass(frozen=True)
class Ranges:
    """What the regions of a prepared model have observed.

    Args:
        layers: scale and zero point of the input of each layer, by the layer's id.
        edges: scale and zero point of each edge of the regions that can be quantized.
        unreached: the layers of regions that saw no batch, by id.
        constant: the names of the edges that saw nothing but zeros.
    """

    layers: Mapping[int, Qparams]
    edges: Sequence[tuple[RegionForward, list[Qparams]]]
    unreached: frozenset[int]
    constant: tuple[str, ...]


def ranges(model: nn.Module) -> Ranges:
    """Scales and zero points from what the regions of a prepared model have observed.

    The model does not change. With torch.distributed, all processes have to call this function.
    """
    layers: dict[int, Qparams] = {}
    edges: list[tuple[RegionForward, list[Qparams]]] = []
    unreached: set[int] = set()
    constant: list[str] = []
    for region in regions_in(model):
        if region.quantized:
            continue
        if region.plan is None:
            if not region.failure:  # a region that failed has left its layers to hooks
                unreached.update(id(region.root.get_submodule(path)) for path in region.activations)
            continue
        qparams = []
        for observer in region.observers:
            whole = observer.reduced()
            qparams.append(whole.calculate_qparams())
            least, greatest = whole.calculate_range()
            if float(least.min()) == 0.0 == float(greatest.max()):
                constant.append(observer.layer_name or "")
        edges.append((region, qparams))
        for path, edge in region.plan.layers.items():
            layers[id(region.root.get_submodule(path))] = qparams[edge]
    return Ranges(layers, edges, frozenset(unreached), tuple(constant))


def quantize(observed: Ranges) -> None:
    """Quantize the regions, once their layers have been replaced."""
    for region, qparams in observed.edges:
        region.quantize(qparams)


def remove_unused(model: nn.Module) -> None:
    """Remove the regions that saw no batch, or whose record does not hold."""
    for region in regions_in(model):
        if not region.quantized and region.plan is None:
            remove(region)


def observe_by_hooks(root: nn.Module, layers: Mapping[str, Static]) -> None:
    """Observe the inputs of layers that a region does not observe after all."""
    from torchquant.convert.calibration_hooks import observe_input

    for path, activations in layers.items():
        observe_input(root.get_submodule(path), activations)
