"""save and load: canonical tensors in safetensors, what they mean as JSON in its metadata.

A file is a plain safetensors file. Its metadata has one key, ``torchquant``, a JSON object::

    {"format": 1, "torchquant": "0.1.0",
     "layers": {"encoder.0": {"in_features": 384, "out_features": 1536, "bias": true,
                              "activation": "none", "config": {"type": ..., ...}}},
     "aliases": {"head.weight": "embedding.weight"},
     "sha256": "..."}

``layers`` names the quantized layers; ``aliases`` the keys that share another key's tensor (stored once);
``sha256`` is over every tensor's name, dtype, shape and bytes, in the order of their names, so that a
truncated or edited file is found out. A reader MUST refuse a ``format`` that it does not know.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchquant.configs import config_from_dict, config_to_dict
from torchquant.nn.linear import QuantizedLinear
from torchquant.quantize import owners_by_module, replace_module

FORMAT = 1
_KEY = "torchquant"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state and the configuration of its quantized layers to one file.

    The file is written beside ``path`` and moved there when complete, so that a crash leaves the old one.

    Args:
        model: any module; quantized layers are stored as int8 with their scales.
        path: usually ``*.safetensors``.

    Raises:
        ValueError: the state dict holds something that is not a tensor, or tensors on the meta device.

    Example:
        >>> import tempfile, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.quantize_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torchquant.save(model, f"{folder}/model.safetensors")
        ...     copy = torchquant.load(f"{folder}/model.safetensors", nn.Sequential(nn.Linear(64, 64)))
        >>> copy[0]
        QuantizedLinear(in_features=64, out_features=64, bias=True, int8 per channel, activations int8 per token)
    """
    import torchquant

    tensors, aliases = _unique_tensors(model.state_dict())
    layers = {
        name: _layer_entry(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
    }
    header = {
        "format": FORMAT,
        "torchquant": torchquant.__version__,
        "layers": layers,
        "aliases": aliases,
        "sha256": _digest(tensors),
    }
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Fill a model from a file that :func:`save` wrote; its float layers become quantized where the file says.

    Everything is read and checked before the model is touched: after an error it is as it was.

    Args:
        path: the file.
        model: the architecture, in float or already quantized; also on the meta device, which skips the
            work of initialising weights that are replaced.

    Returns:
        ``model``, changed in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, edited, foreign or from a newer torchquant, or it does not fit
            the model; the message says which.
    """
    path = Path(path)
    tensors, header = _read(path)
    new_layers = _new_layers(path, header, model)
    state = {**tensors, **{key: tensors[source] for key, source in header["aliases"].items()}}
    _check_fit(path, state, new_layers, model)

    owners = owners_by_module(model)
    for old, new in new_layers:
        replace_module(owners[id(old)], new.train(old.training))
    _assign_state(model, state)
    return model


def _unique_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and which other keys are the same tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_key: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save: the state dict must hold tensors only, got {type(value).__name__} at {key!r}; "
                "modules with get_extra_state() cannot be stored in safetensors"
            )
        if value.is_meta:
            raise ValueError(
                f"save: {key!r} is on the meta device and has no values; load the model first"
            )
        storage = value.untyped_storage().data_ptr() if value.numel() else id(value)
        identity = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if identity in first_key:
            aliases[key] = first_key[identity]
        else:
            first_key[identity] = key
            tensors[key] = value.detach().cpu().contiguous()
    return _unshared(tensors), aliases


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of one storage as tensors of their own: safetensors refuses overlapping memory."""
    seen: set[int] = set()
    for key, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        if value.numel() and storage in seen:
            tensors[key] = value.clone()
        seen.add(storage)
    return tensors


def _layer_entry(layer: QuantizedLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "activation": layer.activation,
        "config": config_to_dict(layer.config),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"load: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"load: {str(path)!r} must be a complete safetensors file; it is truncated, damaged or of "
            f"another kind ({error})"
        ) from None
    if _KEY not in metadata:
        raise ValueError(
            f"load: {str(path)!r} must be a file that torchquant.save wrote; its metadata has no "
            f"{_KEY!r} entry. A plain float checkpoint is loaded with safetensors.torch.load_model"
        )
    return tensors, _parse_header(path, metadata[_KEY], tensors)


def _parse_header(path: Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["format"]
        valid = (
            isinstance(header["layers"], dict)
            and isinstance(header["aliases"], dict)
            and isinstance(header["sha256"], str)
            and all(source in tensors for source in header["aliases"].values())
        )
    except (json.JSONDecodeError, KeyError, TypeError):
        version, valid = FORMAT, False
    if version != FORMAT:
        raise ValueError(
            f"load: {str(path)!r} has format {version}, this torchquant reads format {FORMAT}; "
            "install a newer torchquant"
        )
    if not valid:
        raise ValueError(f"load: {str(path)!r} has damaged torchquant metadata; save the model again")
    if _digest(tensors) != header["sha256"]:
        raise ValueError(
            f"load: {str(path)!r} was changed after it was saved (its checksum does not match); "
            "save the model again"
        )
    return header  # type: ignore[no-any-return]


def _new_layers(
    path: Path, header: dict[str, Any], model: nn.Module
) -> list[tuple[nn.Module, QuantizedLinear]]:
    """(module of the model, quantized layer to put there), for each layer that the file names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, tuple[nn.Module, QuantizedLinear]] = {}
    for name, entry in header["layers"].items():
        old = modules.get(name)
        if not isinstance(old, (nn.Linear, QuantizedLinear)) or name == "":
            found = "nothing" if old is None else type(old).__name__
            raise ValueError(
                f"load: {str(path)!r} has a quantized linear layer at {name!r}, the model has {found} "
                "there; build the model that was saved"
            )
        try:
            features = (entry["out_features"], entry["in_features"])
            if (old.out_features, old.in_features) != features:
                raise ValueError(
                    f"{name!r} is {features[0]} x {features[1]} (out x in) in the file, "
                    f"{old.out_features} x {old.in_features} in the model"
                )
            config = config_from_dict(entry["config"])
            new = QuantizedLinear(
                entry["in_features"],
                entry["out_features"],
                entry["bias"],
                config,
                entry["activation"],
                device="meta",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"load: {str(path)!r} does not fit: {error}") from None
        made.setdefault(id(old), (old, new))
    return list(made.values())


def _check_fit(
    path: Path,
    state: Mapping[str, Tensor],
    new_layers: list[tuple[nn.Module, QuantizedLinear]],
    model: nn.Module,
) -> None:
    """Raise unless the state has exactly the keys, shapes and dtype kinds of the model to be."""
    replaced = {id(old): new for old, new in new_layers}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module = replaced.get(id(module), module)
        prefix = f"{name}." if name else ""
        own = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                wanted[prefix + key] = tuple(tensor.shape)
        if isinstance(module, QuantizedLinear):
            wanted[prefix + "qweight"] = (module.out_features, module.in_features)
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} is {list(state[key].shape)} in the file, {list(shape)} in the model"
        for key, shape in wanted.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if missing or extra or shapes:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(extra)}"] if extra else []
        parts += shapes
        raise ValueError(
            f"load: {str(path)!r} does not fit the model: {'; '.join(parts)}; build the model that was "
            "saved (torchquant.quantize_ is not needed before load)"
        )


def _assign_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the model these tensors, keeping ties: keys that share a tensor share one parameter."""
    parameters: dict[int, nn.Parameter] = {}
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    ready: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in trained:
            if id(tensor) not in parameters:
                parameters[id(tensor)] = nn.Parameter(tensor, requires_grad=trained[key])
            tensor = parameters[id(tensor)]
        ready[key] = tensor
    model.load_state_dict(ready, strict=True, assign=True)
