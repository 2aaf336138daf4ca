"""The values between two blocks of a model, a tensor for each batch: in memory or in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Between"]


class Between:
    """A tensor for each batch, which the next block reads and then replaces.

    Args:
        folder: an existing folder; the tensors are then mapped files in it, of which the system
            keeps in memory what it has room for. None keeps them in memory.

    Example:
        >>> values = Between()
        >>> values[3] = torch.ones(2)
        >>> 3 in values, 4 in values, values[3]
        (True, False, tensor([1., 1.]))
        >>> values.close()
        >>> 3 in values
        False
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._values: dict[int, Tensor] = {}
        self._devices: dict[int, torch.device] = {}
        self._folder: Any = None
        if folder is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="blocks-", dir=folder)

    def __contains__(self, batch: int) -> bool:
        return batch in self._values

    def __getitem__(self, batch: int) -> Tensor:
        return self._values[batch].to(self._devices[batch])

    def __setitem__(self, batch: int, value: Tensor) -> None:
        value = value.detach()
        self._devices[batch] = value.device
        if self._folder is None or not value.numel():
            self._values[batch] = value
            return
        old = self._values.pop(batch, None)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            del old  # a mapping of the file that is made anew
            path = Path(self._folder.name) / f"{batch}.values"
            path.unlink(missing_ok=True)
            size = value.numel()
            old = torch.from_file(str(path), shared=True, size=size, dtype=value.dtype)
            old = old.view(value.shape)
        old.copy_(value)
        self._values[batch] = old

    def close(self) -> None:
        """Forget the tensors and remove their files."""
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
