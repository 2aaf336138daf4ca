"""FusedCache: keys and values that both a step and a model's own forward read and write."""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore,misc,no-any-return"

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from torchquant.functional.kv_cache import kv_row_bytes, recent_group_size
from torchquant.integrations.transformers.decoder_plan import DecoderPlan, States
from torchquant.integrations.transformers.kv_cache import QuantizedCache, QuantizedLayer
from torchquant.integrations.transformers.token_rows import TokenRows


class FusedLayer(DynamicLayer):
    """The keys and values of one block, in buffers that grow.

    It is transformers' ``DynamicLayer``, which copies all tokens when one is added; here a token is
    written behind the others. What ``keys`` and ``values`` returned before stays as it is.

    Args:
        capacity: tokens to make room for at first.

    Example:
        >>> layer = FusedLayer(100)
        >>> keys, values = layer.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))
        >>> keys.shape, layer.get_seq_length(), layer.rows[0].buffer.shape[2]
        (torch.Size([1, 2, 3, 64]), 3, 100)
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.rows: list[TokenRows] = []
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """The keys of all tokens; None before the first ones."""
        return self.rows[0].view() if self.rows else None

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._set(0, states)

    @property
    def values(self) -> Tensor | None:
        """The values of all tokens; None before the first ones."""
        return self.rows[1].view() if self.rows else None

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._set(1, states)

    def _set(self, side: int, states: Tensor | None) -> None:
        if states is None:
            self.rows = []
            return
        rows = TokenRows(states)  # without room: nothing is written behind these tokens
        self.rows = [*self.rows[:side], rows, *self.rows[side + 1 :]]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix the numbers of heads and channels."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = []
        with torch.inference_mode(False):
            for states in (key_states, value_states):
                batch, heads, _, size = states.shape
                empty = torch.empty((batch, heads, 0, size), dtype=self.dtype, device=self.device)
                self.rows.append(TokenRows(empty))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values of all tokens.

        Args:
            key_states, value_states: float ``[batch, heads, tokens, channels]``.
        """
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._in_graph(new)):
            return super().update(key_states, value_states, *args, **kwargs)
        for rows, states in zip(self.rows, new, strict=True):
            rows.reserve(max(states.shape[2], self.capacity - rows.tokens))
            rows.append(states)
        return self.rows[0].view(), self.rows[1].view()

    def _in_graph(self, new: tuple[Tensor, Tensor]) -> bool:
        """True if autograd needs the states as they are."""
        return any(states.requires_grad for states in (*new, *(one.buffer for one in self.rows)))

    def get_seq_length(self) -> int:
        """The number of tokens."""
        return self.rows[0].tokens if self.rows else 0


class FusedCache(DynamicCache):
    """A float cache for models with :func:`torchquant.fuse_decoder_`, and for others.

    It is transformers' ``DynamicCache`` with other layers, which write a token behind the others
    where transformers' layers copy all tokens. A model with a fused decoder gives such layers to a
    ``DynamicCache``, too, such as the one that ``generate`` makes.

    Args:
        capacity: tokens to make room for at first; the buffers grow by half when they are full.

    Raises:
        ValueError: capacity is negative or no integer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> cache = FusedCache(capacity=100)
        >>> ids = torch.ones(1, 4, dtype=torch.int64)
        >>> y = model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        >>> y.shape, cache.get_seq_length()
        (torch.Size([1, 6]), 5)
    """

    def __init__(self, capacity: int = 0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"FusedCache: capacity must be 0 or a positive int, got {capacity!r}")
        super().__init__()
        self.layer_class_to_replicate: Any = functools.partial(FusedLayer, capacity)


def is_served(cache: Any) -> bool:
    """True if the class of a cache is one that steps can use.

    Example:
        >>> is_served(FusedCache()), is_served(DynamicCache(offloading=False)), is_served(None)
        (True, True, False)
    """
    served = type(cache) in (FusedCache, DynamicCache, QuantizedCache)
    return served and not getattr(cache, "offloading", False)


