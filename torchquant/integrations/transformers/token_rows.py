"""Tokens of a cache in a buffer that grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST_CAPACITY = 64  # tokens of a new buffer


class TokenRows:
    """Rows of tokens in a buffer that grows by half of its size: ``[B, H, tokens, row]``.

    A buffer is written behind the tokens it holds only, so that views of them stay as they are.

    Example:
        >>> rows = TokenRows(torch.zeros(1, 2, 0, 8, dtype=torch.uint8))
        >>> rows.append(torch.ones(1, 2, 3, 8, dtype=torch.uint8))
        >>> rows.tokens, rows.view().shape
        (3, torch.Size([1, 2, 3, 8]))
    """

    def __init__(self, rows: Tensor) -> None:
        self.buffer, self.tokens = rows, rows.shape[2]
        self._first: tuple[Tensor, Tensor] | None = None
        self._fits: tuple[Tensor, tuple[int, int, torch.dtype]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without views of the buffer: a pickle would hold them as tensors of their own."""
        return {**self.__dict__, "_first": None, "_fits": None}

    def fit(self, heads: int, size: int, dtype: torch.dtype) -> bool:
        """True if the rows are those of one sequence on the CPU, of such heads, size and dtype."""
        wanted, buffer = (heads, size, dtype), self.buffer
        if self._fits is not None and self._fits[0] is buffer and self._fits[1] == wanted:
            return True
        batch, own_heads, _, own_size = buffer.shape
        if (batch, own_heads, own_size, buffer.dtype) != (1, *wanted):
            return False
        if not buffer.is_cpu or buffer.requires_grad:
            return False
        self._fits = buffer, wanted
        return True

    def first(self) -> Tensor:
        """The buffer of the first entry of the batch, ``[H, capacity, row]``."""
        if self._first is None or self._first[0] is not self.buffer:
            self._first = self.buffer, self.buffer[0]
        return self._first[1]

    def view(self) -> Tensor:
        """The rows of all tokens."""
        return self.buffer.narrow(2, 0, self.tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens."""
        needed, capacity = self.tokens + tokens, self.buffer.shape[2]
        if needed <= capacity:
            return
        batch, heads, _, size = self.buffer.shape
        capacity = max(needed, capacity + capacity // 2, _LEAST_CAPACITY)
        # Later calls may be outside of inference mode, where its tensors cannot be written.
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(
                (batch, heads, capacity, size), dtype=self.buffer.dtype, device=self.buffer.device
            )
            buffer.narrow(2, 0, self.tokens).copy_(self.view())
        self.buffer = buffer

    def append(self, rows: Tensor) -> None:
        """Add tokens."""
        self.reserve(rows.shape[2])
        # Autograd may have kept views of the buffer. The tokens in them do not change, so this
        # write does not count as a change of the buffer: `data` has a version of its own.
        self.buffer.data.narrow(2, self.tokens, rows.shape[2]).copy_(rows)
        self.tokens += rows.shape[2]

    def without_first(self, tokens: int) -> TokenRows:
        """The rows after the first ones, in a buffer of their own."""
        rest = TokenRows(self.buffer[:, :, :0])
        rest.append(self.view()[:, :, tokens:])
        return rest

    def select(self, entries: Tensor) -> None:
        """Take these entries of the batch."""
        self.buffer = self.view().index_select(0, entries.to(self.buffer.device))
