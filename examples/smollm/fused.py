"""A decoding step that is written for Llama's blocks: the model's own layers, and little between.

A step of transformers calls about 50 operators in 10 modules for each of 30 blocks, which takes
longer than the linear layers. Here a block has its seven linear layers and a dozen other calls. The
weights are the model's own; the keys and values of all blocks lie in one tensor of constant size.
"""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smollm.decoding import CACHE_STEP, Eager

if TYPE_CHECKING:
    import torch


class Block:
    """What a step needs of a block."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.q, self.k, self.v, self.o = (getattr(attention, name) for name in names)
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.norms = [
            (norm.weight, norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]


class Fused(Eager):
    """The prompt runs in the model's own forward, every further token in `step`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config, attention = model.config, model.model.layers[0].self_attn
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width, self.scale = attention.head_dim, attention.scaling
        self.blocks = [Block(layer) for layer in model.model.layers]
        self.norm = model.model.norm.weight, model.model.norm.variance_epsilon
        self.places = self.position = 0

    def start(self, prompt: torch.Tensor, steps: int) -> torch.Tensor:
        """See `Eager`."""
        logits = super().start(prompt, steps)
        self._reserve(len(prompt) + steps, logits.dtype)
        self.position = len(prompt)
        for layer, (keys, values) in zip(self.cache.layers, self.states, strict=True):
            keys[:, : self.position] = layer.keys[0]
            values[:, : self.position] = layer.values[0]
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """See `Eager`."""
        import torch

        from torchquant.ops import gated_activation, rms_norm

        heads, groups, width = self.heads, self.groups, self.width
        place, end = self.position, self.position + 1
        cos, sin = self.cos[place], self.sin[place]
        x = self.model.model.embed_tokens(token)
        for block, (keys, values) in zip(self.blocks, self.states, strict=True):
            normed = rms_norm(x, *block.norms[0])
            both = torch.cat((block.q(normed), block.k(normed)), -1).view(-1, width)
            turned = torch.addcmul(both * cos, both.index_select(1, self.swapped), sin)
            keys[:, place] = turned[heads:]
            values[:, place] = block.v(normed).view(groups, width)
            queries = turned[:heads].view(groups, -1, width)
            scores = torch.bmm(queries, keys[:, :end].transpose(1, 2)) * self.scale
            mixed = torch.bmm(scores.softmax(-1), values[:, :end])
            x = x + block.o(mixed.view(1, heads * width))
            normed = rms_norm(x, *block.norms[1])
            x = x + block.down(gated_activation(block.gate(normed), block.up(normed), "silu"))
        self.position = end
        logits: torch.Tensor = self.model.lm_head(rms_norm(x, *self.norm))
        return logits

    def _reserve(self, needed: int, dtype: torch.dtype) -> None:
        """Make room for so many tokens."""
        import torch

        if needed <= self.places:
            return
        self.places = -(-needed // CACHE_STEP) * CACHE_STEP
        shape = (len(self.blocks), 2, self.groups, self.places, self.width)
        self.states = [(pair[0], pair[1]) for pair in torch.zeros(shape, dtype=dtype)]
        positions = torch.arange(self.places)[None]
        example = torch.empty((), dtype=dtype)
        cos, sin = (table[0] for table in self.model.model.rotary_emb(example, positions))
        # x * cos + rotate_half(x) * sin, where rotate_half swaps the halves and negates the first.
        half = self.width // 2
        self.swapped = torch.arange(self.width).roll(half)
        self.cos, self.sin = cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)