def take(cache: Any, plan: DecoderPlan, new: int) -> States | None:
    """The states of a cache, with room for new tokens; None if a step cannot use the cache.

    A ``DynamicCache`` gets layers of :class:`FusedLayer`, with the tokens that it has.

    Args:
        cache: any cache.
        plan: the blocks whose keys and values it holds.
        new: the number of new tokens.
    """
    if not is_served(cache):
        return None
    if type(cache) is QuantizedCache:
        return _quantized(cache, plan, new)
    layers, count = cache.layers, len(plan.blocks)
    if len(layers) != count or any(type(layer) is not FusedLayer for layer in layers):
        made = _fused(cache, count)
        if made is None:
            return None
        layers = made
    tokens = layers[0].get_seq_length()
    wanted = plan.kv_heads, plan.head_dim, torch.float32
    for layer in layers:
        if not layer.rows:
            empty = torch.empty(
                1, plan.kv_heads, 0, plan.head_dim, dtype=torch.float32, device="cpu"
            )
            layer.lazy_initialization(empty, empty)
        for rows in layer.rows:
            if rows.tokens != tokens or not rows.fit(*wanted):
                return None
    cache.layers[:] = layers  # from here on the cache changes
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in layers:
        for rows, first in zip(layer.rows, (keys, values), strict=True):
            rows.reserve(max(new, layer.capacity - tokens))
            first.append(rows.first())
    return States(keys, values, tokens)


def advance(cache: Any, new: int) -> None:
    """Count the tokens that a step has written."""
    for layer in cache.layers:
        if type(layer) is QuantizedLayer:  # isinstance of an abstract class takes 0.5 us
            for parts in layer.parts():
                parts[-1].tokens += new
            layer.quantize_old()
        else:
            for rows in layer.rows:
                rows.tokens += new


def _fused(cache: Any, count: int) -> list[FusedLayer] | None:
    """Layers with the tokens of a cache's layers; None if these do more than hold tokens."""
    layers = list(cache.layers)
    if len(layers) > count or any(type(one) not in (FusedLayer, DynamicLayer) for one in layers):
        return None
    make = cache.layer_class_to_replicate
    capacity = make.args[0] if isinstance(make, functools.partial) else 0
    made = []
    for index in range(count):
        layer = layers[index] if index < len(layers) else FusedLayer(capacity)
        if type(layer) is DynamicLayer:
            layer = FusedLayer()
            if layers[index].get_seq_length():
                layer.update(layers[index].keys.detach(), layers[index].values.detach())
        made.append(layer)
    return made


def _quantized(cache: QuantizedCache, plan: DecoderPlan, new: int) -> States | None:
    count = len(plan.blocks)
    layers: list[Any] = list(cache.layers)
    if len(layers) > count or any(type(one) is not QuantizedLayer for one in layers):
        return None
    make: Any = cache.layer_class_to_replicate
    layers += [make() for _ in range(count - len(layers))]
    tokens = layers[0].get_seq_length()
    group_size = cache.group_size or recent_group_size(plan.head_dim)
    for layer in layers:
        if not layer.is_initialized:
            empty = torch.empty(
                1, plan.kv_heads, 0, plan.head_dim, dtype=torch.float32, device="cpu"
            )
            layer.lazy_initialization(empty, empty)
        if layer.get_seq_length() != tokens:
            return None
        row = kv_row_bytes(plan.head_dim, layer.bits, group_size)
        for parts in layer.parts():
            if not parts[0].fit(plan.kv_heads, row, torch.uint8):
                return None
    cache.layers[:] = layers  # from here on the cache changes
    sides: list[list[Tensor]] = [[], [], [], []]
    for layer in layers:
        if new == 1:  # a prompt sees all of its own tokens in 8 bits
            layer.quantize_old(new)
        both = layer.parts()
        for place, parts in enumerate(both):
            parts[-1].reserve(new)
            for side, rows in zip(sides[place::2], parts, strict=False):
                side.append(rows.first())
    first = layers[0].parts()[0]
    held = States(sides[0], sides[1], first[0].tokens, cache.bits, group_size)
    if len(first) == 1:
        return held
    return replace(held, recent_keys=sides[2], recent_values=sides[3], recent=first[1].tokens)
