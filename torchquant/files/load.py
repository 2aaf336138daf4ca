"""load: load the file that save wrote into a model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from torchquant.convert.activations import fuse_again
from torchquant.convert.projections import group_again
from torchquant.files.entries import current_names
from torchquant.files.fit import check_fit, current_tensors, refusing
from torchquant.files.format import read
from torchquant.files.places import activation_places, checked_activations, new_layers
from torchquant.files.ties import as_tied
from torchquant.files.undo import undoing
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
        device: the device for the tensors of the file; None is the CPU. Non-persistent buffers are
            not saved and keep their device, so build the model on that device or on the meta
            device.

    Returns:
        ``model``, changed in place. Tensors have the dtypes of the file and are on ``device``;
        ``requires_grad``, hooks and training mode do not change. Parameters that the model ties
        stay tied.

    Raises:
        TypeError: model is not a module.
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, edited, from a newer torchquant or was not written by
            :func:`save`; it does not fit the model; or device is unknown or the meta device.

    Warns:
        UserWarning: buffers that are not part of a state dict are still on the meta device.

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
    state = {**tensors, **{key: tensors[source] for key, source in header["aliases"].items()}}
    with refusing(path), undoing(model):
        owners = owners_by_module(model)
        for old, new in new_layers(header, model):
            replace_module(owners[id(old)], old, new)
        for place, other in activation_places(header.get("absorbed", {}), model):
            for parent, attribute in owners[id(place)]:
                parent._modules[attribute] = other.train(place.training)
        activations = checked_activations(header.get("activations", {}), model)
        state = current_names(state, model, header["format"])
        current = current_tensors(model)
        check_fit(state, current)
        ready = as_tied(state, current, header["layers"], target)
        model.load_state_dict(ready, strict=True, assign=True)
    fuse_again(model, activations)
    group_again(model, header.get("projections", []))
    _warn_of_missing_buffers(model)
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


def _warn_of_missing_buffers(model: nn.Module) -> None:
    meta = [
        name
        for name, buffer in model.named_buffers()
        if buffer.is_meta and not name.endswith(".packed")
    ]
    if meta:
        warnings.warn(
            "load: every buffer must have values for the model to run, but these non-persistent "
            f"buffers are not saved and are on the meta device: {', '.join(meta)}; set them, or "
            "build the model on the CPU",
            stacklevel=3,
        )


__all__ = ["load"]
