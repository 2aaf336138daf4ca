"""A folder with what a walk has found so far, from which another walk continues.

Each stage of a walk is a safetensors file, which is complete or absent. The file ``walk.json`` says
for which model, configuration and data the results are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchquant.algorithms.found import Found
from torchquant.files.atomic import replacing

__all__ = ["Results", "checksum", "differences", "fingerprint"]

_INDEX = "walk.json"
_FORMAT = 1


def checksum(tensors: Iterable[Tensor], total: int = 0) -> int:
    """A number that differs for tensors with other shapes, dtypes or values.

    Args:
        tensors: the tensors.
        total: the number of what comes before them.

    Example:
        >>> checksum([torch.zeros(2)]) == checksum([torch.zeros(2, 1)])
        False
    """
    for tensor in tensors:
        total = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        memory: Any = values.numpy()
        total = zlib.crc32(memory, total)
    return total


def fingerprint(
    model: nn.Module, batches: Sequence[Any], config: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What results depend on, as JSON values.

    Example:
        >>> found = fingerprint(nn.ReLU(), [torch.ones(1)], None, {"damping": 0.01})
        >>> found["batches"], found["options"]
        (1, "{'damping': 0.01}")
    """
    state = [*model.named_parameters(), *model.named_buffers()]
    return {
        "format": _FORMAT,
        "names": zlib.crc32("\n".join(name for name, _ in state).encode()),
        "values": checksum(tensor for _, tensor in state),
        "batches": len(batches),
        "data": _content(batches, 0),
        "config": repr(config),
        "options": repr(dict(options)),
    }


def _content(value: Any, total: int) -> int:
    """A number that differs for batches with other tensors, arrays, texts or numbers."""
    if isinstance(value, Tensor):
        return checksum([value], total)
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        return zlib.crc32(repr(value).encode(errors="backslashreplace"), total)
    total = zlib.crc32(type(value).__qualname__.encode(), total)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        total = zlib.crc32(f"{value.dtype} {value.shape}".encode(), total)
        return zlib.crc32(value.tobytes(), total)
    if isinstance(value, Mapping):
        parts: Iterable[Any] = (part for item in value.items() for part in item)
    elif isinstance(value, (Sequence, np.ndarray)):
        parts = value
    elif is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value))
    else:  # of an image the pixels
        pixels = getattr(value, "tobytes", None)
        return zlib.crc32(pixels(), total) if callable(pixels) else total
    for part in parts:
        total = _content(part, total)
    return total


_WORDS = {
    "format": "version of the files",
    "names": "names of the model's tensors",
    "values": "values of the model's tensors",
    "batches": "number of batches",
    "data": "values of the batches",
    "config": "configuration",
    "options": "arguments of the verb",
}


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In words, what differs between the models and the data of two fingerprints.

    Example:
        >>> one, two = (fingerprint(nn.ReLU(), [value], None, {}) for value in (1, 2))
        >>> differences(one, two)
        ['values of the batches']
    """
    keys = ("names", "values", "batches", "data")
    return [_WORDS[key] for key in keys if first[key] != other[key]]


class Results:
    """The results of a walk in a folder.

    Args:
        who: the verb, with which messages start.
        folder: the folder; it is made if it does not exist.
        identity: what the results depend on; see :func:`fingerprint`.

    Raises:
        ValueError: the folder has results of another model, configuration or data, or holds
            something else; the path names a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = Results("verb", Path(folder), {"batches": 1})
        ...     results.save({"fc": Found(None, "rounded", "saw 3 inputs")})
        ...     again = Results("verb", Path(folder), {"batches": 1})
        ...     print(again.load(["fc"])["fc"].reason, again.load(["head"]))
        saw 3 inputs None
    """

    def __init__(self, who: str, folder: Path, identity: Mapping[str, Any]) -> None:
        self.who, self.folder = who, folder
        index = folder / _INDEX
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{who}: resume must name a folder, got the file {str(folder)!r}")
        if not index.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(
                    f"{who}: resume must name a folder of an interrupted call, or a new or empty "
                    f"one, got {str(folder)!r} with other files"
                )
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(index) as path:
                path.write_text(json.dumps(dict(identity), indent=2))
            return
        try:
            found = json.loads(index.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{who}: {str(index)!r} must hold JSON, but it is damaged; remove it")
        other = [_WORDS[key] for key, value in identity.items() if found.get(key) != value]
        if other:
            raise ValueError(
                f"{who}: resume must name a folder of a call with the same model, data and "
                f"arguments, got {str(folder)!r} with other {', '.join(other)}; pass another folder"
            )

    def load(self, names: Sequence[str]) -> dict[str, Found] | None:
        """What was found for layers, or None if they are not done."""
        path = self._path(names)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                entries = json.loads(file.metadata()["found"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.who}: the results in {str(path)!r} must be complete, but the file is "
                f"damaged ({error}); remove it, and its layers are compressed again"
            ) from error
        if [*entries] != [*names]:
            return None
        return {
            name: Found.of(entry, _below(tensors, f"{name}/")) for name, entry in entries.items()
        }

    def save(self, found: Mapping[str, Found]) -> None:
        """Keep what was found for layers."""
        tensors = {
            f"{name}/{key}": value.cpu().contiguous()
            for name, one in found.items()
            for key, value in one.tensors().items()
        }
        entries = {name: one.entry() for name, one in found.items()}
        with replacing(self._path([*found])) as path:
            save_file(tensors, path, {"found": json.dumps(entries)})

    def _path(self, names: Sequence[str]) -> Path:
        number = zlib.crc32("\n".join(names).encode())
        return self.folder / f"{number:08x}.safetensors"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
