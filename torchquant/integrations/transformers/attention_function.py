"""The attention function that is registered with transformers, and the name it has there."""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant._extension import load
from torchquant.integrations.transformers.cached_states import Cached, CachedStates

NAME = "torchquant"
REPLACES = "sdpa"

_fast_attention = load().attention
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Implementation(str):
    """The name in a model's configuration; a copy from another process registers the function."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _registered, ()


def _registered() -> Implementation:
    register()
    return Implementation(NAME)


def cache_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Cached | None:
    """The quantized cache of a call that :func:`torchquant.ops.attention_cached` can serve."""
    if not isinstance(key, CachedStates) or not isinstance(value, CachedStates):
        return None
    served = (
        key.cached is value.cached
        and type(query) is Tensor
        and query.is_cpu
        and query.dtype in _FLOAT_DTYPES
        and query.shape[0] == key.shape[0]
        and (query.shape[2] == 1 or mask is not None)
        and (mask is None or mask.shape[-1] == key.shape[2])
        and not (torch.is_grad_enabled() and query.requires_grad)
        and not torch.compiler.is_dynamo_compiling()
    )
    return key.cached if served else None


def floats(states: Tensor) -> Tensor:
    """The float values of a cache's states; other tensors as they are."""
    return states.floats() if isinstance(states, CachedStates) else states


def register() -> None:
    """Register our function, with the mask that transformers makes for ``sdpa``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        cache: object = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if isinstance(key, CachedStates) or isinstance(value, CachedStates):
            served = not (
                dropout or position_bias is not None or options.get("softcap") is not None
            )
            cached = cache_of(query, key, value, attention_mask) if served else None
            if cached is not None:
                return cached.attention(query, attention_mask, scaling).transpose(1, 2), None
            key, value = floats(key), floats(value)
        if (
            query.shape[2] == 1
            or dropout
            or position_bias is not None
            or cache is not None
            or options.get("softcap") is not None
            or not query.is_cpu
            or query.shape[0] != key.shape[0]
            or query.dtype not in _FLOAT_DTYPES
        ):
            result: tuple[Tensor, None] = sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                cache=cache,
                **options,
            )
            return result
        if attention_mask is not None:
            causal = False  # the mask is causal already
        else:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if type(query) is Tensor and not torch.compiler.is_dynamo_compiling():
            output = _fast_attention(query, key, value, attention_mask, scaling, causal)
        else:
            output = ops.attention(query, key, value, attention_mask, scale=scaling, causal=causal)
        return output.transpose(1, 2), None  # already contiguous in this layout

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
