"""QuantizedCache: a transformers cache whose keys and values are stored in 8 or 4 bits."""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore,misc,override,arg-type"
# mypy: disable-error-code="union-attr,no-any-return"

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise ImportError(
        "QuantizedCache: transformers must have caches of layers (4.56 or newer), got "
        f"{transformers.__version__}; pip install -U transformers"
    ) from error

from torchquant import ops
from torchquant.functional.kv_cache import kv_row_bytes, recent_group_size
from torchquant.integrations.transformers.cached_states import Cached, Rows
from torchquant.integrations.transformers.token_rows import TokenRows


class QuantizedLayer(CacheLayerMixin):
    """The keys and values of one layer of a :class:`QuantizedCache`.

    Args:
        bits, group_size, recent: those of the cache.

    Example:
        >>> layer = QuantizedLayer(8, None, 0)
        >>> keys, values = layer.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))
        >>> keys.shape, layer.get_seq_length()
        (torch.Size([1, 2, 3, 64]), 3)
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, bits: int, group_size: int | None, recent: int) -> None:
        self.bits, self.group_size, self.recent = bits, group_size, recent
        self.is_initialized = False
        self._sides: tuple[_Side, _Side] | None = None

    @property
    def keys(self) -> Tensor | None:
        """The keys as floats; None before the first update."""
        return self._sides and self._sides[0].rows().floats(self.dtype)

    @property
    def values(self) -> Tensor | None:
        """The values as floats; None before the first update."""
        return self._sides and self._sides[1].rows().floats(self.dtype)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix the numbers of heads and channels."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._sides = tuple(  # type: ignore[assignment]
            _Side(states, self.bits, self.group_size, self.recent > 0)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values of all tokens, as the cache holds them.

        Args:
            key_states, value_states: float ``[batch, heads, tokens, channels]``.

        Raises:
            TypeError: the states are not float32, bfloat16 or float16.
            ValueError: the shapes do not fit each other or the cache, which stays as it was.
        """
        if torch.compiler.is_compiling():
            return self._update_outside_of_graphs(key_states, value_states)
        self._add(key_states, value_states)
        assert self._sides is not None
        lazy = key_states.shape[2] == 1
        if lazy:
            self.quantize_old()
        key, value = (side.rows() for side in self._sides)
        if lazy:
            return Cached(key, value, self.dtype).states()
        states = key.floats(self.dtype), value.floats(self.dtype)
        self.quantize_old()
        return states

    @torch.compiler.disable
    def _update_outside_of_graphs(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.update(key, value)
        return keys + 0, values + 0  # ordinary tensors

    def _add(self, key: Tensor, value: Tensor) -> None:
        for name, states in (("key_states", key), ("value_states", value)):
            if states.dim() != 4 or states.shape[:3] != key.shape[:3]:
                raise ValueError(
                    f"QuantizedCache: {name} must be [batch, heads, tokens, channels], with the "
                    f"key_states' batch, heads and tokens, got {list(states.shape)} beside "
                    f"{list(key.shape)}"
                )
        fresh = self.get_seq_length() == 0
        if fresh:
            self.lazy_initialization(key, value)
        assert self._sides is not None
        try:
            rows = [
                side.quantized_rows(states, name)
                for side, states, name in zip(
                    self._sides, (key, value), ("key_states", "value_states"), strict=True
                )
            ]
        except (TypeError, ValueError):
            if fresh:
                self.reset()
            raise
        for side, new in zip(self._sides, rows, strict=True):
            side.newest().append(new)
        self.dtype = key.dtype

    def parts(self) -> tuple[list[TokenRows], list[TokenRows]]:
        """Rows of the keys and of the values: quantized ones, and recent ones if there are any."""
        assert self._sides is not None, "lazy_initialization comes first"
        return self._sides[0].parts(), self._sides[1].parts()

    def quantize_old(self, new: int = 0) -> None:
        """Move tokens that are no longer recent to the quantized rows.

        Which ones follows from the number of tokens alone: a cache holds the same rows however its
        tokens were added.

        Args:
            new: the number of tokens that are about to be added.
        """
        if not self.recent or self._sides is None:
            return
        old = ((self.get_seq_length() + new) // self.recent - 1) * self.recent
        for side in self._sides:
            side.quantize_first(old - side.quantized.tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys and their offset, for the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """The number of tokens."""
        return 0 if self._sides is None else self._sides[0].tokens

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of a token of one sequence; 0 before the first update."""
        return 0 if self._sides is None else sum(side.bytes_per_token for side in self._sides)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are in use."""
        parts = [part for side in self._sides or () for part in side.parts()]
        return sum(part.view().numel() for part in parts)

    def reset(self) -> None:
        """Forget all tokens."""
        self._sides = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: the negative number of tokens, as in transformers' own caches.

        Raises:
            ValueError: it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "QuantizedCache: tokens_to_remove must be 0 or negative, got "
                f"{tokens_to_remove}; crop(-n) removes n tokens"
            )
        for side in self._sides or ():
            rest = -tokens_to_remove
            for part in reversed(side.parts()):
                removed = min(rest, part.tokens)
                part.tokens -= removed
                rest -= removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take entries of the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these entries of the batch."""
        for side in self._sides or ():
            for part in side.parts():
                part.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every entry of the batch."""
        if self._sides is not None:
            batch = self._sides[0].quantized.buffer.shape[0]
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Not used: a quantized cache stays on its device."""

    def prefetch(self) -> None:
        """Not used: a quantized cache stays on its device."""


class _Side:
    """The keys, or the values, of a layer."""

    def __init__(self, states: Tensor, bits: int, group_size: int | None, recent: bool) -> None:
        batch, heads, _, self.channels = states.shape
        self.bits, self.group_size = bits, group_size
        if bits == 8 and group_size is None:
            self.group_size = recent_group_size(self.channels)
        self.recent_group = recent_group_size(self.channels)
        self.bytes_per_token = heads * kv_row_bytes(self.channels, bits, self.group_size)
        empty = functools.partial(torch.empty, dtype=torch.uint8, device=states.device)
        self.quantized = TokenRows(empty(batch, heads, 0, self.bytes_per_token // heads))
        self.recent = None
        if recent:
            size = kv_row_bytes(self.channels, 8, self.recent_group)
            self.recent = TokenRows(empty(batch, heads, 0, size))

    def parts(self) -> list[TokenRows]:
        return [self.quantized] if self.recent is None else [self.quantized, self.recent]

    def newest(self) -> TokenRows:
        return self.parts()[-1]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts())

    def quantized_rows(self, states: Tensor, name: str) -> Tensor:
        """New rows for the newest part."""
        batch, heads, _, _ = self.quantized.buffer.shape
        expected = (batch, heads, states.shape[2], self.channels)
        if tuple(states.shape) != expected:
            raise ValueError(
                f"QuantizedCache: {name} must be {list(expected)}, as the states before, got "
                f"{list(states.shape)}"
            )
        if self.recent is None:
            return ops.quantize_kv(states.detach(), self.bits, self.group_size)
        return ops.quantize_kv(states.detach(), 8, self.recent_group)

    def quantize_first(self, tokens: int) -> None:
        """Move recent tokens to the quantized ones."""
        if tokens <= 0 or self.recent is None:
            return
        rows = self.recent.view()[:, :, :tokens]
        x = ops.dequantize_kv(rows, self.channels, 8, self.recent_group)
        self.quantized.append(ops.quantize_kv(x, self.bits, self.group_size))
        self.recent = self.recent.without_first(tokens)

    def rows(self) -> Rows:
        recent = None if self.recent is None else self.recent.view()
        return Rows(self.quantized.view(), recent, self.channels, self.bits, self.group_size)


class QuantizedCache(Cache):
    """A cache of keys and values in 8 or 4 bits, for models of transformers.

    Keys and values take a half (8 bits) or 0.31 (4 bits) of the memory of bfloat16. They are
    quantized by :func:`torchquant.ops.quantize_kv` when they arrive, for each token and head. After
    :func:`torchquant.replace_attention_`, a decoding step on a CPU reads the integers as they are
    (:func:`torchquant.ops.attention_cached`). Other calls, and models with another attention, read
    the values that the integers represent, as floats: the same values, at the cost of a float copy
    of one layer's cache in each call.

    With 4 bits, keys lose much more by rounding than values do, and recent tokens get most of the
    attention. The last 128 to 255 tokens are therefore kept in 8 bits, and the others have a scale
    for every 32 channels.

    All layers keep all tokens; the mask of a layer with a sliding window hides the others. A model
    whose layers have a recurrent state is refused. The cache holds constants: no gradient flows
    through it. Under ``torch.compile`` an update is a graph break.

    Args:
        bits: 8 or 4.
        group_size: channels that share a scale: a multiple of 16 up to 256; None: all channels of a
            head (at most 256) in 8 bits, 32 in 4 bits.
        recent: with 4 bits, the number of tokens that are kept in 8 bits at least: these, and up to
            as many more. None: 128. 0: none.

    Raises:
        ValueError: an argument is wrong.

    Source: a residual of recent tokens as in Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit
    Quantization for KV Cache" (2024).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> cache = QuantizedCache(bits=8)
        >>> ids = torch.ones(1, 4, dtype=torch.int64)
        >>> y = model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        >>> y.shape, cache.get_seq_length(), cache.bytes_per_token  # 2 * 2 heads, 32 + 4 bytes
        (torch.Size([1, 6]), 5, 144)
    """

    def __init__(
        self, bits: int = 8, *, group_size: int | None = None, recent: int | None = None
    ) -> None:
        if isinstance(bits, bool) or bits not in (4, 8):
            raise ValueError(f"QuantizedCache: bits must be 8 or 4, got {bits!r}")
        if group_size is None and bits == 4:
            group_size = 32
        if group_size is not None and (group_size % 16 or not 16 <= group_size <= 256):
            raise ValueError(
                "QuantizedCache: group_size must be None or a multiple of 16 up to 256, got "
                f"{group_size}"
            )
        if recent is None:
            recent = 128 if bits == 4 else 0
        if isinstance(recent, bool) or not isinstance(recent, int) or recent < 0:
            raise ValueError(f"QuantizedCache: recent must be None, 0 or positive, got {recent!r}")
        if recent and bits == 8:
            raise ValueError(
                f"QuantizedCache: recent must be None or 0 for bits = 8, got {recent}; all tokens "
                "are kept in 8 bits"
            )
        self.bits, self.group_size, self.recent = bits, group_size, recent
        layer = functools.partial(QuantizedLayer, bits, group_size, recent)
        super().__init__(layer_class_to_replicate=layer)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token of one sequence in all layers that have tokens.

        With 4 bits, recent tokens are in 8 bits and take more.
        """
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens of all sequences; the buffers may be up to half as large again."""
        return sum(layer.nbytes for layer in self.layers)

    def _refuse_state(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "QuantizedCache: the model keeps other states than keys and values (a recurrent layer, "
            "or an indexer); use transformers' DynamicCache"
        )

    update_conv_state = update_recurrent_state = update_indexer = _refuse_state
    get_conv_state = get_recurrent_state = _refuse_state
