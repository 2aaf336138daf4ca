"""Regions of a model in the verbs: found, observed in calibration, quantized by convert_.

A region (:class:`torchquant.chains.region.RegionForward`) makes a part of a model run on integers
from layer to layer. prepare_ finds the regions, calibrate lets them observe, and convert_ takes
from them the scales of the values that several layers share.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from torchquant.chains.account import report_of
from torchquant.chains.plan import Plan
from torchquant.chains.region import Qparams, RegionForward, region_of
from torchquant.chains.root import SCALE, ZERO_POINT, attach, detach
from torchquant.chains.training import TrainingForward
from torchquant.configs import Float, QuantizationConfig, Static
from torchquant.convert.agreement import agree
from torchquant.convert.calibration_hooks import hook_of, missing_range, prepared_layers
from torchquant.convert.plan import Step
from torchquant.graph.regions import Refusal, Region, find_regions
from torchquant.graph.trace import Trace
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.nn.kinds import kind_of
from torchquant.report import RegionReport
from torchquant.training.calibration import observer_for
from torchquant.training.observers import Observer

_LEAVES = ("torch.nn.", "torchquant.nn.")
_WRAPPERS = "torch.nn.parallel."  # DataParallel and the like: their module is a child as any other


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
    if isinstance(module, FoldedNorm):
        return not module._modules
    place = type(module).__module__
    ours = place.startswith(_LEAVES) and not place.startswith(_WRAPPERS)
    return ours and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def find(
    model: nn.Module,
    wanted: Callable[[nn.Module], bool],
    check: Callable[[nn.Module, Trace], None] | None = None,
) -> Found:
    """Find the regions of a model.

    Args:
        model: the model; it does not change, and no tensor is computed.
        wanted: takes a module; True for a layer that has or will have static activations.
        check: see :func:`torchquant.graph.regions.find_regions`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> [region.path for region in find(net, lambda m: isinstance(m, nn.Linear)).regions]
        ['']
    """
    old = [region for region in regions_in(model) if not region.quantized]
    for region in old:  # the forward of the class is recorded
        remove(region)
    try:
        # A layer may be of a class with a forward of its own, which its quantized layer replaces.
        return Found(
            *find_regions(model, wanted, lambda module: wanted(module) or is_leaf(module), check)
        )
    finally:
        for region in old:
            install(region)


def cover(model: nn.Module, found: Found) -> list[RegionForward]:
    """Let regions observe what the hooks of the prepared layers do not see, in place.

    Layers that several regions call are left to their hooks: their input needs one scale.

    Args:
        model: a model whose layers are prepared.
        found: its regions; they replace those that observed before.
    """
    for old in regions_in(model):
        if not old.quantized and not isinstance(old, TrainingForward):
            remove(old)
    taken = covered(model)
    made: list[RegionForward] = []
    for region, called in own_layers(found):
        own: dict[str, Static] = {}
        outputs: dict[str, Static | Float] = {}
        for path, module in called:
            hook = hook_of(module)
            if hook is not None and joins(module, hook.config):
                own[path] = hook.config.activations
                if hook.config.output is not None:
                    outputs[path] = hook.config.output
        if own and not any(id(module) in taken for module in region.module.modules()):
            parts = own, observer_for, paused, outputs
            made.append(RegionForward(region.module, region.path, region.trace, *parts))
            install(made[-1])
    return made


def joins(module: nn.Module, config: QuantizationConfig) -> bool:
    """True if the layer that a module becomes with ``config`` can have int8 values as input.

    Example:
        >>> from torchquant import PerGroup, Weights
        >>> parts = [Weights(), Weights(4, granularity=PerGroup(32))]
        >>> [joins(nn.Linear(64, 64), QuantizationConfig(part, Static())) for part in parts]
        [True, False]
    """
    kind = kind_of(module)
    return kind is not None and kind.layer_class(config, module).in_programs


def covered(model: nn.Module) -> set[int]:
    """The ids of the modules in the regions of a model that are not quantized yet."""
    regions = [region for region in regions_in(model) if not region.quantized]
    return {id(module) for region in regions for module in region.root.modules()}


def own_layers(found: Found) -> Iterator[tuple[Region, list[tuple[str, nn.Module]]]]:
    """The regions, with the modules that no other region calls and their paths."""
    calls = Counter(
        identity for region in found.regions for identity in {id(m) for _, m in calls_of(region)}
    )
    for region in found.regions:
        yield region, [(path, m) for path, m in calls_of(region) if calls[id(m)] == 1]


def join_small_ones(plan: Iterable[Step], found: Found) -> None:
    """Let layers take part that are too small to benefit by themselves, but are parts of chains.

    The data of a chain stays in integers, and leaving the chain costs more than a small layer.

    Args:
        plan: the plan for all layers.
        found: the regions of the other layers.
    """
    called = {id(module) for region in found.regions for _, module in calls_of(region)}
    for step in plan:
        if step.small and id(step.module) in called:
            step.leave = None


def calls_of(region: Region) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a region calls as one entry, each once, with their paths."""
    paths = dict.fromkeys(call.target for call in region.trace.calls if call.kind == "module")
    for path in paths:
        yield path, region.module.get_submodule(path)


