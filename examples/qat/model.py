"""The text, and a transformer that reads it byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 8  # every eighth topic is measured on, not trained on


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model, and how it is trained; ``SMOKE`` has tiny sizes.

    A learned step is a small number (0.01 to 0.2), and Adam moves every parameter by about its
    learning rate. Steps therefore need a smaller learning rate than weights: ``step_rate`` times
    that of weights.
    """

    width: int = 128
    hidden: int = 640
    layers: int = 4
    heads: int = 4
    context: int = 128  # bytes that the model sees
    batch: int = 8
    pretrain_steps: int = 1300
    finetune_steps: int = 600
    warmup_steps: int = 100
    learning_rate: float = 2.5e-3
    step_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm
    sgd_rate: float = 0.1  # for the ablation, without decay
    teacher_share: float = 0.5  # of the loss, with --distill
    test_bytes: int | None = None  # None: all


SMOKE = Recipe(
    width=32,
    hidden=64,
    layers=2,
    heads=2,
    context=32,
    pretrain_steps=6,
    finetune_steps=4,
    warmup_steps=2,
    test_bytes=2000,
)


def split_text() -> tuple[Tensor, Tensor]:
    """Bytes int64 ``[n]`` of the training text and of the test text.

    `pydoc_data.topics` is part of Python, so the text changes a little from one Python version to
    the next. Topics quote each other: a paragraph counts once, in the test text if possible.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()

    def part(held_out: bool) -> Tensor:
        kept = []
        for index, name in enumerate(sorted(topics)):
            if (index % HELD_OUT == HELD_OUT // 2 - 1) is not held_out:
                continue
            for paragraph in topics[name].split("\n\n"):
                words = " ".join(paragraph.split())
                if words not in seen:
                    seen.add(words)
                    kept.append(paragraph)
        return torch.frombuffer(bytearray("\n\n".join(kept).encode()), dtype=torch.uint8).long()

    test = part(held_out=True)
    return part(held_out=False), test


def batches(text: Tensor, recipe: Recipe, random: torch.Generator) -> Iterator[Tensor]:
    """Windows ``[batch, context + 1]`` at random positions, without end."""
    positions = torch.arange(recipe.context + 1)
    while True:
        starts = torch.randint(len(text) - recipe.context, (recipe.batch, 1), generator=random)
        yield text[starts + positions]


class Block(nn.Module):
    """Attention and a ReLU network, each after a norm, added to the residual stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, hidden = recipe.width, recipe.hidden
        self.heads = recipe.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.network_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden)
        self.relu = nn.ReLU()  # a module, so that prepare_qat_ fuses it into `up`
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, T, width]`` to the same; cos, sin ``[T, width / heads]``: see :func:`rotary`."""
        joint = self.query_key_value(self.attention_norm(x))
        joint = joint.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        first, second = joint[:2].chunk(2, dim=-1)
        query, key = joint[:2] * cos + torch.cat((-second, first), dim=-1) * sin
        attended = F.scaled_dot_product_attention(query, key, joint[2], is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(self.relu(self.up(self.network_norm(x))))
        return out


class TextModel(nn.Module):
    """Predicts the next byte: int64 ``[B, T]`` to logits ``[B, T, 256]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.width, eps=1e-6)
        self.head = nn.Linear(recipe.width, 256)
        cos, sin = rotary(recipe.context, recipe.width // recipe.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                # Layers that add to the residual stream start small: the deeper the model, the
                # smaller.
                added = name.endswith(("attention_output", "down"))
                depth = 2 * recipe.layers if added else 1
                nn.init.normal_(layer.weight, std=(layer.in_features * depth) ** -0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotary(context: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[context, width]`` of rotary embedding (Su et al., 2021)."""
    speeds = 1000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = (torch.arange(context)[:, None] * speeds).repeat(1, 2)
    return angles.cos(), angles.sin()
