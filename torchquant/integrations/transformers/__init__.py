"""Hugging Face transformers: attention on torchquant's operator, and a quantized cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchquant.integrations.transformers.kv_cache import QuantizedCache

__all__ = ["QuantizedCache"]


def __getattr__(name: str) -> Any:
    if name == "QuantizedCache":  # its base class is transformers', which takes seconds to import
        from torchquant.integrations.transformers.kv_cache import QuantizedCache

        return QuantizedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
