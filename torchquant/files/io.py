"""save and load: canonical tensors in safetensors, what they mean as JSON in its metadata.

A file is a plain safetensors file. Its metadata has one key, ``torchquant``, a JSON object::

    {"format": 2, "torchquant": "0.1.0",
     "layers": {"encoder.0": {"in_features": 384, "out_features": 1536, "bias": true,
                              "activation": "none", "config": {"type": ..., ...}}},
     "absorbed": {"encoder.1": "gelu"},
     "projections": [["attention.q", "attention.k", "attention.v"]],
     "aliases": {"head.weight": "embedding.weight"},
     "sha256": "..."}

``layers`` names the quantized layers; ``absorbed`` the activation modules that became part of a
layer before them (of its ``activation``) and are identities since; ``projections`` the layers that
are computed together, in the order of their calls, which a reader MAY ignore; ``aliases`` the keys
that share another key's tensor, which is stored once; ``sha256`` is over the rest of this object
and over every tensor's name, dtype, shape and bytes, so that a damaged or edited file is found out
(it is no signature: whoever edits a file can write a new one). Format 1 has neither ``absorbed``
nor ``projections``, and a model that needs neither is written as format 1. A reader MUST refuse a
``format`` that it does not know.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Container, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchquant.configs import config_from_dict, config_to_dict
from torchquant.convert.projections import group_again, groups_of
from torchquant.graph.modules import memory_key, owners_by_module, replace_module
from torchquant.graph.recognize import activation_of
from torchquant.nn.fused import FusedActivation
from torchquant.nn.linear import QuantizedLinear
from torchquant.version import __version__

FORMAT = 2
_PLAIN_FORMAT = 1  # what a model without absorbed modules is written as, for older readers
_KEY = "torchquant"
# Of a quantized layer, beside its qweight; None where it has none.
_LAYER_TENSORS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias")


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state and the configuration of its quantized layers to one file.

    The file is written beside ``path`` and moved there when complete: a crash leaves the old one.

    Args:
        model: any module; quantized layers are stored as int8 with their scales.
        path: usually ``*.safetensors``.

    Raises:
        TypeError: model is not a module.
        ValueError: the state dict holds something that is not a tensor, or tensors on the meta
            device.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.quantize_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors")
        ...     copy = load(f"{folder}/model.safetensors", nn.Sequential(nn.Linear(64, 64)))
        >>> x = torch.randn(2, 64)
        >>> torch.equal(copy(x), model(x))
        True
    """
    _check_model("save", model)
    tensors, aliases = _unique_tensors(model)
    layers = {
        name: _layer_entry(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
    }
    absorbed = {
        name: module.activation
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FusedActivation)
    }
    projections = groups_of(model)
    header = {
        "format": FORMAT if absorbed or projections else _PLAIN_FORMAT,
        "torchquant": __version__,
        "layers": layers,
        **({"absorbed": absorbed} if absorbed else {}),
        **({"projections": projections} if projections else {}),
        "aliases": aliases,
    }
    header["sha256"] = _digest(header, tensors)
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    device: torch.device | str | int | None = None,
) -> nn.Module:
    """Fill a model from a file that :func:`save` wrote; layers become quantized where it says so.

    The file is read and checked before the model is touched, and whatever goes wrong after that is
    undone: after an error the model is as it was.

    Args:
        path: the file.
        model: the architecture, in float or already quantized, fused or not; also on the meta
            device, which skips the work of initialising weights that are replaced.
        device: where the file's tensors go; None is the CPU. Buffers that are in no file stay
            where they are, so build the model on that device or on the meta device.

    Returns:
        ``model``, changed in place: tensors of the file's dtypes, on ``device``; ``requires_grad``,
        hooks and training mode as they were. Parameters that the model ties stay tied.

    Raises:
        TypeError: model is not a module.
        FileNotFoundError: no such file.
        ValueError: the file is truncated, edited, foreign or from a newer torchquant, or it does
            not fit the model; the message says which.

    Warns:
        UserWarning: buffers that are not part of a state dict are still on the meta device.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Sequential(nn.Linear(64, 64)), f"{folder}/model.safetensors")
        ...     with torch.device("meta"):
        ...         empty = nn.Sequential(nn.Linear(64, 64))
        ...     model = load(f"{folder}/model.safetensors", empty)
        >>> model[0].weight.device
        device(type='cpu')
    """
    _check_model("load", model)
    path = Path(path)
    target = _checked_device(device)
    tensors, header = _read(path)
    state = {**tensors, **{key: tensors[source] for key, source in header["aliases"].items()}}
    with _refusing(path), _undoing(model):
        owners = owners_by_module(model)
        for old, new in _new_layers(header, model):
            replace_module(owners[id(old)], old, new)
        for place, other in _activation_places(header.get("absorbed", {}), model):
            for parent, attribute in owners[id(place)]:
                parent._modules[attribute] = other.train(place.training)
        current = _current_tensors(model)
        _check_fit(state, current)
        ready = _as_tied(state, current, header["layers"], target)
        model.load_state_dict(ready, strict=True, assign=True)
    group_again(model, header.get("projections", []))
    _warn_of_missing_buffers(model)
    return model


