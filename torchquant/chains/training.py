"""The forward of a region in training: its int8 values are rounded as after the conversion.

Each int8 value has one quantizer. The quantizer of a value that layers read is their
``input_quantizer``, one object for all of them; other values have a quantizer that a layer holds
(:mod:`torchquant.nn.value_quantizers`). So the optimizer, the state dict and the stages reach all
of them, and the outputs of the converted model keep the bits of the trained one.

The first batch shows which values are int8, as in calibration: it runs once more, in float, to
compare the record with the forward.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchquant.chains.call import bound
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.modes import ModeExpected, Record, TrainingBatch
from torchquant.chains.operations import Layer, Shape
from torchquant.chains.plan import Plan
from torchquant.chains.region import Qparams, RegionForward
from torchquant.chains.simulation import Place, Simulation
from torchquant.configs import Static
from torchquant.nn.base import TrainedModule
from torchquant.nn.value_quantizers import (
    VALUE_QUANTIZERS,
    add_value_quantizer,
    keep_value_quantizers,
    value_quantizer,
)
from torchquant.training.calibration import observer_for
from torchquant.training.observed_quantizer import ObservedQuantizer


class TrainingForward(RegionForward):
    """The forward of a region whose layers train with the integers to deploy.

    Args:
        root: the module.
        name: its name in the model, for messages.
        records: its calls, as :func:`torchquant.chains.modes.both_modes` returns them.
        activations: the deployed activations of each layer, by path.

    Example:
        >>> from torchquant.chains.modes import both_modes
        >>> from torchquant.configs import Int8StaticActivationInt8WeightConfig
        >>> from torchquant.graph.trace import trace
        >>> from torchquant.nn import QATLinear
        >>> config = Int8StaticActivationInt8WeightConfig()
        >>> net = nn.Sequential(QATLinear(64, 64, config=config), nn.Flatten())
        >>> records = both_modes(net, trace(net, lambda m: True), lambda module: True)
        >>> net.forward = TrainingForward(net, "", records, {"0": config.activations})
        >>> _ = net(torch.randn(8, 64))
        >>> net.forward.plan.layers
        {'0': 0}
    """

    known_as: Literal["observed", "trained"] = "trained"

    def __init__(
        self,
        root: nn.Module,
        name: str,
        records: Sequence[Record],
        activations: Mapping[str, Static],
    ) -> None:
        self.records = tuple(records)
        self.plans: tuple[Plan, ...] = ()
        self.shapes: tuple[list[Shape], ...] = ()
        self.places: tuple[tuple[Place | None, ...], ...] = ()
        super().__init__(root, name, records[0].trace, activations, observer_for)
        self.expectations = [ModeExpected(root, record) for record in self.records]

    def _forget(self) -> None:
        super()._forget()
        self._simulations: list[Simulation] = []
        self._partial: dict[frozenset[str], Simulation] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_simulations": [], "_partial": {}}

    # ------------------------------------------------------------ calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module."""
        inputs = None if self.failure else bound(self.trace, args, kwargs)
        if inputs is None or not _is_plain(inputs):
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling():
            if self.plan is None:
                return self.original(*args, **kwargs)
            mode = len(self.records) - 1 if self.root.training else 0
            return self._simulation(mode)(inputs)
        if self.plan is None:
            self.take_first_batch(inputs)
            if self.failure:
                return self.original(*args, **kwargs)
        place = self._holding()
        if place is None:
            return self.original(*args, **kwargs)
        left = frozenset() if self._trains() else frozenset(self.without_range())
        return (self._without(left) if left else self._simulation(place))(inputs)

    def _trains(self) -> bool:
        """True if the module or one of its layers is in training mode."""
        return self.root.training or any(self._layer(path).training for path in self.activations)

    def without_range(self) -> set[str]:
        """The paths of the layers that convert_ will leave in float: they have no range."""
        return {p for p in self.activations if self._layer(p).missing_range() is not None}

    def _without(self, left: frozenset[str]) -> Simulation:
        """Evaluation as after the conversion, in which some layers stay in float."""
        if left not in self._partial:
            assert self.facts is not None
            used = {path: part for path, part in self.activations.items() if path not in left}
            plan, record = self.facts.plan(used), self.records[0]
            known = set(self.places[0])
            places = [one if one in known else None for one in _places(plan, record)]
            self._partial[left] = Simulation(self, record, plan, self.facts.shapes, places)
        return self._partial[left]

    def _simulation(self, place: int) -> Simulation:
        if not self._simulations:  # torch.compile cannot make them
            made = zip(self.records, self.plans, self.shapes, self.places, strict=True)
            self._simulations = [Simulation(self, *each) for each in made]
        return self._simulations[place]

    def is_intact(self) -> bool:
        """True if one of the records holds; warns once if none does."""
        return self._holding() is not None

    def _holding(self) -> int | None:
        """The index of the record that holds now, or None."""
        if not self.expectations:  # of a replica
            self.expectations = [ModeExpected(self.root, record) for record in self.records]
        for place, expected in enumerate(self.expectations):
            if expected.change() is None:
                return place
        self.expected = self.expectations[-1 if self.root.training else 0]
        super().is_intact()
        return None

    def copied_to(self, root: nn.Module) -> TrainingForward:
        """A region for a replica of the root, which expects what it finds in its first call."""
        copied = copy.copy(self)
        copied.root, copied.expectations = root, []
        copied._forget()
        return copied

    # ------------------------------------------------------------ the plan

    def take_first_batch(self, inputs: Sequence[Any]) -> None:
        """Compare the records with the forward, learn the sizes, and decide what is int8."""
        facts: list[FirstBatch] = []
        gpus = sorted({t.device.index for t in inputs if t.device.type == "cuda"})
        for record in self.records:
            fact = FirstBatch(self.root, record.trace)
            if record.training:
                fact = TrainingBatch(self.root, record.trace)
                fact.drops = record.drops
            with torch.random.fork_rng(devices=gpus), _in_float(self.root, record):
                self.failure = fact.compare(self.original, inputs)
            if self.failure:
                mode = "in training mode, " if record.training else ""
                self.failure = mode + self.failure
                return
            facts.append(fact)
        activations = self._of_one_kind(facts[0])
        self.activations = activations
        plans = tuple(fact.plan(activations) for fact in facts)
        if not plans[0].layers:
            self.failure = "no layer with static activations is called"
            return
        places: list[Sequence[Place | None] | None] = [_places(plans[0], self.records[0])]
        for plan, record in zip(plans[1:], self.records[1:], strict=True):
            assert places[0] is not None
            places.append(_matched(plans[0], places[0], plan, _places(plan, record)))
        if None in places:
            self.failure = "in training mode, its values have other readers"
            return
        self.facts, self.plan, self.plans = facts[0], plans[0], plans
        self.shapes = tuple(fact.shapes for fact in facts)
        self.places = tuple(tuple(found) for found in places if found is not None)
        self._share()
        self._simulation(0)

    def _of_one_kind(self, facts: FirstBatch) -> dict[str, Static]:
        """The activations without layers that would share a value but train it differently."""
        activations = dict(self.activations)
        while True:
            first: dict[int, Any] = {}
            other = [
                path
                for path, edge in facts.plan(activations).layers.items()
                if first.setdefault(edge, part := self._layer(path).config.activations) != part
            ]
            if not other:
                return activations
            activations = {p: part for p, part in activations.items() if p not in other}

    def _layer(self, path: str) -> TrainedModule:
        layer = self.root.get_submodule(path)
        assert isinstance(layer, TrainedModule)
        return layer

    def _share(self) -> None:
        """Give the layers that read one value one quantizer, and other values their own."""
        for plan in self.plans:
            edges: dict[int, list[str]] = {}
            for path, edge in plan.layers.items():
                edges.setdefault(edge, []).append(path)
            for paths in edges.values():
                share_quantizer([self._layer(path) for path in paths])
        kept: dict[str, set[str]] = {path: set() for path in self.activations}
        for place in (place for places in self.places for place in places if place is not None):
            if place.key:
                kept[place.path].add(place.key)
                self.quantizer_at(place)
        for path, keys in kept.items():
            keep_value_quantizers(self._layer(path), keys)

    # ------------------------------------------------------------ quantizers

    def quantizer_at(self, place: Place) -> Any:
        """The quantizer at a place; it is made if it is new."""
        layer = self._layer(place.path)
        if not place.key:
            return layer.input_quantizer
        found = value_quantizer(layer, place.key)
        return self._added(layer, place) if found is None else found

    def _added(self, layer: TrainedModule, place: Place) -> ObservedQuantizer:
        assert self.plan is not None
        part = self.plan.edges[self.places[0].index(place)]
        made = add_value_quantizer(layer, place.key, part, layer.averaging_constant)
        made.set_layer_name(f"{self.name}.{place.path}" if self.name else place.path)
        others = [self._layer(path).input_quantizer for path in self.activations]
        observed = [one for one in others if isinstance(one, ObservedQuantizer)]
        made.enable_fake_quant(bool(layer.quantize_enabled))  # the stage of the model
        made.enable_observer(all(one.observing for one in observed))
        return made

    def qparams_at(self, place: Place) -> Qparams:
        """Scale and zero point of the values at a place in deployment."""
        layer = self._layer(place.path)
        if not place.key:
            scale, zero_point = layer.input_qparams()
            assert scale is not None and zero_point is not None
            return scale, zero_point
        quantizer = value_quantizer(layer, place.key)
        if quantizer is None:
            raise RuntimeError(f"there is no range yet of a value behind {place.path}")
        return quantizer.qparams()

    # ------------------------------------------------------------ conversion

    def deployed(self) -> tuple[RegionForward, Plan, list[Qparams]] | str:
        """The region to deploy, its plan, and scale and zero point of each edge; or why not."""
        if self.failure:
            return self.failure
        if self.plan is None or self.facts is None:
            return "no batch reached it in training"
        left = self.without_range()
        used = {path: part for path, part in self.activations.items() if path not in left}
        plan = self.facts.plan(used) if left else self.plan
        if not plan.layers:
            return "none of its layers has a range"
        qparams = []
        for place in _places(plan, self.records[0]):
            try:
                qparams.append(self.qparams_at(place))
            except RuntimeError:
                return "no batch in training mode reached one of the values between its layers"
        region = RegionForward(self.root, self.name, self.trace, used, observer_for)
        region.facts = self.facts
        return region, plan, qparams

    @property
    def loaded(self) -> bool:
        """True if layers hold quantizers of values that a state dict brought, without a plan."""
        layers = (self._layer(path) for path in self.activations)
        return self.plan is None and any(VALUE_QUANTIZERS in one._modules for one in layers)


