"""Values that a state dict omits: non-persistent buffers, and tensors that are plain attributes.

A model that was built on the CPU has them already. A model on the meta device has none, and torch
does not always notice: indices without values select rows at random. So files store non-persistent
buffers, and :func:`torchquant.load` refuses a model in which a tensor still has no values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.files.fit import Misfit
from torchquant.nn.base import QuantizedModule

_PREFIX = "buffers/"  # of the key in a file; a name in a state dict never begins with it
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_NOT_DATA = (nn.Module, type, ModuleType, FunctionType)
_DEPTH = 3  # of lists, dictionaries and plain objects in which tensors are looked for


def stored_buffers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The non-persistent buffers to store.

    Returns:
        The tensors by key, equal ones once; and the key of each buffer, by the buffer's name. A
        buffer that cannot be stored (sparse, or of a rare dtype) is left out.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    known: dict[Any, str] = {}
    for name, value in _non_persistent(model):
        dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if not dense or value.dtype not in (*_FLOATS, *_INTEGERS):
            continue
        copy = value.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()
        data = hashlib.sha256(copy.reshape(-1).view(torch.uint8).numpy().data).digest()
        key = known.setdefault((copy.dtype, copy.shape, data), f"{_PREFIX}{name}")
        keys[name] = key
        tensors.setdefault(key, copy)
    return tensors, keys


class MissingValues:
    """The tensors of a model that have no values before a file is loaded.

    Args:
        model: the model before anything in it is changed.

    Example:
        >>> MissingValues(nn.Linear(4, 4)).fill({}, {}, torch.device("cpu"))
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Parameters and buffers on the meta device: the tensor, and where it is registered. A
        # plain attribute may be one of these tensors.
        self._registered = {
            id(value): (value, place, name)
            for module in model.modules()
            for place in (module._parameters, module._buffers)
            for name, value in place.items()
            if value is not None and value.is_meta
        }

    def fill(
        self, tensors: Mapping[str, Tensor], keys: Mapping[str, str], device: torch.device
    ) -> None:
        """Give non-persistent buffers without values the values of the file.

        Raises:
            Misfit: a buffer of the file has another shape or dtype than the model's.
        """
        made: dict[int, Tensor] = {}  # a buffer that is registered twice stays one tensor
        for module_name, module in self.model.named_modules(remove_duplicate=False):
            for name in _names(module):
                value = module._buffers[name]
                full = f"{module_name}.{name}" if module_name else name
                if value is None or not value.is_meta or full not in keys:
                    continue
                stored = tensors[keys[full]]
                if stored.shape != value.shape or _kind(stored) != _kind(value):
                    raise Misfit(
                        f"buffer {full} is {_describe(stored)} in the file, {_describe(value)} in "
                        "the model"
                    )
                if id(value) not in made:
                    made[id(value)] = stored.to(device, copy=True)
                module._buffers[name] = made[id(value)]

    def check(self, path: Path) -> None:
        """Raise if a tensor of the model has no values now.

        Plain attributes that were parameters or buffers get the tensor that replaced them.

        Raises:
            ValueError: the message names the tensors; nothing was changed by this method.
        """
        missing = [n for n, value in _registered(self.model) if value.is_meta]
        renewed = []
        for module_name, module in self.model.named_modules():
            for name, value in _plain(module):
                full = f"{module_name}.{name}" if module_name else name
                _, place, own = self._registered.get(id(value), (None, {}, ""))
                new = place.get(own)
                if new is not None and not new.is_meta and name in vars(module):
                    renewed.append((module, name, new))
                else:
                    missing.append(full)
        if missing and self._registered:  # otherwise the model was built with values
            raise ValueError(
                f"load: every tensor must have values afterwards, but {str(path)!r} does not hold "
                f"{', '.join(missing)}, and the model has them on the meta device; build the model "
                "on the CPU, or under accelerate.init_empty_weights(), which leaves buffers on the "
                "CPU"
            )
        for module, name, new in renewed:
            vars(module)[name] = new


def _names(module: nn.Module) -> Iterator[str]:
    if isinstance(module, QuantizedModule):  # its file holds canonical tensors instead
        return
    yield from (name for name in module._buffers if name in module._non_persistent_buffers_set)


def _non_persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name in _names(module):
            value = module._buffers[name]
            if value is not None:
                yield (f"{module_name}.{name}" if module_name else name), value


def _registered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors on the meta device that are attributes of a module but not registered in it."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from _inside(name, value, _DEPTH)


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_meta:
            yield name, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _inside(f"{name}[{index}]", item, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(f"{name}[{key!r}]", item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, _NOT_DATA):
        for key, item in vars(value).items():
            yield from _inside(f"{name}.{key}", item, depth - 1)


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else str(tensor.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
