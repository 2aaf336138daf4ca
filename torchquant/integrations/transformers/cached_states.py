"""The keys and values that a quantized cache hands to a model: read as floats only if they must be.

A transformers model calls its cache, and passes what it returns to its attention function. The
attention of :func:`torchquant.replace_attention_` reads the rows of the cache as they are; every
other function gets ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchquant import ops
from torchquant._extension import load
from torchquant.functional.kv_cache import recent_group_size

_attention_cached = load().attention_cached


@dataclass
class Rows:
    """Rows of the keys (or the values) of one layer: quantized ones, and recent ones in 8 bits.

    Attributes:
        quantized: uint8 ``[batch, heads, tokens, bytes]`` of ``bits`` bits.
        recent: the tokens after those, uint8 ``[batch, heads, tokens, bytes]``, or None.
        channels: of a key (or a value).
        bits, group_size: of the quantized rows.

    Example:
        >>> rows = Rows(ops.quantize_kv(torch.ones(1, 2, 3, 64), 8), None, 64, 8, None)
        >>> rows.shape, rows.floats(torch.bfloat16).dtype
        ((1, 2, 3, 64), torch.bfloat16)
    """

    quantized: Tensor
    recent: Tensor | None
    channels: int
    bits: int
    group_size: int | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the floats."""
        batch, heads, tokens, _ = self.quantized.shape
        if self.recent is not None:
            tokens += self.recent.shape[2]
        return batch, heads, tokens, self.channels

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The values, ``[batch, heads, tokens, channels]``."""
        parts = []
        if self.recent is None or self.quantized.shape[2]:
            parts.append(
                ops.dequantize_kv(
                    self.quantized, self.channels, self.bits, self.group_size, dtype=dtype
                )
            )
        if self.recent is not None:
            group = recent_group_size(self.channels)
            parts.append(ops.dequantize_kv(self.recent, self.channels, 8, group, dtype=dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@dataclass
class Cached:
    """Keys and values of one layer at one time.

    Example:
        >>> rows = Rows(ops.quantize_kv(torch.ones(1, 1, 3, 64), 8), None, 64, 8, None)
        >>> Cached(rows, rows, torch.float32).attention(torch.ones(1, 2, 1, 64), None, None).shape
        torch.Size([1, 2, 1, 64])
    """

    key: Rows
    value: Rows
    dtype: torch.dtype
    _floats: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def states(self) -> tuple[CachedStates, CachedStates]:
        """Keys and values as tensors."""
        return CachedStates(self, self.key), CachedStates(self, self.value)

    def floats(self, rows: Rows) -> Tensor:
        """The values of one of the two, which are kept for the next time."""
        if id(rows) not in self._floats:
            self._floats[id(rows)] = rows.floats(self.dtype)
        return self._floats[id(rows)]

    def attention(self, query: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """:func:`torchquant.ops.attention_cached` of a query."""
        key, value = self.key, self.value
        result: Tensor = _attention_cached(
            query,
            key.quantized,
            value.quantized,
            key.bits,
            key.group_size,
            value.channels,
            key.recent,
            value.recent,
            mask,
            scale,
        )
        return result


class CachedStates(Tensor):
    """The keys or the values of a quantized cache.

    Shape, dtype and device are those of the float tensor and cost nothing; every operation reads
    the float values and returns ordinary tensors. In-place changes do not reach the cache. A cache
    that is cropped afterwards may write over the rows.

    Args:
        cached: keys and values.
        rows: which of the two this is.

    Example:
        >>> rows = Rows(ops.quantize_kv(torch.ones(1, 1, 3, 64), 8), None, 64, 8, None)
        >>> key, value = Cached(rows, rows, torch.float32).states()
        >>> key.shape, type(key + 1)
        (torch.Size([1, 1, 3, 64]), <class 'torch.Tensor'>)
    """

    cached: Cached
    rows: Rows

    @staticmethod
    def __new__(cls, cached: Cached, rows: Rows) -> CachedStates:
        states: CachedStates = Tensor._make_wrapper_subclass(
            cls, rows.shape, dtype=cached.dtype, device=rows.quantized.device
        )
        states.cached, states.rows = cached, rows
        return states

    def floats(self) -> Tensor:
        """The float tensor."""
        return self.cached.floats(self.rows)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **dict(kwargs or {}))
        args, kwargs = tree_map_only(cls, cls.floats, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.floats, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


# Answered from the wrapper.
_ATTRIBUTES = ("device", "dtype", "is_cpu", "is_cuda", "ndim", "shape")
_METHODS = ("__len__", "dim", "is_floating_point", "numel", "size")
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [getattr(Tensor, name) for name in _METHODS]
)