def share_quantizer(layers: Sequence[TrainedModule]) -> None:
    """Let layers that read one value have one quantizer: the first one that has a range.

    Example:
        >>> from torchquant.configs import Int8StaticActivationInt8WeightConfig
        >>> from torchquant.nn import QATLinear
        >>> config = Int8StaticActivationInt8WeightConfig()
        >>> layers = [QATLinear(8, 8, config=config) for _ in range(2)]
        >>> share_quantizer(layers)
        >>> layers[0].input_quantizer is layers[1].input_quantizer
        True
    """
    ready = [layer for layer in layers if layer.missing_range() is None]
    chosen = (ready or layers)[0]._modules["input_quantizer"]
    for layer in layers:
        layer._modules["input_quantizer"] = chosen


@contextmanager
def _in_float(root: nn.Module, record: Record) -> Iterator[None]:
    """A context in which a forward makes the calls of a record, and its modules only compute.

    Layers compute in float, statistics and ranges stay, dropout modules drop nothing, and hooks of
    inner modules do not run, but for those of torch.distributed.
    """
    modules = [*root.modules()]
    hooks = [
        (module, name, module.__dict__[name])
        for module in modules
        for name in ("_forward_hooks", "_forward_pre_hooks")
        if module.__dict__[name] and not _is_distributed(module.__dict__[name].values())
    ]
    modes = [module.training for module in modules]
    layers = [module for module in modules if isinstance(module, TrainedModule)]
    states = [(layer._quantizing, layer.was_called) for layer in layers]
    followed = [root, *(root.get_submodule(scope.path) for scope in record.trace.scopes)]
    try:
        for module in modules:
            module.training = False
        for module in followed:
            module.training = bool(record.training)
        for layer in layers:
            layer._quantizing = False
        for module, name, _ in hooks:
            module.__dict__[name] = OrderedDict()
        yield
    finally:
        for module, name, before in hooks:
            module.__dict__[name] = before
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for layer, (quantizing, called) in zip(layers, states, strict=True):
            layer._quantizing, layer.was_called = quantizing, called


