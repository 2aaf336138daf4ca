"""The modules that must be replaced in a model before the tensors of a file can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.convert.activations import function_of
from torchquant.files.entries import current_entry, layer_entry
from torchquant.files.fit import Misfit
from torchquant.graph.recognize import activation_of
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.dtypes import dtype_name
from torchquant.nn.folded_norm import BATCH_NORMS, FoldedNorm
from torchquant.nn.fused import FusedActivation
from torchquant.nn.kinds import Kind, kind_named, kind_of

_CHANGING = ("activation",)  # arguments that a verb may have changed after the layer was quantized
_ADDED = ("bias", True, False)  # a layer that a batch norm was folded into has a bias of its own


def new_layers(header: dict[str, Any], model: nn.Module) -> list[tuple[nn.Module, QuantizedModule]]:
    """Create a quantized layer for each layer of the file.

    Returns:
        Pairs of the module in the model and its replacement.

    Raises:
        Misfit: the model has no matching module, or the entry of a layer is not valid.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: dict[int, Any] = {}
    made: list[tuple[nn.Module, QuantizedModule]] = []
    for name, stored in header["layers"].items():
        entry, kind = _entry_and_kind(name, stored, header["format"])
        old = modules.get(name)
        there = isinstance(old, kind.classes)
        if entry.get("dtype", "") is None and old is not None:
            entry["dtype"] = _dtype_of(old)
        if there and layer_entry(old) == entry and not _is_tied(old):  # type: ignore[arg-type]
            continue
        if old is None or name == "" or not (there or _is_float(old, kind)):
            found = "nothing" if old is None else type(old).__name__
            where = repr(name) if name else "the root"
            raise Misfit(
                f"a quantized {kind.name} layer at {where} in the file, {found} in the model"
            )
        if entries.setdefault(id(old), entry) is entry:
            new = _new_layer(name, entry, kind, old, bool(header.get("folded")))
            if header["format"] >= 4:  # older versions untied a bias from the float layer's
                _keep_ties(new, old)
            made.append((old, new))
        elif entries[id(old)] != entry:
            raise Misfit(f"{name!r} is a separate layer in the file, a shared layer in the model")
    return made


def _is_tied(module: Any) -> bool:
    """True for a quantized layer that shares its weight with others, maybe not so in the file."""
    return module.shared_weight is not None


def _is_float(module: nn.Module, kind: Kind) -> bool:
    """True for a float module that the kind's quantized layer can replace."""
    if type(module) in kind.float_types:
        return True
    floating = not isinstance(module, (QuantizedModule, TrainedModule))
    return floating and kind_of(module) is kind and kind.refusal(module) is None


def _dtype_of(module: nn.Module) -> str:
    """The name of the dtype in which a layer works, float or quantized."""
    if isinstance(module, QuantizedModule):
        return dtype_name(module.dtype)
    weight = module._parameters.get("weight")
    return "float32" if weight is None else dtype_name(weight.dtype)


def _entry_and_kind(name: str, stored: Any, format: int) -> tuple[dict[str, Any], Kind]:
    try:
        entry = current_entry(stored, format)
        return entry, kind_named(entry["kind"])
    except (KeyError, TypeError, ValueError) as error:
        raise Misfit(f"the entry of layer {name!r} is not valid ({error})") from None


