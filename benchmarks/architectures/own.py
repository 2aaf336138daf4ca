"""Networks that are in no library: torch's own transformer, recurrent nets, small classics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import VOCABULARY, Architecture, Inputs, ids, numbers

WIDTH, HEADS, HIDDEN = 64, 4, 128


class Seq2Seq(nn.Module):
    """nn.Transformer between an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask)
        logits: Tensor = self.head(hidden)
        return logits


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a classifier."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY // 4, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, source: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(source)).mean(1))
        return logits


class Tagger(nn.Module):
    """A recurrent network in both directions that gives each token a tag."""

    def __init__(self, recurrent: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.recurrent = recurrent(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        tags: Tensor = self.head(self.recurrent(self.embed(tokens))[0])
        return tags


class CellWithAttention(nn.Module):
    """A decoder that loops over an LSTMCell and attends to what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.cell = nn.LSTMCell(2 * WIDTH, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        keys = self.key(embedded)
        h = c = context = embedded.new_zeros(len(tokens), WIDTH)
        found = []
        for step in range(tokens.shape[1]):
            h, c = self.cell(torch.cat([embedded[:, step], context], -1), (h, c))
            weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(h), keys) / 8, -1)
            context = torch.einsum("bt,btd->bd", weights, embedded)
            found.append(self.head(torch.cat([h, context], -1)))
        return torch.stack(found, 1)


class DLRM(nn.Module):
    """A recommendation model: bags of embeddings, products between them, two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(100, 32, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.top = nn.Sequential(
            nn.Linear(38, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], 1)
        products = rows @ rows.transpose(1, 2)
        first, second = torch.triu_indices(4, 4, 1)
        score: Tensor = self.top(torch.cat([x, products[:, first, second]], 1))
        return score


class ConvBlock(nn.Module):
    """Two convolutions with GroupNorm, and a linear layer for the time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.norms = nn.ModuleList(nn.GroupNorm(4, outputs) for _ in range(2))
        self.time = nn.Linear(64, outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        x = x + self.time(time)[:, :, None, None]
        return F.silu(self.norms[1](self.second(x)))


class UNet(nn.Module):
    """A small U-Net with a time embedding, as in diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 64))
        self.down = nn.ModuleList([ConvBlock(3, 16), ConvBlock(16, 32)])
        self.middle = ConvBlock(32, 64)
        self.up = nn.ModuleList([ConvBlock(96, 32), ConvBlock(48, 16)])
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        kept = []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x, time)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time)
        pixels: Tensor = self.last(x)
        return pixels


class MixerBlock(nn.Module):
    """Two MLPs: one over the positions, one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.positions = nn.Sequential(nn.Linear(64, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 64))
        self.channels = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.channels(self.norms[1](x))
        return mixed


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class CrossAttention(nn.Module):
    """nn.MultiheadAttention over another sequence, with widths of its own for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=96, vdim=96, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        x = query + self.attention(query, context, context)[0]
        mixed: Tensor = x + self.mlp(x)
        return mixed


class Crepe(nn.Module):
    """CREPE tiny, a pitch tracker: six convolutions over the time, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, (512 if not i else 64, 1), (4 if not i else 1, 1))
            for i, (a, b) in enumerate(itertools.pairwise(channels))
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(n, eps=0.0010000000474974513) for n in channels[1:]
        )
        self.classifier = nn.Linear(256, 360)

    def forward(self, sound: Tensor) -> Tensor:
        x = sound[:, None, :, None]
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.pad(x, (0, 0, 254, 254) if not index else (0, 0, 31, 32))
            x = F.max_pool2d(norm(F.relu(conv(x))), (2, 1), (2, 1))
        x = x.permute(0, 2, 1, 3).reshape(len(x), -1)
        logits: Tensor = self.classifier(x)
        return logits


def own(
    name: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs], fast: bool = False
) -> Architecture:
    """A network of this file."""
    return Architecture(name, "own", "", build, inputs, fast=fast)


def tokens(name: str) -> Callable[[], Inputs]:
    """Two sequences of tokens, for an argument of that name."""
    return lambda: {name: ids(2, 10)}


ARCHITECTURES = [
    own("nn_transformer", Seq2Seq, lambda: {"source": ids(2, 9), "target": ids(2, 7)}, fast=True),
    own(
        "nn_encoder",
        lambda: Encoder(False),
        lambda: {"source": torch.randint(80, (2, 10))},
        fast=True,
    ),
    own(
        "nn_encoder_norm_first",
        lambda: Encoder(True),
        lambda: {"source": torch.randint(80, (2, 10))},
    ),
    own("lstm_tagger", lambda: Tagger(nn.LSTM), tokens("tokens"), fast=True),
    own("gru_tagger", lambda: Tagger(nn.GRU), tokens("tokens")),
    own("lstmcell_attention", CellWithAttention, tokens("tokens")),
    own(
        "dlrm",
        DLRM,
        lambda: {"dense": numbers(4, 13), "sparse": torch.randint(100, (4, 3, 2))},
        fast=True,
    ),
    own("unet", UNet, lambda: {"x": numbers(2, 3, 16, 16), "time": numbers(2, 16)}),
    own("mlp_mixer", Mixer, lambda: {"x": numbers(2, 3, 32, 32)}, fast=True),
    own(
        "mha_cross",
        CrossAttention,
        lambda: {"query": numbers(2, 6, WIDTH), "context": numbers(2, 9, 96)},
    ),
    own("crepe", Crepe, lambda: {"sound": numbers(2, 1024)}, fast=True),
]