def _is_distributed(hooks: Iterable[Any]) -> bool:
    """True if one of some hooks gathers the parameters of a module."""
    return any("torch.distributed" in str(getattr(one, "__module__", "")) for one in hooks)


def _is_plain(inputs: Sequence[Tensor]) -> bool:
    """True for ordinary tensors with values, which no transform of torch watches."""
    if torch.compiler.is_compiling():
        return not any(item.is_nested for item in inputs)
    if torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        type(item) in (Tensor, nn.Parameter) and not item.is_meta and not item.is_nested
        for item in inputs
    )


def _places(plan: Plan, record: Record) -> tuple[Place, ...]:
    """The place of the quantizer of each edge of a plan."""
    first: dict[int, int] = {}
    for index, edge in plan.edge_of.items():
        first.setdefault(edge, index)
    readers: dict[int, str] = {}
    for path, edge in plan.layers.items():
        readers.setdefault(edge, path)
    found: list[Place] = []
    for edge in range(len(plan.edges)):
        if edge in readers:
            found.append(Place(readers[edge]))
            continue
        place = _behind(plan, record, first[edge])
        count = sum(one.path == place.path and one.key.startswith(place.key) for one in found)
        found.append(Place(place.path, f"{place.key}_{count}"))
    return tuple(found)


