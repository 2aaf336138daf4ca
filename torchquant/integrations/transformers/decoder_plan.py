"""What a decoder computes for new tokens, and with what: the plan of a step, and its meaning.

A step runs all blocks of a decoder such as Llama's for the new tokens of one sequence: norm, query,
key and value projections, rotary embedding, attention to the cache, output projection, norm, gated
feed-forward layer. :func:`decode_reference` composes it of operators; it is the specification of
``_C.Decoder``, which has its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchquant import ops
from torchquant.functional.decoder import causal_attention, rotate
from torchquant.functional.kv_cache import recent_group_size


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``.

    Example:
        >>> Norm(torch.tensor([1.0, 2.0]), 0.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 2.2627]])
    """

    weight: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return ops.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class DecoderBlock:
    """One block of a decoder.

    Attributes:
        input_norm: the norm before the attention.
        query, key, value, output: the attention's projections, quantized linear layers.
        query_norm, key_norm: norms of each head's queries and keys, or None.
        post_norm: the norm before the feed-forward layers.
        gate, up, down: the gated feed-forward layers, quantized linear layers.
    """

    input_norm: Norm
    query: Any
    key: Any
    value: Any
    output: Any
    query_norm: Norm | None
    key_norm: Norm | None
    post_norm: Norm
    gate: Any
    up: Any
    down: Any

    @property
    def layers(self) -> tuple[Any, ...]:
        """The seven linear layers, in the order of their calls."""
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down


@dataclass(frozen=True)
class DecoderPlan:
    """The blocks of a decoder.

    Attributes:
        blocks: in the order of their calls.
        heads, kv_heads: the numbers of heads of queries, and of keys and values.
        head_dim: channels of a head.
        scale: multiplies the attention's scores.
        activation: the function of the gate, a name in ``functional.ACTIVATIONS``.
        final_norm: the norm after the last block; not part of the step.
    """

    blocks: tuple[DecoderBlock, ...]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    activation: str
    final_norm: Norm


@dataclass(frozen=True)
class States:
    """The keys and values of one sequence, with room for new tokens in every block.

    A step writes the keys and values of new tokens in place, behind those that are there.

    Attributes:
        keys, values: one tensor for each block: float32 ``[kv_heads, capacity, head_dim]`` if
            ``bits`` is 32, or rows of :func:`torchquant.ops.quantize_kv`, uint8
            ``[kv_heads, capacity, bytes]``.
        position: the number of tokens in them.
        bits, group_size: of these rows.
        recent_keys, recent_values: rows in 8 bits of the tokens after those, or None. New tokens
            belong to them; ``keys`` and ``values`` are only read.
        recent: the number of tokens in ``recent_keys``.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    position: int
    bits: int = 32
    group_size: int | None = None
    recent_keys: Sequence[Tensor] | None = None
    recent_values: Sequence[Tensor] | None = None
    recent: int = 0


def decode_reference(
    plan: DecoderPlan, hidden: Tensor, cos: Tensor, sin: Tensor, states: States
) -> Tensor:
    """Run all blocks for M new tokens of one sequence.

    Args:
        plan: the blocks.
        hidden: float32 ``[M, hidden_size]``, M at least 1.
        cos, sin: the rotary embedding at the tokens' positions, float32 ``[M, R]``, R even and at
            most ``head_dim``.
        states: the tokens before; the keys and values of the new tokens are written.

    Returns:
        float32 ``[M, hidden_size]``: what enters the final norm.
    """
    for index, block in enumerate(plan.blocks):
        heads = projections(plan, block, hidden, cos, sin)
        attended = _attention(plan, *heads, states, index)
        hidden = hidden + _linear(block.output, attended)
        normed = block.post_norm(hidden)
        gate, up = _linear(block.gate, normed), _linear(block.up, normed)
        gated = ops.gated_activation(gate, up, plan.activation)
        hidden = hidden + _linear(block.down, gated)
    return hidden


def projections(
    plan: DecoderPlan, block: DecoderBlock, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[heads, M, D]``, keys and values ``[kv_heads, M, D]`` of a block's input."""
    normed = block.input_norm(hidden)

    def heads_of(layer: Any, count: int, norm: Norm | None) -> Tensor:
        heads = _linear(layer, normed).view(-1, count, plan.head_dim)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    return (
        rotate(heads_of(block.query, plan.heads, block.query_norm), cos, sin),
        rotate(heads_of(block.key, plan.kv_heads, block.key_norm), cos, sin),
        heads_of(block.value, plan.kv_heads, None),
    )


def _attention(
    plan: DecoderPlan, query: Tensor, key: Tensor, value: Tensor, states: States, index: int
) -> Tensor:
    """The output of all heads, ``[M, heads * head_dim]``."""
    old, new = states.position, query.shape[1]
    keys, values = states.keys[index], states.values[index]
    recent: dict[str, Any] = {}
    if states.recent_keys is not None and states.recent_values is not None:
        recents = states.recent_keys[index], states.recent_values[index]
        end = states.recent + new
        for place, floats in zip(recents, (key, value), strict=True):
            group_size = recent_group_size(plan.head_dim)
            place[:, states.recent : end] = ops.quantize_kv(floats, 8, group_size)
        recent = {
            "recent_key": recents[0][None, :, :end],
            "recent_value": recents[1][None, :, :end],
        }
        tokens = old + end
    else:
        tokens = old + new
        for place, floats in ((keys, key), (values, value)):
            quantized = states.bits != 32
            rows = ops.quantize_kv(floats, states.bits, states.group_size) if quantized else floats
            place[:, old:tokens] = rows
        old = tokens
    if states.bits == 32:
        result = causal_attention(query, keys[:, :old], values[:, :old], plan.scale)
    else:
        result = ops.attention_cached(
            query[None],
            keys[None, :, :old],
            values[None, :, :old],
            states.bits,
            states.group_size,
            mask=torch.ones(new, tokens, dtype=torch.bool, device=query.device).tril(tokens - new),
            scale=plan.scale,
            **recent,
        )[0]
    return result.transpose(0, 1).reshape(-1, plan.heads * plan.head_dim)


def _linear(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer.linear(x, layer.bias)
    return result
