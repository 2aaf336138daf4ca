"""save: write the state of a model and the configuration of its layers to one file."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from torchquant.convert.calibration_hooks import prepared_layers
from torchquant.convert.projections import groups_of
from torchquant.files.atomic import replacing
from torchquant.files.buffers import stored_buffers
from torchquant.files.entries import layer_entry
from torchquant.files.format import KEY, digest, needed_format
from torchquant.files.regions import region_entries
from torchquant.files.ties import unique_tensors
from torchquant.nn.base import QuantizedModule
from torchquant.nn.folded_norm import FoldedNorm
from torchquant.nn.fused import FusedActivation
from torchquant.nn.multihead_attention import MultiheadAttention
from torchquant.nn.replaced_activation import ReplacedActivation
from torchquant.version import __version__


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state of a model and the configuration of its quantized layers to one file.

    The file is written under a temporary name and renamed when it is complete, so a crash does not
    damage an older file. :mod:`torchquant.files.format` describes the format. The observers of a
    model that :func:`torchquant.prepare_` prepared are not stored; a warning says so.

    Args:
        model: any module; quantized layers are stored as integers with their scales, and
            non-persistent buffers are stored for models that are built on the meta device.
        path: usually ``*.safetensors``.

    Raises:
        TypeError: model is not a module.
        ValueError: the state dict holds a value that is not a dense tensor, or a tensor on the meta
            device; or a quantized layer belongs to no registered kind.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.quantize_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/model.safetensors"
        ...     save(model, path)
        ...     copy = torchquant.load(path, nn.Sequential(nn.Linear(64, 64)))
        >>> x = torch.randn(2, 64)
        >>> torch.equal(copy(x), model(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model must be an nn.Module, got {type(model).__name__}")
    prepared = prepared_layers(model)
    if prepared:
        warnings.warn(
            f"save: the file holds no observed ranges, but {len(prepared)} layers are prepared for "
            f"calibration ({', '.join(prepared)}); call convert_(model) before save, or keep the "
            "prepared model with torch.save(model, path)",
            RuntimeWarning,
            stacklevel=2,
        )
    tensors, aliases = unique_tensors(model)
    layers = {
        name: layer_entry(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule)
    }
    absorbed = {
        name: module.activation
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FusedActivation)
    }
    activations = {
        name: module.function
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ReplacedActivation)
    }
    norms = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FoldedNorm) and module.original is None
    }
    dimensions = {name: norm.dimensions for name, norm in norms.items() if norm.dimensions}
    attentions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, MultiheadAttention) and module.was_separated
    ]
    projections = groups_of(model)
    regions = region_entries(model)
    buffers, buffer_keys = stored_buffers(model)
    tensors = {**tensors, **buffers}
    header = {
        "format": needed_format(layers, bool(attentions)),
        "torchquant": __version__,
        "layers": layers,
        **({"absorbed": absorbed} if absorbed else {}),
        **({"activations": activations} if activations else {}),
        **({"folded": [*norms]} if norms else {}),
        **({"folded_dimensions": dimensions} if dimensions else {}),
        **({"attentions": attentions} if attentions else {}),
        **({"projections": projections} if projections else {}),
        **({"regions": regions} if regions else {}),
        **({"buffers": buffer_keys} if buffer_keys else {}),
        "aliases": aliases,
    }
    header["sha256"] = digest(header, tensors)
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(header)})


__all__ = ["save"]