@contextmanager
def paused(root: nn.Module) -> Iterator[None]:
    """A context in which the hooks of the layers below a module do not observe."""
    hooks = [hook for module in root.modules() if (hook := hook_of(module)) is not None]
    states = [hook.observing for hook in hooks]
    for hook in hooks:
        hook.observing = False
    try:
        yield
    finally:
        for hook, state in zip(hooks, states, strict=True):
            hook.observing = state


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """A context in which the regions of a prepared model observe; undone if it fails."""
    regions = [region for region in regions_in(model) if not region.quantized]
    states = [
        (region.plan, region.facts, region.failure, dict(region.observers)) for region in regions
    ]
    tensors = [
        {name: buffer.clone() for name, buffer in observer.named_buffers()}
        for region in regions
        for observer in region.observers.values()
    ]
    try:
        for region in regions:
            region.observing = True
        yield
    except BaseException:
        for region, (plan, facts, failure, observers) in zip(regions, states, strict=True):
            region.restore(plan, facts, failure, observers)
        known = (one for *_, observers in states for one in observers.values())
        for observer, buffers in zip(known, tensors, strict=True):
            observer._buffers.update(buffers)
        raise
    finally:
        for region in regions:
            region.observing = False


@contextmanager
def learn(regions: Iterable[RegionForward]) -> Iterator[None]:
    """A context in which regions see a batch as their first one, but observe nothing."""
    regions = list(regions)
    for region in regions:
        region.observing = True
    try:
        yield
    finally:
        for region in regions:
            region.observing = False
            region.restart()


def regions_in(model: nn.Module) -> list[RegionForward]:
    """The regions of a prepared or converted model.

    Example:
        >>> regions_in(nn.Sequential(nn.ReLU()))
        []
    """
    found = (region_of(module) for module in model.modules())
    return [region for region in found if region is not None]


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """A context in which a verb may replace float layers of quantized regions, which stay valid."""
    regions = [
        region
        for region in regions_in(model)
        if region.quantized
        and (region.expected is None or region.expected.change(modes=False) is None)
    ]
    yield
    for region in regions:
        region.settle()


def install(region: RegionForward) -> None:
    """Let a region run instead of the forward of its root."""
    attach(region)


def remove(region: RegionForward) -> None:
    """Give the root of a region the forward of its class again."""
    if region_of(region.root) is region:
        detach(region.root)


def forget(model: nn.Module) -> None:
    """Remove all regions of a model and their scales."""
    for region in regions_in(model):
        remove(region)
        region.root._buffers.pop(SCALE, None)
        region.root._buffers.pop(ZERO_POINT, None)


def region_reports(
    model: nn.Module,
    refusals: Iterable[RegionReport] = (),
    useless: Iterable[tuple[RegionForward, str]] = (),
) -> tuple[RegionReport, ...]:
    """The reports on the regions of a model, and on the modules that are none."""
    reports = [report_of(region) for region in regions_in(model)]
    reports += (
        RegionReport(region.name, type(region.root).__name__, "float", reason)
        for region, reason in useless
    )
    return (*reports, *refusals)


