"""Lets activation modules use the library's operators, and lets the layers before them apply them.

An activation module that follows a quantized layer is replaced, one for one
(:mod:`torchquant.nn.replaced_activation`): it stays the same object and computes the same function.
The layer before it applies the function itself in calls where nobody can notice
(:mod:`torchquant.nn.call_guard`). Which activations follow which layers is read from bytecode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from torchquant.graph.neighbours import Neighbours, neighbours
from torchquant.graph.recognize import activation_of
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.replaced_activation import (
    ReplacedActivation,
    replace_activation_,
    restore_activation_,
)
from torchquant.report import FusionReport

_FUNCTIONS = (
    *("gelu", "relu", "relu_", "silu", "silu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "relu6"),
    *("hardswish", "hardsigmoid", "leaky_relu", "leaky_relu_"),
)
_RELU_FUNCTIONS = ("relu", "relu_")


def fuse_activations(
    model: nn.Module,
    layers: Iterable[QuantizedModule | TrainedModule],
    names: Mapping[int, str],
    *,
    only: tuple[str, ...] | None = None,
) -> list[FusionReport]:
    """Replace the activations after some layers, and let the layers apply them; in place.

    Args:
        model: the model.
        layers: layers of the model whose kind can apply activations.
        names: the name of each module in the model, by id.
        only: the functions to take; None takes all that a layer can apply.

    Returns:
        One report per layer and activation, and one per activation that a layer cannot apply.
    """
    wanted = {id(layer): layer for layer in layers if layer.fused_activations}
    rows: dict[tuple[int, int], FusionReport] = {}
    for found in neighbours(model):
        layer = wanted.get(id(found.module))
        if layer is None:
            continue
        key = (id(layer), id(found.receiver))
        if key in rows and rows[key].action == "fused":
            continue
        row = _row(layer, found, names, only)
        if row is not None:
            rows[key] = row
    return list(rows.values())


def fuse_again(model: nn.Module, names: set[str]) -> None:
    """Replace the activations with these names, and no others, as far as layers are before them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {id(modules[name]) for name in names if name in modules}
    for module in modules.values():
        if id(module) not in wanted:
            restore_activation_(module)
        if isinstance(module, (QuantizedModule, TrainedModule)):
            module.fuse_activation(False)
    for found in neighbours(model):
        layer, follow = found.module, found.follow
        if isinstance(layer, (QuantizedModule, TrainedModule)) and id(follow) in wanted:
            assert follow is not None
            function = function_of(follow)
            if function in layer.fused_activations and _replaced(follow, function) is None:
                layer.fuse_activation(True)


def _row(
    layer: QuantizedModule | TrainedModule,
    found: Neighbours,
    names: Mapping[int, str],
    only: tuple[str, ...] | None,
) -> FusionReport | None:
    place = (names.get(id(layer), "?"),)
    caller = f"{type(found.caller).__name__}.{found.method}"
    if found.receiver is None:
        functions = _RELU_FUNCTIONS if only == ("relu",) else _FUNCTIONS
        if found.function in functions:
            example = "nn.ReLU" if only == ("relu",) else "such as nn.GELU"
            reason = f"{caller} calls {found.function} itself; a module ({example}) could be fused"
            return FusionReport("activation", place, "", "not fused", reason)
        return None
    follow = found.receiver
    function = function_of(follow)
    if function is None and type(follow).__module__ != "torch.nn.modules.activation":
        return None
    kind = type(follow).__name__ if function is None else function
    what = f"{names.get(id(follow), '?')} ({kind})"
    problem = found.obstacle
    if function is None:
        problem = f"a layer cannot compute {kind}"
    elif layer.activation != "none":
        problem = f"the layer already computes {layer.activation}"
    elif only is not None and function not in only:
        problem = "only ReLU can be fused during training"
    elif function not in layer.fused_activations:
        problem = f"the layer cannot compute {function}"
    problem = problem or _replaced(follow, function) or ""
    if problem:
        return FusionReport("activation", place, what, "not fused", problem)
    layer.fuse_activation(True)
    return FusionReport("activation", place, what, "fused", "")


def function_of(module: nn.Module) -> str | None:
    """The name of the activation function that a module computes, or None.

    Example:
        >>> function_of(nn.SiLU()), function_of(nn.Dropout())
        ('silu', None)
    """
    return module.function if isinstance(module, ReplacedActivation) else activation_of(module)


def _replaced(module: nn.Module, function: str | None) -> str | None:
    """Replace an activation; returns the reason why its class cannot be changed, or None."""
    if isinstance(module, ReplacedActivation) or function is None:
        return None
    try:
        replace_activation_(module, function)
    except TypeError as error:
        return f"the class of the module cannot be changed ({error})"
    return None
