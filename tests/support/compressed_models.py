"""Small models for the verbs that compress layer by layer, and what they should do, written out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.inputs import columns
from torchquant.algorithms.integer_weight import IntegerWeight
from torchquant.convert.adjustment import Adjustment, float_weight, give_integers
from torchquant.nn.kinds import kind_of

SIZE = 64


class Block(nn.Module):
    """Attention and a feed-forward part; the input of each may be normalized."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        parts = self.q(h), self.k(h), self.v(h)
        x = x + self.o(nn.functional.scaled_dot_product_attention(*parts, mask))
        return x + self.down(self.up(x).relu())


STAGES = (("q", "k", "v"), ("o",), ("up",), ("down",))


class Decoder(nn.Module):
    """An embedding, blocks with a common mask, and a head."""

    def __init__(self, blocks: int = 2, rows: int = 300) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, SIZE)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(SIZE, rows)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.head(x)


class Experts(nn.Module):
    """Two experts of three for each row; the last one is never chosen."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.router = nn.Linear(size, 2)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(size, size), "down": nn.Linear(size, size)})
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        result = x.clone()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                inner = expert["up"](x[rows]).relu()
                result = result.index_add(0, rows, expert["down"](inner))
        return result


def decoder(blocks: int = 2) -> Decoder:
    torch.manual_seed(0)
    return Decoder(blocks).eval()


def tokens(count: int = 5, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (4, length), generator=generator) for _ in range(count)]


def stages_of(model: Decoder) -> list[tuple[str, ...]]:
    """The layers of a decoder in the order in which they are compressed."""
    found = [
        tuple(f"layers.{block}.{name}" for name in names)
        for block in range(len(model.layers))
        for names in STAGES
    ]
    return [*found, ("head",)]


def compressed_by_hand(
    model: nn.Module,
    batches: list[Any],
    config: Any,
    stages: list[tuple[str, ...]],
    choose: Any,
    first: tuple[str, ...] = (),
) -> dict[str, IntegerWeight]:
    """The integers of layers, each found with a run of the whole model for each layer.

    Args:
        choose: takes a weight, a Hessian and the weights of the configuration.
        first: layers that are rounded to the nearest before.
    """
    model = copy.deepcopy(model).eval()
    found: dict[str, IntegerWeight] = {}
    for name in first:
        replace(model, name, config, None)
    for stage in stages:
        for name in stage:
            layer: Any = model.get_submodule(name)
            hessian = Hessian.of(layer)
            for number, batch in enumerate(batches):
                for x in inputs_of(model, layer, batch):
                    hessian.add(number, columns(layer, x))
            weight = float_weight(layer).flatten(1)
            found[name] = choose(weight, hessian.value(), config.weights)
        for name in stage:
            replace(model, name, config, found[name])
    return found


def inputs_of(model: nn.Module, layer: nn.Module, batch: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen


def replace(model: nn.Module, name: str, config: Any, found: IntegerWeight | None) -> None:
    layer = model.get_submodule(name)
    kind = kind_of(layer)
    assert kind is not None
    new = kind.layer_class(config, layer).from_float(layer, config)
    if found is not None:
        qweight = found.qweight.view(new.weight_shape)
        give_integers(Adjustment(qweight, found.scale, weight_zero_point=found.zero_point), new)
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent)._modules[attribute] = new
