"""The tensors of safetensors files by name: described first, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles:
    """The tensors of one checkpoint, in one file or in several.

    Only the headers are read at first. A tensor that :meth:`get` returns is a view of the file in
    memory, so nothing is held of tensors that nobody uses any more.

    Args:
        paths: the files.

    Raises:
        ValueError: a file is truncated or is no safetensors file, or a name occurs twice.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._described: dict[str, tuple[torch.dtype | str, tuple[int, ...]]] = {}
        for path in self.paths:
            try:
                file: Any = safe_open(path, framework="pt")
                self.metadata.update(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118
                    if name in self._open:
                        raise ValueError(f"the tensor {name!r} is in two files")
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    self._described[name] = (_DTYPES.get(dtype, dtype), tuple(part.get_shape()))
                    self._open[name] = file
            except PermissionError:
                raise
            except Exception as error:  # SafetensorError, or torch's error for impossible sizes
                raise ValueError(
                    f"load_checkpoint: {str(path)!r} must be a complete safetensors file, but it "
                    f"is truncated, damaged or of another kind ({error}); fetch it again"
                ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._open)

    def __contains__(self, name: object) -> bool:
        return name in self._open

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype of a tensor; the name of a dtype that no layout here uses."""
        return self._described[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._described[name][1]

    def get(self, name: str) -> Tensor:
        """Read a tensor."""
        found: Tensor = self._open[name].get_tensor(name)
        return found


def files_of_index(index: Path) -> list[Path]:
    """The files that an index of shards names.

    Raises:
        ValueError: the index is damaged, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"load_checkpoint: {str(index)!r} must be an index of safetensors files, but it cannot "
            f"be read ({error})"
        ) from None
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"load_checkpoint: {str(index)!r} names files that must be beside it, but "
            f"{', '.join(missing)} is missing"
        )
    return paths
