"""Fuses an activation into the preceding layer if a trace of the forward permits it.

A layer and an activation are fused if only rounding can change: on every path through every forward
that calls one of them, the layer's output goes into the activation and nowhere else; neither has
hooks, which would receive different values; and the fused layer and the two modules agree on random
rows. The verb for training fuses only ReLU, which is exact, and skips the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from torchquant.graph.dataflow import Dataflow
from torchquant.graph.modules import has_hooks, held_by
from torchquant.graph.recognize import activation_of
from torchquant.graph.trace import Trace
from torchquant.nn.base import QuantizedModule
from torchquant.nn.fused import FusedActivation
from torchquant.report import FusionReport

Owners = dict[int, list[tuple[nn.Module, str]]]

_FUNCTIONS = ("gelu", "relu", "relu_", "silu", "silu_", "tanh", "tanh_", "sigmoid", "sigmoid_")
_RELU_FUNCTIONS = ("relu", "relu_")
_TEST_ROWS = 8


@dataclass
class _Pair:
    layer: nn.Module
    dtype: torch.dtype = torch.float32
    activation: nn.Module | None = None
    problem: str | None = None


@dataclass
class _Search:
    flow: Dataflow
    pairs: dict[int, _Pair]  # by the layer's id
    owners: Owners
    relu_only: bool = False
    recognized: dict[int, str | None] = field(default_factory=dict)

    def name_of(self, module: nn.Module) -> str | None:
        if id(module) not in self.recognized:
            self.recognized[id(module)] = activation_of(module)
        return self.recognized[id(module)]


def fuse_activations(
    flow: Dataflow, layers: Iterable[tuple[QuantizedModule, torch.dtype]], owners: Owners
) -> list[FusionReport]:
    """Fuse activations into the layers before them, in place.

    Args:
        flow: traces of the model.
        layers: quantized layers, each with the dtype in which the model computes.
        owners: for each module's id, the (parent, attribute) pairs that hold the module.

    Returns:
        One report per fused pair, and one per candidate that was not fused.
    """
    search = _search(flow, [_Pair(layer, dtype) for layer, dtype in layers], owners)
    for activation in _activations(search):
        _fuse(search, activation)
    return _rows(search)


def find_relus(
    flow: Dataflow, layers: Iterable[nn.Module], owners: Owners
) -> tuple[list[tuple[nn.Module, list[nn.Module]]], list[FusionReport]]:
    """Find the ReLUs that can move into the layers before them, without changing the model.

    Args:
        flow: traces of the model.
        layers: float layers, whose replacements can compute a ReLU.
        owners: for each module's id, the (parent, attribute) pairs that hold the module.

    Returns:
        Each ReLU for :func:`absorb`, with the layers that it follows; and one report per pair, and
        one per activation that has to stay.
    """
    search = _search(flow, [_Pair(layer) for layer in layers], owners, relu_only=True)
    found = [(a, [pair.layer for pair in _behind(search, a)]) for a in _activations(search)]
    return found, _rows(search)


def absorb(activation: nn.Module, name: str, owners: Owners) -> None:
    """Replace an activation that the preceding layers compute by an identity, wherever it is."""
    place = FusedActivation(name, activation).train(activation.training)
    for parent, attribute in owners[id(activation)]:
        parent._modules[attribute] = place


def _search(flow: Dataflow, pairs: list[_Pair], owners: Owners, relu_only: bool = False) -> _Search:
    search = _Search(flow, {id(pair.layer): pair for pair in pairs}, owners, relu_only)
    for pair in pairs:
        _find_activation(search, pair)
    _drop_dependent(search)
    return search


def _rows(search: _Search) -> list[FusionReport]:
    return [
        _row(search, pair)
        for pair in search.pairs.values()
        if pair.problem is not None or pair.activation is not None
    ]


def _row(search: _Search, pair: _Pair) -> FusionReport:
    layers = (search.flow.name(pair.layer),)
    what = ""
    if pair.activation is not None:
        name = search.name_of(pair.activation)
        kind = type(pair.activation).__name__
        what = f"{search.flow.name(pair.activation)} ({kind if name is None else name})"
    if pair.problem is not None:
        return FusionReport("activation", layers, what, "not fused", pair.problem)
    return FusionReport("activation", layers, what, "fused", "")


def _find_activation(search: _Search, pair: _Pair) -> None:
    """Set ``activation`` if one follows the layer, and ``problem`` if it cannot be fused."""
    calls = search.flow.calls.get(id(pair.layer), [])
    followers = [(trace, user) for trace, node in calls for user in node.users]
    modules = [trace.modules[user] for trace, user in followers if user in trace.modules]
    found = [module for module in modules if _is_candidate(search, module)]
    failure = search.flow.why_not_traced(pair.layer)
    if not found:
        functions = _RELU_FUNCTIONS if search.relu_only else _FUNCTIONS
        called = [name for _, user in followers if (name := _function(user)) in functions]
        if called:
            kind = type(search.flow.callers[id(pair.layer)][0]).__name__
            example = "nn.ReLU" if search.relu_only else "such as nn.GELU"
            pair.problem = (
                f"{kind}.forward calls {called[0]} itself; a module ({example}) could be fused"
            )
        elif failure is not None and _has_sibling_activation(search, pair.layer):
            pair.problem = failure
        return
    pair.activation = found[0]
    pair.problem = (
        failure
        or _misuse(search, pair, calls)
        or search.flow.why_not_traced(found[0])
        or _misuse_of_activation(search, found[0])
    )
    if search.relu_only and search.name_of(found[0]) != "relu":
        pair.problem = "only ReLU can be fused during training"


def _is_candidate(search: _Search, module: nn.Module) -> bool:
    """True for activations, and for modules that users would expect to be activations."""
    named = type(module).__module__ == "torch.nn.modules.activation"
    return named or search.name_of(module) is not None


def _function(user: fx.Node) -> str | None:
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return name if user.op in ("call_function", "call_method") else None


def _has_sibling_activation(search: _Search, layer: nn.Module) -> bool:
    callers = search.flow.callers.get(id(layer), [])
    siblings = [module for caller in callers for module in held_by(caller)]
    return any(not m._modules and search.name_of(m) is not None for m in siblings)


def _misuse(search: _Search, pair: _Pair, calls: list[tuple[Trace, fx.Node]]) -> str | None:
    """The reason why the use of the layer prevents fusion, or None."""
    layer, activation = pair.layer, pair.activation
    computed = getattr(layer, "activation", "none")
    if computed != "none":
        return f"the layer already computes {computed}"
    if has_hooks(layer, before_forward=False):
        return "hooks on the layer would receive different values"
    for trace, node in calls:
        users = list(node.users)
        follower = trace.modules.get(users[0]) if len(users) == 1 else None
        if len(users) > 1:
            return "the layer's output is also used elsewhere"
        if follower is not activation:
            return "the layer's output does not always go into the activation"
        if users[0].args != (node,) or users[0].kwargs:
            return "the activation takes more than the layer's output"
    return None


def _misuse_of_activation(search: _Search, activation: nn.Module) -> str | None:
    """The reason why the activation itself, or its use, prevents fusion, or None."""
    name = search.name_of(activation)
    kind = type(activation).__name__
    if name is None:
        return f"a layer cannot compute {kind}"
    if any(map(has_hooks, activation.modules())):
        return "hooks on the activation would receive different values"
    if id(activation) not in search.owners:
        return f"{kind} is not registered as a module of the model"
    for _, node in search.flow.calls.get(id(activation), []):
        if len(node.args) != 1 or node.kwargs:
            return "the activation takes more than the layer's output"
    return None


def _activations(search: _Search) -> list[nn.Module]:
    """The activations of the pairs that can be fused, each activation once."""
    found = {
        id(pair.activation): pair.activation
        for pair in search.pairs.values()
        if pair.activation is not None and pair.problem is None
    }
    return list(found.values())


def _behind(search: _Search, activation: nn.Module) -> list[_Pair]:
    return [p for p in search.pairs.values() if p.activation is activation and p.problem is None]


def _drop_dependent(search: _Search) -> None:
    """Reject activations that are also called after other modules: they could not be removed."""
    for activation in _activations(search):
        allowed = {id(pair.layer) for pair in _behind(search, activation)}
        for trace, node in search.flow.calls[id(activation)]:
            before = trace.modules.get(node.args[0])  # type: ignore[arg-type]
            if before is None or id(before) not in allowed:
                for pair in _behind(search, activation):
                    pair.problem = "the activation is also used elsewhere"
                break


def _fuse(search: _Search, activation: nn.Module) -> None:
    pairs, name = _behind(search, activation), search.name_of(activation)
    assert name is not None
    if not all(name in _quantized(pair).fused_activations for pair in pairs):
        for pair in pairs:
            pair.problem = f"the layer cannot compute {name}"
        return
    if not all(_agree(pair, activation, name) for pair in pairs):
        for pair in pairs:
            pair.problem = "the fused layer gave different values on random rows"
        return
    absorb(activation, name, search.owners)
    for pair in pairs:
        _quantized(pair).activation = name


def _quantized(pair: _Pair) -> QuantizedModule:
    assert isinstance(pair.layer, QuantizedModule)
    return pair.layer


@torch.no_grad()
def _agree(pair: _Pair, activation: nn.Module, name: str) -> bool:
    """True if the fused layer computes the same values as the two modules, except for rounding."""
    layer, eps = _quantized(pair), torch.finfo(pair.dtype).eps
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False), torch.device("cpu"):
        rows = layer.probe(_TEST_ROWS, generator)
        sizes = torch.exp2(torch.arange(_TEST_ROWS) - 3.0)
        x = rows * sizes.reshape(-1, *[1] * (rows.dim() - 1))
        x = x.to(layer.device, pair.dtype)
        forward = type(layer).forward  # without the layer's hooks
        between = forward(layer, x)
        expected = activation(between.clone())
        layer.activation = name
        try:
            got = forward(layer, x)
        finally:
            layer.activation = "none"
    if got.dtype != expected.dtype:
        return False
    # Slopes are at most 1.13, so a rounding error before the activation grows by at most 1.13.
    allowed = 2 * eps * (between.double().abs() + 1) + 4e-7 * between.double().abs().clamp(min=1)
    return bool(((got.double() - expected.double()).abs() <= allowed).all())
