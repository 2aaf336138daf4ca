"""MultiheadAttention: torch's attention module with its projections as layers of their own.

``nn.MultiheadAttention`` keeps three weights in one parameter and multiplies them itself, so no
verb can replace a projection. This module computes the same with four linear layers, each of which
the verbs quantize, train, save and load like any other linear layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MultiheadAttention", "attention_refusal"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def attention_refusal(module: nn.Module) -> str | None:
    """The reason why :class:`MultiheadAttention` cannot take the place of a module, or None.

    Example:
        >>> attention_refusal(nn.MultiheadAttention(8, 2))
        >>> attention_refusal(nn.Linear(8, 2))
        'Linear is not nn.MultiheadAttention'
    """
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is not nn.MultiheadAttention"
    if nn.utils.parametrize.is_parametrized(module):
        return "a parameter is parametrized"
    if nn.utils.parametrize.is_parametrized(module.out_proj):
        return "the weight of out_proj is parametrized"
    own = set(vars(module)) - set(_PLAIN)
    if own:
        return f"it has attributes of its own: {', '.join(sorted(own))}"
    if set(module._modules) != {"out_proj"} or type(module.out_proj) is not _OUT_PROJECTION:
        return "it has other submodules than torch's"
    return None


class MultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with the layers ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    Arguments of the constructor and of the forward, results, and errors of wrong shapes are those
    of ``nn.MultiheadAttention``. :func:`torchquant.quantize_` and the other verbs put it in the
    place of an ``nn.MultiheadAttention`` whose projections they select, and
    :func:`torchquant.to_float_` puts the original class back. An ``nn.TransformerEncoderLayer``
    around it runs its ordinary forward, not its fused one, which reads float weights.

    While the projections are float, ``load_state_dict`` also takes the state dict of an
    ``nn.MultiheadAttention``.

    Args:
        embed_dim: E, the size of queries and results.
        num_heads: number of heads; divides E.
        dropout: probability with which attention weights are dropped in training.
        bias: whether the projections have a bias.
        add_bias_kv: whether a learned key and value are appended to the sequence.
        add_zero_attn: whether a key and a value of zeros are appended to the sequence.
        kdim: size of keys; None is E.
        vdim: size of values; None is E.
        batch_first: if True, inputs are ``[N, L, E]``; if False, ``[L, N, E]``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads.

    Example:
        >>> attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
        >>> ours = MultiheadAttention.from_float(attention)
        >>> x = torch.randn(3, 5, 16)
        >>> torch.allclose(ours(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """

    # Read by nn.TransformerEncoderLayer and nn.TransformerEncoder before they choose a forward.
    _qkv_same_embed_dim = False
    # True if a verb put it in the place of an nn.MultiheadAttention.
    was_separated: bool = False
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: embed_dim must be a multiple of num_heads, got {embed_dim} "
                f"and {num_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, size in zip(_PROJECTIONS, (embed_dim, self.kdim, self.vdim), strict=True):
            self.add_module(name, nn.Linear(size, embed_dim, bias, **place))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **place)
        for name in ("bias_k", "bias_v"):
            row = nn.Parameter(torch.empty(1, 1, embed_dim, **place)) if add_bias_kv else None
            self.register_parameter(name, row)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name in (*_PROJECTIONS, "out_proj"):
            linear = getattr(self, name)
            if name != "out_proj":
                nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for value in (self.bias_k, self.bias_v):
            if value is not None:
                nn.init.xavier_normal_(value)

    @classmethod
    def from_float(cls, attention: nn.MultiheadAttention) -> MultiheadAttention:
        """A module that computes what ``attention`` computes, with the same memory.

        The weights of the projections are views of ``in_proj_weight``, as parameters of their own:
        an optimizer has to be created after this.

        Raises:
            TypeError: attention is a subclass, is parametrized, or was changed.
        """
        reason = attention_refusal(attention)
        if reason is not None:
            raise TypeError(
                f"MultiheadAttention.from_float: attention must be a plain nn.MultiheadAttention, "
                f"got {reason}"
            )
        with torch.device("meta"):
            new = cls(
                attention.embed_dim,
                attention.num_heads,
                attention.dropout,
                attention.in_proj_bias is not None,
                False,
                attention.add_zero_attn,
                attention.kdim,
                attention.vdim,
                attention.batch_first,
            )
        if attention._qkv_same_embed_dim:
            weights = _parts(attention.in_proj_weight)
        else:
            names = (f"{name}_weight" for name in _PROJECTIONS)
            weights = [getattr(attention, name) for name in names]
        biases = _parts(attention.in_proj_bias)
        for name, weight, bias in zip(_PROJECTIONS, weights, biases, strict=True):
            linear = getattr(new, name)
            linear.weight, linear.bias = weight, bias
            linear.train(attention.training)
        out = attention.out_proj
        new.out_proj.weight, new.out_proj.bias = out.weight, out.bias
        for name in ("bias_k", "bias_v"):
            setattr(new, name, getattr(attention, name))
        return new.train(attention.training)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *rest: Any, **options: Any
    ) -> None:
        """Load a state dict; the parameters of an ``nn.MultiheadAttention`` fit, too."""
        for joint, key in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            value = state_dict.get(prefix + joint)
            shape = (3 * self.embed_dim, self.embed_dim)[: 2 if key == "weight" else 1]
            if isinstance(value, Tensor) and tuple(value.shape) == shape:
                del state_dict[prefix + joint]
                for name, part in zip(_PROJECTIONS, value.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{key}"] = part
        for name in _PROJECTIONS:  # keys and values of other sizes
            if f"{prefix}{name}_weight" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}_weight")
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def to_float(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` with the values of this module, whose layers are float.

        Weights that are views of one parameter become that memory again; others are copied.

        Raises:
            TypeError: a projection is not an ``nn.Linear``.
        """
        linears = [getattr(self, name) for name in (*_PROJECTIONS, "out_proj")]
        for linear in linears:
            if not isinstance(linear, nn.Linear):
                raise TypeError(
                    "MultiheadAttention.to_float: projections must be nn.Linear, got "
                    f"{type(linear).__name__}; call torchquant.to_float_(model)"
                )
        *projections, out = linears
        with torch.device("meta"):
            new = nn.MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                self.dropout,
                out.bias is not None,
                False,
                self.add_zero_attn,
                self.kdim,
                self.vdim,
                self.batch_first,
            )
        weights = [linear.weight for linear in projections]
        if new._qkv_same_embed_dim:
            new.in_proj_weight = _joined(weights)
        else:
            for name, weight in zip(_PROJECTIONS, weights, strict=True):
                setattr(new, f"{name}_weight", weight)
        if out.bias is not None:
            new.in_proj_bias = _joined([linear.bias for linear in projections])
        new.out_proj.weight, new.out_proj.bias = out.weight, out.bias
        new.bias_k, new.bias_v = self.bias_k, self.bias_v
        return new.train(self.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """A tensor on the meta device with the shape of the joint weight, and without values.

        Its type tells torch's modules around this one that no fused forward can read it.
        """
        shape = (3 * self.embed_dim, self.embed_dim)
        return torch.empty(shape, dtype=self.q_proj.weight.dtype, device="meta").as_subclass(_Shape)

    @property
    def in_proj_bias(self) -> None:
        """None: torch's modules around this one then run their ordinary forward."""
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``; see ``nn.MultiheadAttention``.

        Args:
            query: ``[L, N, E]``, with ``batch_first`` ``[N, L, E]``, or ``[L, E]``.
            key: ``[S, N, kdim]`` in the same order.
            value: ``[S, N, vdim]`` in the same order.
            key_padding_mask: bool ``[N, S]`` (``[S]`` unbatched), True for keys to ignore; or
                float, which is added to the scores.
            need_weights: whether to return the attention weights, too, which is slower.
            attn_mask: bool or float ``[L, S]`` or ``[N * num_heads, L, S]``, likewise.
            average_attn_weights: if True, the weights are the mean over heads.
            is_causal: says that attn_mask, which is required then, is the causal mask.

        Returns:
            The result, of query's shape, and the weights ``[N, L, S]`` (``[N, num_heads, L, S]``
            without averaging, no N for unbatched inputs), or None.

        Raises:
            RuntimeError: is_causal is given without attn_mask.
            ValueError: shapes do not fit.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: attn_mask must be given with is_causal=True, got None"
            )
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "MultiheadAttention: query, key and value must have 3 dimensions, or 2 without a "
                f"batch, got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        # The projections see the tensors that they were given: one tensor for all three is
        # quantized once.
        if key is query and value is query:
            q = self.q_proj(query)
            k = self.k_proj(query)
            v = self.v_proj(query)
        else:
            q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
            raise ValueError(
                "MultiheadAttention: key and value must have the same length, and query the same "
                f"batch size, got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask)
        q, (k, v) = self._heads(q), self._extended(self._heads(k), self._heads(v))
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(self.head_dim))
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = nn.functional.dropout(weights, drop) if drop else weights
            mixed = weights @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, drop, causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        if batched and not self.batch_first:
            mixed = mixed.transpose(0, 1)
        output: Tensor = self.out_proj(mixed if batched else mixed.squeeze(0))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """``[N, L, E]`` -> ``[N, num_heads, L, head_dim]``."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those that add_bias_kv and add_zero_attn append."""
        batch = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            more = [
                self._heads(bias).to(k.dtype).expand(batch) for bias in (self.bias_k, self.bias_v)
            ]
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), more, strict=True))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(batch)], dim=2) for x in (k, v))
        return k, v

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Both masks as one float mask ``[N or 1, num_heads or 1, L or 1, S]``, or None."""
        batch, length, source = q.shape[0], q.shape[1], k.shape[1]
        mask = None
        if attn_mask is not None:
            shapes = ((length, source), (batch * self.num_heads, length, source))
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(
                    f"MultiheadAttention: attn_mask must be {list(shapes[0])} or "
                    f"{list(shapes[1])}, got {list(attn_mask.shape)}"
                )
            mask = _additive("attn_mask", attn_mask, q.dtype)
            each = (batch, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            mask = mask.view(*each, length, source)
        if padding is not None:
            if tuple(padding.shape) != (batch, source):
                raise ValueError(
                    f"MultiheadAttention: key_padding_mask must be {[batch, source]}, got "
                    f"{list(padding.shape)}"
                )
            more = _additive("key_padding_mask", padding, q.dtype).view(batch, 1, 1, source)
            mask = more if mask is None else mask + more
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        return mask if mask is None or not added else nn.functional.pad(mask, (0, added))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


class _Shape(Tensor):
    """A tensor that stands for a weight which is in several layers."""


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to the scores: -inf where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"MultiheadAttention: {name} must be bool or float, got {mask.dtype}")
    return mask.to(dtype)


def _parts(parameter: nn.Parameter | None) -> list[Any]:
    """The thirds of a parameter, as parameters that share its memory."""
    if parameter is None:
        return [None] * 3
    trained = parameter.requires_grad
    return [nn.Parameter(part, trained) for part in parameter.detach().chunk(3)]


def _joined(parts: list[Any]) -> nn.Parameter:
    """One parameter from three; without a copy if they lie one after the other in one memory."""
    first = parts[0].detach()
    size = first.numel()
    beside = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + place * size
        and part.is_contiguous()
        and part.shape == first.shape
        for place, part in enumerate(parts)
    )
    shape = (3 * first.shape[0], *first.shape[1:])
    if beside and not first.is_meta:
        joined = first.as_strided(shape, first.stride())
    else:
        joined = torch.cat([part.detach() for part in parts])
    return nn.Parameter(joined, any(part.requires_grad for part in parts))


_ORIGINAL = nn.MultiheadAttention(2, 1, device="meta")
_PLAIN = tuple(vars(_ORIGINAL))
_OUT_PROJECTION = type(_ORIGINAL.out_proj)
