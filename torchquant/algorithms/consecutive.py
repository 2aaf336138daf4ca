"""Pairs of layers between which the channels can be scaled without a change of the function."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.algorithms.scaled_path import ScaledPath
from torchquant.convert.fold_pairs import seen_elsewhere
from torchquant.graph.regions import Region
from torchquant.graph.trace import Call, Trace
from torchquant.graph.ways import Ways
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.folded_norm import BATCH_NORMS, FoldedNorm
from torchquant.nn.kinds import Kind, kind_of, weight_shape

# f(s x) = s f(x) for positive s, for each channel on its own.
_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    FoldedNorm,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AlphaDropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
)
_FUNCTIONS = (
    "relu",
    "relu_",
    "leaky_relu",
    "leaky_relu_",
    "dropout",
    "max_pool1d",
    "max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
)


@dataclass(frozen=True)
class Pair:
    """Two layers; only channel-wise functions stand between them.

    Attributes:
        first: name of the layer that produces the channels.
        second: name of the layer that reads them, and nothing else does.
        bound: the value at which an activation between them cuts off, such as 6 for ReLU6; None if
            there is none.
        block: adjacent inputs of the second layer that belong to one channel; more than 1 after a
            flatten.
    """

    first: str
    second: str
    bound: float | None = None
    block: int = 1


def find_pairs(model: nn.Module, region: Region) -> tuple[list[Pair], dict[str, str]]:
    """The pairs in a region of a model, and the reason for each layer that is first in no pair.

    The record of the region shows one path from the first layer to the second one; a pair is found
    only if the code of the model has no other.

    Args:
        model: a float model.
        region: a recorded part of it.

    Returns:
        The pairs in the order of the calls, and reasons by the names of layers.

    Example:
        >>> from torchquant.convert.regions import find
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8))
        >>> find_pairs(net, find(net, is_float_layer).regions[0])
        ([Pair(first='0', second='2', bound=6.0, block=1)], {'2': 'the model returns its output'})
    """
    finder = _Finder(model, region)
    pairs: list[Pair] = []
    reasons: dict[str, str] = {}
    for index, call in enumerate(region.trace.calls):
        if call.kind != "module" or not has_channels(finder.module(call)):
            continue
        found = finder.partner(index)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            reasons.setdefault(finder.name(call), found)
    return _only_paths(model, pairs, reasons), reasons


def _only_paths(model: nn.Module, pairs: list[Pair], reasons: dict[str, str]) -> list[Pair]:
    """The pairs that the code of the model connects in no other way; reasons for the others."""
    if not pairs:
        return []
    names = {name for pair in pairs for name in (pair.first, pair.second)}
    layers = {name: model.get_submodule(name) for name in names}
    ways, seen = Ways(model, layers.values()), seen_elsewhere(model)
    kept: list[Pair] = []
    for pair in pairs:
        first, second = layers[pair.first], layers[pair.second]
        passes = functools.partial(_passes, bounded=pair.bound is not None)
        other = seen(second)
        reason = (
            seen(first)
            or (f"before {pair.second}: {other}" if other else "")
            or ScaledPath(ways, first, second, passes).problem()
        )
        if reason:
            reasons.setdefault(pair.first, reason)
        else:
            kept.append(pair)
    return kept


def _passes(step: nn.Module | str, bounded: bool) -> bool:
    """True if a module or a function keeps the scale of each channel."""
    if isinstance(step, nn.Module):
        found = _module_step(step)
        return found is not None and (found.bound is None or bounded)
    return step in _FUNCTIONS or step == "flatten" or (bounded and step == "relu6")


def is_float_layer(module: nn.Module) -> bool:
    """True for a float layer of a kind that torchquant quantizes.

    Example:
        >>> is_float_layer(nn.Linear(1, 1)), is_float_layer(nn.ReLU())
        (True, False)
    """
    kind = kind_of(module)
    return kind is not None and has_channels(module) and type(module) in kind.float_types


def has_channels(module: nn.Module) -> bool:
    """True for a layer of a kind that computes with channels; embeddings look rows up.

    Example:
        >>> has_channels(nn.Linear(1, 1)), has_channels(nn.Embedding(1, 1))
        (True, False)
    """
    kind = kind_of(module)
    return kind is not None and not kind.only_weights


def dimensions(layer: nn.Module) -> int:
    """The number of spatial dimensions of a convolution, and 0 for a linear layer.

    Example:
        >>> dimensions(nn.Conv2d(1, 1, 1)), dimensions(nn.Linear(1, 1))
        (2, 0)
    """
    return len(getattr(layer, "kernel_size", ()))


class _Finder:
    def __init__(self, model: nn.Module, region: Region) -> None:
        self.region = region
        self.trace: Trace = region.trace
        self.readers = region.trace.readers()
        called = [id(self.module(call)) for call in self.trace.calls if call.kind == "module"]
        self.calls = Counter(called)
        parameters = (id(p) for module in model.modules() for p in module._parameters.values())
        self.owners = Counter(parameters)

    def module(self, call: Call) -> nn.Module:
        return self.region.module.get_submodule(call.target)

    def name(self, call: Call) -> str:
        return f"{self.region.path}.{call.target}" if self.region.path else call.target

    def partner(self, index: int) -> Pair | str:
        """The pair whose first layer is called at ``index``, or the reason why there is none."""
        calls = self.trace.calls
        first = self.module(calls[index])
        reason = self._unsuited(first)
        if reason is not None:
            return reason
        bound: float | None = None
        flat, place = False, index
        while True:
            readers = self.readers[place]
            if len(readers) != 1:
                return "several places read its output" if readers else "nothing reads its output"
            place = readers[0]
            if place == len(calls):
                return "the model returns its output"
            call = calls[place]
            if call.kind == "module" and has_channels(self.module(call)):
                second = self.module(call)
                reason = self._unsuited(second)
                if reason is not None:
                    return f"before {self.name(call)}: {reason}"
                block = _block(first, second, flat)
                if block is None:
                    return f"its channels are not the input channels of {self.name(call)}"
                return Pair(self.name(calls[index]), self.name(call), bound, block)
            step = self._step(call)
            pooled = None if step is None else step.dimensions
            misfit = pooled not in (None, dimensions(first)) or (flat and pooled is not None)
            if step is None or misfit or (step.flattens and dimensions(first) == 0):
                return self._obstacle(call)
            bound = step.bound if step.bound is not None else bound
            flat = flat or step.flattens

    def _step(self, call: Call) -> _Step | None:
        """What a call between two layers does, or None if it is not known to be channel-wise."""
        if call.kind == "module":
            return _module_step(self.module(call))
        if call.kind in ("function", "method"):
            return _function_step(call)
        return None

    def _obstacle(self, call: Call) -> str:
        """The reason why no pair reaches beyond a call that is not channel-wise."""
        if call.kind != "module":
            return f"{call.target.rpartition(':')[2]} stands after it"
        module = self.module(call)
        reason = f"{self.name(call)} ({type(module).__name__}) stands after it"
        return f"{reason}; prepare_ folds it" if isinstance(module, BATCH_NORMS) else reason

    def _unsuited(self, layer: nn.Module) -> str | None:
        kind: Kind | None = kind_of(layer)
        if isinstance(layer, (QuantizedModule, TrainedModule)):
            return "it is no float layer"
        if kind is None or type(layer) not in kind.float_types:
            return "its class is unknown"
        reason = kind.refusal(layer)
        if reason is not None:
            return reason
        if self.calls[id(layer)] != 1:
            return "it is called several times"
        if any(self.owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            return "it shares a parameter with another layer"
        return None


@dataclass(frozen=True)
class _Step:
    """A channel-wise function: where it cuts off, whether it flattens, and for what it is made."""

    bound: float | None = None
    flattens: bool = False
    dimensions: int | None = None  # of the images that it pools


def _module_step(module: Any) -> _Step | None:
    kind = type(module)
    if kind is nn.ReLU6:
        return _Step(bound=6.0)
    if isinstance(module, nn.Flatten):
        return _Step(flattens=True) if (module.start_dim, module.end_dim) == (1, -1) else None
    return _Step(dimensions=_pooled(kind.__name__)) if kind in _MODULES else None


def _function_step(call: Call) -> _Step | None:
    name = call.target.rpartition(":")[2].rpartition(".")[2]
    if name == "relu6":
        return _Step(bound=6.0)
    if name == "flatten":
        places = (*call.args[1:], *call.kwargs.values())
        return _Step(flattens=True) if places in ((1,), (1, -1)) else None
    return _Step(dimensions=_pooled(name)) if name in _FUNCTIONS else None


def _pooled(name: str) -> int | None:
    """The number in the name of a pooling, such as MaxPool2d; None for other functions."""
    return int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else None


def _block(first: nn.Module, second: nn.Module, flat: bool) -> int | None:
    """How many adjacent inputs of the second layer belong to a channel, or None if that is open."""
    channels, inputs = _channels(first)[1], _channels(second)[0]
    if dimensions(first) == dimensions(second) and not flat:
        return 1 if channels == inputs else None
    if dimensions(second) == 0 and flat and inputs % channels == 0:
        return inputs // channels
    return None


def _channels(layer: Any) -> tuple[int, int]:
    """The channels that a layer reads and produces."""
    if dimensions(layer):
        return layer.in_channels, layer.out_channels
    outputs, inputs = weight_shape(layer)
    return inputs, outputs