def reports_of(found: Found) -> tuple[RegionReport, ...]:
    """The reports on the modules that are no region."""
    return tuple(
        RegionReport(one.path, type(one.module).__name__, "float", one.reason)
        for one in found.refusals
    )


def remember(found: Found) -> tuple[RegionReport, ...]:
    """The reports on the modules that are no region; prepared layers keep them for convert_."""
    reports = reports_of(found)
    for report, refusal in zip(reports, found.refusals, strict=True):
        for child in refusal.module.modules():
            hook = hook_of(child)
            if hook is not None:
                hook.refused = tuple(dict.fromkeys((*hook.refused, report)))
    return reports


def remembered(model: nn.Module) -> tuple[RegionReport, ...]:
    """The reports on the modules around prepared layers that are no region."""
    hooks = prepared_layers(model).values()
    return tuple(dict.fromkeys(report for hook in hooks for report in hook.refused))


@dataclass
class Ranges:
    """What the regions of a prepared model will be quantized with.

    Args:
        layers: scale and zero point of the input of each layer of a region, by the layer's id.
        edges: the regions that can be quantized, their plans without the layers that have no
            range, and scale and zero point of each edge.
        useless: the regions that cannot, and why.
    """

    layers: dict[int, Qparams] = field(default_factory=dict)
    edges: list[tuple[RegionForward, Plan, list[Qparams]]] = field(default_factory=list)
    useless: list[tuple[RegionForward, str]] = field(default_factory=list)

    def inside(self) -> set[int]:
        """The ids of the prepared layers whose quantized layers take int8 values."""
        return {
            id(region.root.get_submodule(path))
            for region, plan, _ in self.edges
            for path in plan.layers
        }


def ranges(model: nn.Module) -> Ranges:
    """Scales and zero points from what regions and the hooks of their layers have observed.

    The model does not change. With torch.distributed, all processes have to call this
    function.
    """
    found = Ranges()
    regions = [region for region in regions_in(model) if not region.quantized]
    observing = [region for region in regions if not isinstance(region, TrainingForward)]
    layers = list(prepared_layers(model))
    if layers or observing:
        agree(layers, observing)
    for region in regions:
        if isinstance(region, TrainingForward):
            deployed = region.deployed()
            if isinstance(deployed, str):
                found.useless.append((region, deployed))
            else:
                found.edges.append(deployed)
            continue
        if region.plan is None or region.failure:
            nothing = "no batch reached it in the calibration"
            reason = region.failure or region.missed or nothing
            found.useless.append((region, reason))
            continue
        plan, observers = region.plan, _reduced(region)
        missing = {
            path: why
            for path, edge in plan.layers.items()
            if (why := missing_range(observers[edge])) is not None
        }
        if missing:
            assert region.facts is not None
            seen = {value: observers[edge] for value, edge in plan.edge_of.items()}
            rest = {p: part for p, part in region.activations.items() if p not in missing}
            plan = region.facts.plan(rest, region.outputs)
            observers = {edge: seen[value] for value, edge in plan.edge_of.items()}
        if not plan.layers:
            found.useless.append((region, "none of its layers has a range"))
            continue
        qparams = [observers[edge].calculate_qparams() for edge in range(len(plan.edges))]
        found.edges.append((region, plan, qparams))
        for path, edge in plan.layers.items():
            found.layers[id(region.root.get_submodule(path))] = qparams[edge]
    return found


def _reduced(region: RegionForward) -> dict[int, Observer]:
    """An observer for each edge, with the batches of all its layers and of all processes."""
    assert region.plan is not None
    own = {edge: observer.reduced() for edge, observer in region.observers.items()}
    found = {edge: copy.deepcopy(observer) for edge, observer in own.items()}
    for path, edge in region.plan.layers.items():
        hook = hook_of(region.root.get_submodule(path))
        assert hook is not None
        other = hook.observer.reduced()
        if edge in found:
            found[edge].merge(other)
        else:
            found[edge] = copy.deepcopy(other)
    return found


def quantize(found: Ranges) -> None:
    """Quantize the regions, once their layers have been replaced; remove the useless ones."""
    for region, plan, qparams in found.edges:
        region.set_plan(plan)
        region.quantize(qparams)
        install(region)  # one that trained has another forward so far
    for region, _ in found.useless:
        remove(region)
