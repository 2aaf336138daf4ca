"""replace_attention_: a transformers model's attention as one operator.

Beside int8 layers attention is what takes longest. transformers' models look up their attention
function by name in a registry, so no module is replaced and no forward rewritten: the model is told
another name.
"""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant._extension import load

_fast_attention = load().attention
_NAME = "torchquant"
_REPLACES = ("sdpa", _NAME)
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replace_attention_(model: nn.Module) -> None:
    """Make a transformers model compute attention with :func:`torchquant.ops.attention`, in place.

    Queries, keys, values and attention weights are rounded to bfloat16 before they are multiplied.
    For a bfloat16 model that is what it did before; in a float32 model attention gets bfloat16's 8
    bits. It pays on CPUs with AMX; on others torch's own attention is as fast or faster.

    Calls that the operator does not serve are left to transformers' ``sdpa``: a single query (a
    decoding step), dropout in training, position biases, paged caches, other devices.

    To undo it: ``model.set_attn_implementation("sdpa")``. The replacement is not saved: call it
    again after :func:`torchquant.load`.

    Args:
        model: a model of the transformers library whose attention implementation is ``sdpa`` (its
            default).

    Raises:
        TypeError: model is not a transformers model.
        ValueError: its attention implementation is another one, or cannot be set.

    Example:
        >>> replace_attention_(nn.Linear(8, 8))
        Traceback (most recent call last):
        TypeError: replace_attention_: model must be a transformers model, got Linear
    """
    name = type(model).__name__
    if not hasattr(model, "set_attn_implementation") or "transformers" not in sys.modules:
        raise TypeError(f"replace_attention_: model must be a transformers model, got {name}")
    network: Any = model
    current = network.config._attn_implementation
    if current not in _REPLACES:
        raise ValueError(
            f"replace_attention_: model must use attention implementation 'sdpa', got {current!r}; "
            "load it with attn_implementation='sdpa'"
        )
    _register()
    network.set_attn_implementation(_NAME)
    if network.config._attn_implementation != _NAME:
        raise ValueError(f"replace_attention_: {name} cannot change its attention implementation")


def _register() -> None:
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

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