def _behind(plan: Plan, record: Record, index: int) -> Place:
    """The layer from whose output a value is computed, and how many calls later."""
    calls, steps = record.trace.calls, 0
    while True:
        operation = plan.operations[index]
        if isinstance(operation, Layer):
            earlier = sum(call.target == operation.path for call in calls[:index])
            return Place(operation.path, f"{earlier}_{steps}")
        reads = calls[index].reads()
        if not reads:
            name = calls[index].target.replace(".", "_")
            return Place(next(iter(plan.layers)), f"{name}_{steps}")
        index, steps = plan.sources[reads[0]], steps + 1


def _matched(
    plan: Plan,
    places: Sequence[Place | None],
    other: Plan,
    others: Sequence[Place],
) -> tuple[Place | None, ...] | None:
    """The places of a plan of training mode, in which evaluation's values have their quantizers.

    Returns:
        None for each edge that evaluation does not have; None if an edge of evaluation is missing
        or divided.
    """
    found: list[Place | None] = []
    for edge, place in enumerate(others):
        own = {path for path, one in other.layers.items() if one == edge} & plan.layers.keys()
        edges = {plan.layers[path] for path in own}
        if len(edges) > 1:
            return None
        if edges:
            (deployed,) = edges
            if own != {path for path, one in plan.layers.items() if one == deployed}:
                return None
            found.append(places[deployed])
        elif not place.key or place in places:
            found.append(place)
        else:
            found.append(None)
    return tuple(found) if set(places) <= set(found) else None
