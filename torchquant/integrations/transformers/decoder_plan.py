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
class BlockStates:
    """The keys and values of one block, of one sequence.

    A step writes the keys and values of new tokens behind those that are there, in place.

    Attributes:
        keys, values: float32 ``[kv_heads, capacity, head_dim]``; or rows of
            :func:`torchquant.ops.quantize_kv`, uint8 ``[kv_heads, capacity, bytes]``.
        bits, group_size: of these rows; bits is None for floats.
        older_keys, older_values: rows of the tokens before those in ``keys`` and ``values``, of
            ``older_bits`` and ``older_group_size``, uint8 ``[kv_heads, tokens, bytes]``; or None.
            ``keys`` and ``values`` then hold recent tokens, in 8 bits.
    """

    keys: Tensor
    values: Tensor
    bits: int | None = None
    group_size: int | None = None
    older_keys: Tensor | None = None
    older_values: Tensor | None = None
    older_bits: int = 4
    older_group_size: int | None = None


def decode_reference(
    plan: DecoderPlan,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    states: Sequence[BlockStates],
    position: int,
) -> Tensor:
    """Run all blocks for M new tokens of one sequence.

    Args:
        plan: the blocks.
        hidden: float32 ``[M, hidden_size]``, M at least 1.
        cos, sin: the rotary embedding at the tokens' positions, float32 ``[M, head_dim]``.
        states: keys and values of each block, with room for the new tokens.
        position: the number of tokens in ``keys`` and ``values`` of each block.

    Returns:
        float32 ``[M, hidden_size]``: what enters the final norm.
    """
    for block, own in zip(plan.blocks, states, strict=True):
        attended = _attention(plan, block, block.input_norm(hidden), cos, sin, own, position)
        hidden = hidden + _linear(block.output, attended)
        normed = block.post_norm(hidden)
        gate, up = _linear(block.gate, normed), _linear(block.up, normed)
        gated = ops.gated_activation(gate, up, plan.activation)
        hidden = hidden + _linear(block.down, gated)
    return hidden


def _attention(
    plan: DecoderPlan,
    block: DecoderBlock,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    states: BlockStates,
    position: int,
) -> Tensor:
    def heads_of(layer: Any, count: int, norm: Norm | None) -> Tensor:
        heads = _linear(layer, normed).view(-1, count, plan.head_dim)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    query = rotate(heads_of(block.query, plan.heads, block.query_norm), cos, sin)
    key = rotate(heads_of(block.key, plan.kv_heads, block.key_norm), cos, sin)
    value = heads_of(block.value, plan.kv_heads, None)
    end = position + normed.shape[0]
    for place, new in ((states.keys, key), (states.values, value)):
        rows = new if states.bits is None else ops.quantize_kv(new, states.bits, states.group_size)
        place[:, position:end] = rows
    result = _attend(plan, query, states, end)
    return result.transpose(0, 1).reshape(-1, plan.heads * plan.head_dim)


def _attend(plan: DecoderPlan, query: Tensor, states: BlockStates, end: int) -> Tensor:
    keys, values = states.keys[:, :end], states.values[:, :end]
    if states.bits is None:
        return causal_attention(query, keys, values, plan.scale)
    older_keys, older_values, recent = states.older_keys, states.older_values, {}
    bits, group_size, tokens = states.bits, states.group_size, end
    if older_keys is not None and older_values is not None:
        recent = {"recent_key": keys[None], "recent_value": values[None]}
        keys, values = older_keys, older_values
        bits, group_size = states.older_bits, states.older_group_size
        tokens += keys.shape[1]
    new = query.shape[1]
    mask = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new) if new > 1 else None
    return ops.attention_cached(
        query[None],
        keys[None],
        values[None],
        bits,
        group_size,
        mask=mask,
        scale=plan.scale,
        **recent,
    )[0]


def _linear(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer.linear(x, layer.bias)
    return result
