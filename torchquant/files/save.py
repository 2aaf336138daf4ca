"""save: a model's state and the configuration of its quantized layers, in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from torchquant.convert.projections import groups_of
from torchquant.files.atomic import replacing
from torchquant.files.entries import layer_entry
from torchquant.files.format import FORMAT, KEY, digest
from torchquant.files.ties import unique_tensors
from torchquant.nn.base import QuantizedModule
from torchquant.nn.fused import FusedActivation
from torchquant.version import __version__


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state and the configuration of its quantized layers to one file.

    The file is written next to ``path`` and moved there when it is complete, so a crash leaves
    the old file.

    Args:
        model: any module; quantized layers are stored as int8 with their scales.
        path: usually ``*.safetensors``.

    Raises:
        TypeError: model is not a module.
        ValueError: the state dict holds something that is not a tensor, or tensors on the meta
            device; or a quantized layer belongs to no kind that is registered.
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
    projections = groups_of(model)
    header = {
        "format": FORMAT,
        "torchquant": __version__,
        "layers": layers,
        **({"absorbed": absorbed} if absorbed else {}),
        **({"projections": projections} if projections else {}),
        "aliases": aliases,
    }
    header["sha256"] = digest(header, tensors)
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(header)})


__all__ = ["save"]
