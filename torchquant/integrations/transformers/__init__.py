"""Hugging Face transformers: attention on torchquant's operator, caches, and fused decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchquant.integrations.transformers.decoder_cache import FusedCache
    from torchquant.integrations.transformers.kv_cache import QuantizedCache

__all__ = ["FusedCache", "QuantizedCache"]


def __getattr__(name: str) -> Any:
    # The base classes of these are transformers', which takes seconds to import.
    if name == "FusedCache":
        from torchquant.integrations.transformers.decoder_cache import FusedCache

        return FusedCache
    if name == "QuantizedCache":
        from torchquant.integrations.transformers.kv_cache import QuantizedCache

        return QuantizedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