def _check_model(who: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be an nn.Module, got {type(model).__name__}")


def _checked_device(device: torch.device | str | int | None) -> torch.device:
    """A device that holds values, before anything is read or changed."""
    try:
        place = torch.device("cpu" if device is None else device)
    except (TypeError, RuntimeError):
        raise ValueError(f"load: device must name one of torch's devices, got {device!r}") from None
    if place.type == "meta":
        raise ValueError("load: device must hold values, got 'meta'; leave it out for the CPU")
    return place


# ---------------------------------------------------------------- writing


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and which other keys are the same tensor."""
    tensors: dict[str, Tensor] = {}
    aliases = _repeated_qweights(model)
    first_key: dict[Hashable, str] = {}
    with _qweights_on_cpu(model):
        state = model.state_dict()  # held, so that no memory is used twice
    for key, value in state.items():
        if key in aliases:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save: the state dict must hold tensors only, got {type(value).__name__} at "
                f"{key!r}; modules with get_extra_state() cannot be stored in safetensors"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise ValueError(
                f"save: tensors must be dense, got {key!r} of {value.dtype} and {value.layout}"
            )
        if value.is_meta:
            raise ValueError(
                f"save: tensors must have values, got {key!r} on the meta device; load the model "
                "first"
            )
        first = first_key.setdefault(memory_key(value), key)
        if first != key:
            aliases[key] = first
        else:
            tensors[key] = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return _unshared(tensors), aliases


@contextmanager
def _qweights_on_cpu(model: nn.Module) -> Iterator[None]:
    """While a state dict is made: unpacked on a GPU, they would take a second model's memory."""

    def move(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        key = f"{prefix}qweight"
        if key in state:  # another hook may have taken it out
            state[key] = state[key].cpu()

    handles = [
        module.register_state_dict_post_hook(move)
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and module.packed.is_cuda
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated_qweights(model: nn.Module) -> dict[str, str]:
    """Keys of layers that are registered twice: their qweight is unpacked anew for each name."""
    first_name: dict[int, str] = {}
    aliases = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            first = first_name.setdefault(id(module), name)
            if first != name:
                aliases[_qweight_key(name)] = _qweight_key(first)
    return aliases


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of one storage as tensors of their own: safetensors refuses overlapping memory."""
    seen: set[int] = set()
    for key, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        if value.numel() and storage in seen:
            tensors[key] = value.clone()
        seen.add(storage)
    return tensors


def _qweight_key(layer_name: str) -> str:
    return f"{layer_name}.qweight" if layer_name else "qweight"


def _layer_entry(layer: QuantizedLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "activation": layer.activation,
        "config": config_to_dict(layer.config),
    }


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to; it takes ``path``'s place if all went well."""
    if path.is_dir():
        raise IsADirectoryError(f"save: path must name a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: path must lie in a folder that exists, got {str(path)!r}")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # safetensors' own is for the owner alone
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- reading


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors, which are views of the mapped file, and its metadata, both checked."""
    if not path.is_file():
        raise FileNotFoundError(f"load: path must name a file that exists, got {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except PermissionError:
        raise
    except Exception as error:  # its own SafetensorError, and torch's for sizes that make no sense
        raise ValueError(
            f"load: {str(path)!r} must be a complete safetensors file, it is truncated, damaged or "
            f"of another kind ({error})"
        ) from None
    if _KEY not in metadata:
        raise ValueError(
            f"load: {str(path)!r} must be a file that torchquant.save wrote, its metadata has no "
            f"{_KEY!r} entry; a plain float checkpoint is loaded with safetensors.torch.load_model"
        )
    return tensors, _parse_header(path, metadata[_KEY], tensors)


def _parse_header(path: Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    damaged = f"load: {str(path)!r} has damaged torchquant metadata; save the model again"
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(damaged) from None
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise ValueError(damaged)
    if not _PLAIN_FORMAT <= header["format"] <= FORMAT:
        raise ValueError(
            f"load: {str(path)!r} has format {header['format']}, this torchquant reads formats "
            f"{_PLAIN_FORMAT} to {FORMAT}; install a newer torchquant"
        )
    aliases = header.get("aliases")
    if not (
        isinstance(header.get("layers"), dict)
        and isinstance(header.get("absorbed", {}), dict)
        and _is_list_of_lists_of_names(header.get("projections", []))
        and (header["format"] > _PLAIN_FORMAT or not header.keys() & {"absorbed", "projections"})
        and isinstance(header.get("sha256"), str)
        and isinstance(aliases, dict)
        and all(isinstance(source, str) and source in tensors for source in aliases.values())
        and not aliases.keys() & tensors.keys()
    ):
        raise ValueError(damaged)
    try:
        digest = _digest(header, tensors)
    except (RuntimeError, RecursionError):  # a dtype or a nesting that save never writes
        raise ValueError(damaged) from None
    if digest != header["sha256"]:
        raise ValueError(
            f"load: {str(path)!r} was changed after it was saved (its checksum does not match); "
            "save the model again"
        )
    return header


def _is_list_of_lists_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )


class _Misfit(Exception):
    """The file is sound but does not fit the model; the message says where."""


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (_Misfit, RuntimeError) as error:  # the latter from load_state_dict
        raise ValueError(
            f"load: {str(path)!r} does not fit the model: {error}; build the model that was saved "
            "(torchquant.quantize_ is not needed before load)"
        ) from None


@contextmanager
def _undoing(model: nn.Module) -> Iterator[None]:
    """Put every parameter, buffer and submodule back in its place where the block raises."""
    places = [
        (place, dict(place))
        for module in model.modules()
        for place in (module._parameters, module._buffers, module._modules)
    ]
    try:
        yield
    except BaseException:
        for place, content in places:
            place.clear()
            place.update(content)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # keeps a list beside, which assigning renews
                for name, parameter in list(module._parameters.items()):
                    setattr(module, name, parameter)
        raise


def _new_layers(
    header: dict[str, Any], model: nn.Module
) -> list[tuple[nn.Module, QuantizedLinear]]:
    """(module of the model, quantized layer to put there), for each layer that the file names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: dict[int, Any] = {}
    made: list[tuple[nn.Module, QuantizedLinear]] = []
    for name, entry in header["layers"].items():
        old = modules.get(name)
        if isinstance(old, QuantizedLinear) and _layer_entry(old) == entry:
            continue
        if name == "" or (type(old) is not nn.Linear and not isinstance(old, QuantizedLinear)):
            found = "nothing" if old is None else type(old).__name__
            where = repr(name) if name else "the root"
            raise _Misfit(f"a quantized linear layer at {where} in the file, {found} in the model")
        if entries.setdefault(id(old), entry) is entry:
            made.append((old, _new_layer(name, entry, old)))
        elif entries[id(old)] != entry:
            raise _Misfit(f"{name!r} is a layer of its own in the file, a shared one in the model")
    return made


def _activation_places(
    absorbed: Mapping[str, Any], model: nn.Module
) -> list[tuple[nn.Module, nn.Module]]:
    """(module of the model, module to put there), where an activation is absorbed or no more."""
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
            raise _Misfit(
                f"an activation {activation!r} that the layer before it computes at {name!r} in "
                f"the file, {kind} in the model"
            )
        places[id(old)] = (old, FusedActivation(activation, original))
    for name, old in modules.items():
        if id(old) in places and name not in absorbed:
            raise _Misfit(f"{name!r} is a module of its own in the file, a shared one in the model")
        if isinstance(old, FusedActivation) and name not in absorbed:
            places[id(old)] = (old, old.original)
    return list(places.values())


def _new_layer(name: str, entry: Any, old: nn.Linear | QuantizedLinear) -> QuantizedLinear:
    """An empty layer as the file describes it, on the meta device: nothing is allocated."""
    try:
        shape, has_bias = (entry["out_features"], entry["in_features"]), entry["bias"]
        config, activation = config_from_dict(entry["config"]), entry["activation"]
        if shape != (old.out_features, old.in_features):
            raise _Misfit(
                f"{name!r} is {shape[0]} x {shape[1]} (out x in) in the file, "
                f"{old.out_features} x {old.in_features} in the model"
            )
        if has_bias != (old.bias is not None):
            raise _Misfit(f"{name!r} has {'a' if has_bias else 'no'} bias only in the file")
        new = QuantizedLinear(shape[1], shape[0], has_bias, config, activation, device="meta")
    except (KeyError, TypeError, ValueError) as error:
        raise _Misfit(f"the entry of layer {name!r} is not valid ({error})") from None
    if new.bias is not None and old.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    return new


def _current_tensors(model: nn.Module) -> dict[str, Tensor | None]:
    """What stands in the model at each key of its state dict; None where that is not a tensor.

    Module by module, for a whole state dict would unpack every weight of a quantized model.
    """
    current: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, QuantizedLinear):
            shape = (module.out_features, module.in_features)
            current[prefix + "qweight"] = torch.empty(shape, dtype=torch.int8, device="meta")
            for key in _LAYER_TENSORS:
                if getattr(module, key) is not None:
                    current[prefix + key] = getattr(module, key)
        else:
            module._save_to_state_dict(current, prefix, keep_vars=True)
    # Extra state belongs to its module alone, whatever it is.
    return {
        key: value if isinstance(value, Tensor) and not key.endswith("_extra_state") else None
        for key, value in current.items()
    }


def _check_fit(state: Mapping[str, Tensor], current: Mapping[str, Tensor | None]) -> None:
    """Raise unless the state has exactly the model's keys, shapes, kinds of dtype and ties."""
    missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unknown {', '.join(extra)}"] if extra else []
    first_key: dict[Hashable, str] = {}
    for key, here in current.items():
        if here is None or key not in state:
            continue
        there = state[key]
        if there.shape != here.shape or _kind(there) != _kind(here):
            problems.append(f"{key} is {_describe(there)} in the file, {_describe(here)} here")
        first = first_key.setdefault(memory_key(here), key)
        if first in state and state[first] is not there and not torch.equal(state[first], there):
            problems.append(f"{first} and {key} are two tensors in the file, one here")
    if problems:
        raise _Misfit("; ".join(problems))


def _kind(tensor: Tensor) -> str:
    """Tensors of one kind take each other's place: a file in bfloat16 fits a float32 model."""
    ordinary = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return "float" if tensor.dtype in ordinary else str(tensor.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _as_tied(
    state: Mapping[str, Tensor],
    current: Mapping[str, Tensor | None],
    quantized: Container[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """The state on a device, in memory of its own, each tensor once for all keys that are tied.

    ``.to("meta")`` unties parameters; there the file's ties hold, but for quantized layers, which
    are tied as modules or not at all.
    """
    ready: dict[str, Tensor] = {}
    made: dict[Hashable, Tensor] = {}
    for key, tensor in state.items():
        here = current[key]
        if here is None:
            ready[key] = tensor.to(device, copy=True)
            continue
        layer, _, name = key.rpartition(".")
        untied = here.is_meta and layer not in quantized
        tie = ("file", id(tensor)) if untied else ("model", memory_key(here))
        if tie not in made:
            # A copy, for these are views of the mapped file; a layer packs its qweight into one.
            packs = name == "qweight" and layer in quantized
            own = tensor.to(device, copy=not packs)
            trained = isinstance(here, nn.Parameter)
            made[tie] = nn.Parameter(own, here.requires_grad) if trained else own
        ready[key] = made[tie]
    return ready


def _warn_of_missing_buffers(model: nn.Module) -> None:
    meta = [
        name
        for name, buffer in model.named_buffers()
        if buffer.is_meta and not name.endswith(".packed")
    ]
    if meta:
        warnings.warn(
            "load: every buffer must have values for the model to run, but non-persistent ones are "
            f"in no file and still on the meta device: {', '.join(meta)}; set them, or build the "
            "model on the CPU",
            stacklevel=3,
        )
