"""load: load the file that save wrote into a model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from torchquant.convert.activations import fuse_again
from torchquant.convert.attention import separate
from torchquant.convert.projections import group_again
from torchquant.convert.regions import install
from torchquant.files.buffers import MissingValues
from torchquant.files.entries import current_names
from torchquant.files.fit import check_fit, current_tensors, refusing
from torchquant.files.format import read
from torchquant.files.places import (
    activation_places,
    add_biases,
    checked_activations,
    new_layers,
    norm_places,
)
from torchquant.files.regions import new_regions
from torchquant.files.ties import as_tied, share_again
from torchquant.files.undo import undoing
from torchquant.graph.held import held_modules
from torchquant.graph.modules import owners_by_module, replace_module


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    device: torch.device | str | int | None = None,
) -> nn.Module:
    """Load the file that :func:`save` wrote into a model; layers are quantized as in the file.

    The file is read and checked before the model is changed, and a change that fails is undone.
    After an error the model is unchanged.

    Args:
        path: the file.
        model: the model that was saved, in float or quantized, fused or not. It may be on the meta
            device; this skips the initialisation of weights that would be replaced anyway.
        device: the device for the tensors of the file; None is the CPU. Non-persistent buffers
            that have values keep them and their device, so build the model on that device or on the
            meta device.

    Returns:
        ``model``, changed in place. Tensors have the dtypes of the file and are on ``device``;
        ``requires_grad``, hooks and training mode do not change. Parameters that the model ties
        stay tied.

    Raises:
        TypeError: model is not a module.
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, edited, from a newer torchquant or was not written by
            :func:`save`; it does not fit the model; device is unknown or the meta device; or the
            model has a tensor on the meta device that the file does not hold (an attribute that is
            no buffer, or a non-persistent buffer of a file that an older torchquant wrote).

    Example:
        >>> import tempfile, torchquant
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torchquant.save(nn.Sequential(nn.Linear(64, 64)), f"{folder}/model.safetensors")
        ...     with torch.device("meta"):
        ...         empty = nn.Sequential(nn.Linear(64, 64))
        ...     model = load(f"{folder}/model.safetensors", empty)
        >>> model[0].weight.device
        device(type='cpu')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load: model must be an nn.Module, got {type(model).__name__}")
    path = Path(path)
    target = _checked_device(device)
    tensors, header = read(path)
    buffers = header.get("buffers", {})
    own = {key: value for key, value in tensors.items() if key not in set(buffers.values())}
    state = {**own, **{key: tensors[source] for key, source in header["aliases"].items()}}
    missing = MissingValues(model)
    with refusing(path), undoing(model):
        separate(model, header.get("attentions", []))
        owners = owners_by_module(model)
        held = held_modules(model)
        replaced = new_layers(header, model)
        for old, new in replaced:
            replace_module(owners[id(old)], old, new)
        fused = activation_places(header.get("absorbed", {}), header["layers"], model)
        norms = norm_places(header.get("folded", []), header.get("folded_dimensions", {}), model)
        for place, other in (*fused, *norms):
            for parent, attribute in owners[id(place)]:
                parent._modules[attribute] = other.train(place.training)
        activations = checked_activations(header.get("activations", {}), model)
        regions = new_regions(header.get("regions", {}), model)
        state = current_names(state, model, header["format"])
        add_biases(header.get("folded", []), state, model)
        current = current_tensors(model)
        check_fit(state, current)
        ready = as_tied(state, current, header["layers"], target)
        model.load_state_dict(ready, strict=True, assign=True)
        missing.fill(tensors, buffers, target)
        missing.check(path)
    for old, new in replaced:  # nothing can fail any more
        for reference in held.get(id(old), ()):
            reference.replace(new)
    share_again(model, header["aliases"])
    for region in regions:
        region.settle()
        install(region)
    fuse_again(model, activations)
    group_again(model, header.get("projections", []))
    return model


def _checked_device(device: torch.device | str | int | None) -> torch.device:
    """``device`` as a torch.device; raises if it is unknown or the meta device."""
    try:
        place = torch.device("cpu" if device is None else device)
    except (TypeError, RuntimeError):
        raise ValueError(f"load: device must name one of torch's devices, got {device!r}") from None
    if place.type == "meta":
        raise ValueError("load: device must hold values, got 'meta'; omit it for the CPU")
    return place


__all__ = ["load"]
