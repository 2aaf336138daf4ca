"""What a path holds: a GGUF file, or safetensors files in one of three layouts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from torchquant.integrations.checkpoints import awq, compressed_tensors, gguf, gptq
from torchquant.integrations.checkpoints.gptq import layers_with
from torchquant.integrations.checkpoints.stored import (
    DAMAGED,
    UNKNOWN,
    Contents,
    FloatTensor,
    Shapes,
    StoredWeight,
    Unreadable,
)
from torchquant.integrations.checkpoints.tensors import INDEX, TensorFiles, files_of_index

_OURS = "torchquant"  # the key in the metadata of a file that torchquant.save wrote
# Files with the configuration, and the layout that they stand for if they do not name it.
_CONFIGS = (
    ("config.json", None),
    ("quantize_config.json", gptq.NAME),
    ("quant_config.json", awq.NAME),
)
_PICKLES = ("*.bin", "*.pt", "*.pth")


def read_contents(
    path: Path, keys: Iterable[str], shapes: Shapes, modules: Mapping[str, nn.Module]
) -> Contents:
    """What a checkpoint holds for a model; only headers and small tensors are read.

    Args:
        path: a folder or a file.
        keys: the keys of the model's state dict.
        shapes: the shape of each layer of the model.
        modules: the modules of the model.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: the file needs a package that is not installed.
        ValueError: a file is truncated or damaged.
        Unreadable: the checkpoint is of another kind, or does not fit the model.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"load_checkpoint: path must name a folder or a file that exists, got {str(path)!r}"
        )
    paths = _files(path)
    if paths[0].suffix != ".safetensors" and _starts_with(paths[0], gguf.MAGIC):
        return gguf.contents(paths[0], keys)
    files = TensorFiles(paths)
    if _OURS in files.metadata:
        raise Unreadable("torchquant.save wrote it", "use torchquant.load(path, model)")
    config = _config(path if path.is_dir() else path.parent)
    layout = _layout(config, files, shapes)
    try:
        found = Contents(layout, _weights(layout, files, shapes, config, modules))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value of another type
        raise Unreadable(f"its quantization_config is not valid ({error})", DAMAGED) from None
    used = {name for stored in found.weights.values() for name in stored.names}
    for name in files.names:
        if name in used:
            continue
        dtype = files.dtype(name)
        if isinstance(dtype, str):
            raise Unreadable(f"{name} has the dtype {dtype}, which is not read", UNKNOWN)
        if config.get("kv_cache_scheme") and name.endswith(("k_scale", "v_scale")):
            found.ignored[name] = "a scale of a quantized key/value cache"
            continue
        found.floats[name] = FloatTensor(
            files.shape(name), partial(files.get, name), is_floating=dtype.is_floating_point
        )
    if layout == gptq.NAME and not config:
        found.notes.append(
            "The checkpoint has no configuration; qzeros were read as those of version 1 are."
        )
    return found


def _weights(
    layout: str,
    files: TensorFiles,
    shapes: Shapes,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
) -> dict[str, StoredWeight]:
    """The quantized weights in one of the layouts; none in others."""
    if layout == gptq.NAME:
        return gptq.layers(files, shapes, config)
    if layout == awq.NAME:
        return awq.layers(files, shapes, config)
    if layout == compressed_tensors.NAME:
        return compressed_tensors.layers(files, shapes, config, modules)
    return {}


def _files(path: Path) -> list[Path]:
    """The files with tensors."""
    if path.is_file():
        return files_of_index(path) if path.name.endswith(".index.json") else [path]
    index = path / INDEX
    if index.is_file():
        return files_of_index(index)
    found = sorted(path.glob("*.safetensors"))
    whole = [file for file in found if file.name == "model.safetensors"]
    if whole or found:
        return whole or found
    packed = sorted(path.glob("*.gguf"))
    if len(packed) > 1:
        names = ", ".join(file.name for file in packed)
        raise Unreadable(f"the folder has several GGUF files ({names})", "name one of them")
    if packed:
        return packed
    pickles = [file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))]
    remedy = "pass the folder or the file of a checkpoint"
    if pickles:
        remedy = "convert them to safetensors, because pickles can run code"
    raise Unreadable(
        "the folder must have *.safetensors or a *.gguf file, got "
        f"{', '.join(pickles) or 'neither'}",
        remedy,
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _config(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder; empty if there is none."""
    for name, layout in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise Unreadable(f"{name} is damaged ({error})", DAMAGED) from None
        if layout is None:
            values = values.get("quantization_config") or values.get("compression_config")
        if isinstance(values, dict) and values:
            return {**({"quant_method": layout} if layout else {}), **values}
    return {}


def _layout(config: Mapping[str, Any], files: TensorFiles, shapes: Shapes) -> str:
    """The name of the layout; "safetensors" for floats."""
    known = (gptq.NAME, awq.NAME, compressed_tensors.NAME)
    method = config.get("quant_method")
    if method is not None:
        if method not in known:
            raise Unreadable(
                f"quant_method must be one of {', '.join(known)}, got {method!r}", UNKNOWN
            )
        return str(method)
    if any(name.endswith((".weight_packed", ".weight_scale")) for name in files.names):
        if config:
            return compressed_tensors.NAME
        raise Unreadable(
            "its weights are those of compressed-tensors, but config.json with a "
            "quantization_config is missing beside them",
            "copy it from the folder of the checkpoint",
        )
    for name in layers_with(files, "qweight"):
        inputs = shapes.get(name, (0, 0))[1]
        return awq.NAME if files.shape(f"{name}.qweight")[:1] == (inputs,) else gptq.NAME
    return "safetensors"