def activation_places(
    absorbed: Mapping[str, Any], layers: Mapping[str, Any], model: nn.Module
) -> list[tuple[nn.Module, nn.Module]]:
    """Find the activations that are fused in the file or in the model, but not in both.

    Files of prepared models in formats up to 3 name ReLUs that no layer of the file computes.
    Prepared layers leave the ReLU in its place now, so such a ReLU stays.

    Returns:
        Pairs of the module in the model and its replacement.

    Raises:
        Misfit: the model does not have the activation of the file.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, activation in absorbed.items():
        old = modules.get(name)
        if isinstance(old, FusedActivation) and old.activation == activation:
            continue
        original = old.original if isinstance(old, FusedActivation) else old
        found = None if original is None else activation_of(original)
        if old is None or original is None or found is None or found != activation or name == "":
            kind = "nothing" if original is None else type(original).__name__
            raise Misfit(
                f"a fused activation {activation!r} at {name!r} in the file, {kind} in the model"
            )
        if activation == "relu" and not any(e.get("activation") == "relu" for e in layers.values()):
            continue
        places[id(old)] = (old, FusedActivation(activation, original))
    for name, old in modules.items():
        if id(old) in places and name not in absorbed:
            raise Misfit(f"{name!r} is a separate module in the file, a shared module in the model")
        if isinstance(old, FusedActivation) and name not in absorbed:
            places[id(old)] = (old, old.original)
    return list(places.values())


def norm_places(
    folded: Sequence[str], dimensions: Mapping[str, int], model: nn.Module
) -> list[tuple[nn.Module, nn.Module]]:
    """Find the batch norms that became part of a layer in the file, and not in the model.

    Args:
        folded: the names of the batch norms.
        dimensions: the dimensions that the inputs of some of them must have.
        model: the model.

    Returns:
        Pairs of the batch norm in the model and the identity that replaces it.

    Raises:
        Misfit: the model does not have a batch norm of the file.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name in folded:
        old = modules.get(name)
        if isinstance(old, FoldedNorm):
            continue
        if not isinstance(old, BATCH_NORMS) or name == "":
            found = "nothing" if old is None else type(old).__name__
            raise Misfit(f"a batch norm at {name!r} in the file, {found} in the model")
        places[id(old)] = (old, FoldedNorm.in_place_of(old, dimensions.get(name)))
    for name, old in modules.items():
        if id(old) in places and name not in folded:
            raise Misfit(f"{name!r} is a separate module in the file, a shared module in the model")
    return list(places.values())


def add_biases(folded: Sequence[str], state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Give float layers without a bias the bias of the batch norm that became part of them.

    The parameters have no values until the state is loaded.
    """
    if not folded:
        return
    for name, module in model.named_modules():
        value = state.get(f"{name}.bias")
        if value is None or module._parameters.get("bias", value) is not None:
            continue
        weight = module._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        module._parameters["bias"] = nn.Parameter(torch.empty_like(value, device="meta"), trained)


def checked_activations(stored: Any, model: nn.Module) -> set[str]:
    """The names of the activations that the file has replaced.

    Raises:
        Misfit: the model does not have an activation of the file.
    """
    if not isinstance(stored, Mapping):
        raise Misfit(f"activations must be a table, got {type(stored).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, function in stored.items():
        module = modules.get(name)
        if module is None or function_of(module) != function:
            kind = "nothing" if module is None else type(module).__name__
            raise Misfit(f"an activation {function!r} at {name!r} in the file, {kind} in the model")
    return set(stored)


def _new_layer(
    name: str, entry: dict[str, Any], kind: Kind, old: nn.Module, folded: bool
) -> QuantizedModule:
    """Create the layer of an entry on the meta device, which allocates no memory."""
    quantized = kind.class_with(entry.get("format"))
    try:
        # Checked before the layer is created, because torch may fail on an impossible size.
        for argument in quantized.stored:
            there, here = entry[argument], quantized.stored_value(old, argument)
            if argument in _CHANGING or (folded and (argument, there, here) == _ADDED):
                continue
            if (type(there), there) != (type(here), here):
                raise Misfit(
                    f"{name!r} has {argument}={there!r} in the file, {here!r} in the model"
                )
        new = quantized.from_entry(entry)
        new.adopt(old)
    except (KeyError, TypeError, ValueError) as error:
        raise Misfit(f"the entry of layer {name!r} is not valid ({error})") from None
    for own, parameter in new._parameters.items():
        here = old._parameters.get(own)
        if parameter is not None and here is not None:
            parameter.requires_grad_(here.requires_grad)
    return new


def _keep_ties(new: QuantizedModule, old: nn.Module) -> None:
    """Let a new layer have the parameters of the module that it replaces, for example its bias."""
    for name, parameter in new._parameters.items():
        here = old._parameters.get(name)
        if parameter is not None and here is not None and here.shape == parameter.shape:
            new._parameters[name] = here
