"""Plans of small decoders with random weights, and their caches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchquant import Int8DynamicActivationInt8WeightConfig as Int8
from torchquant import Int8DynamicActivationIntxWeightConfig as Intx
from torchquant import Int8StaticActivationInt8WeightConfig as Static
from torchquant import IntxWeightOnlyConfig as WeightOnly
from torchquant.functional.kv_cache import kv_row_bytes, recent_group_size
from torchquant.integrations.transformers.decoder_plan import (
    DecoderBlock,
    DecoderPlan,
    Norm,
    States,
    decode_reference,
)
from torchquant.nn import QuantizedLinear

CONFIGURATIONS: dict[str, Any] = {
    "int8": Int8,
    "int8, zero points": lambda: Int8(weight_symmetric=False),
    "int8, symmetric rows": lambda: Int8(activation_symmetric=True),
    "static": Static,
    "4 bits": lambda: Intx(bits=4, group_size=16),
    "3 bits, zero points": lambda: Intx(bits=3, group_size=32, symmetric=False),
    "float activations": lambda: WeightOnly(bits=4, group_size=16),
}


class Sizes(NamedTuple):
    """Of a decoder."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    turned: int  # channels of a head that are rotated


SMALL = Sizes(48, 4, 2, 24, 80, 24)  # no size is a multiple of 64
WIDE = Sizes(64, 3, 1, 64, 96, 32)


def layer_of(kind: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """A layer with random weights."""
    config = CONFIGURATIONS[kind]()
    cls, linear = QuantizedLinear.class_for(config), nn.Linear(inputs, outputs, bias=bias)
    if kind != "static":
        return cls.from_float(linear, config)
    scale, zero_point = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
    return cls.from_float(linear, config, input_scale=scale, input_zero_point=zero_point)


def plan_of(
    kinds: Sequence[str],
    sizes: Sizes = SMALL,
    *,
    blocks: int = 2,
    bias: bool = False,
    head_norms: bool = False,
    activation: str = "silu",
) -> DecoderPlan:
    """A plan whose layers have these configurations in turn."""
    torch.manual_seed(0)
    kind = itertools.cycle(kinds)

    def layer(inputs: int, outputs: int) -> nn.Module:
        return layer_of(next(kind), inputs, outputs, bias)

    def norm(size: int) -> Norm:
        return Norm(torch.rand(size) + 0.5, 1e-5)

    def block() -> DecoderBlock:
        h, d = sizes.hidden, sizes.head_dim
        q, kv = sizes.heads * d, sizes.kv_heads * d
        return DecoderBlock(
            norm(h),
            layer(h, q),
            layer(h, kv),
            layer(h, kv),
            layer(q, h),
            norm(d) if head_norms else None,
            norm(d) if head_norms else None,
            norm(h),
            layer(h, sizes.intermediate),
            layer(h, sizes.intermediate),
            layer(sizes.intermediate, h),
        )

    made = tuple(block() for _ in range(blocks))
    scale = sizes.head_dim**-0.5
    return DecoderPlan(
        made, sizes.heads, sizes.kv_heads, sizes.head_dim, scale, activation, norm(sizes.hidden)
    )


class Tokens(NamedTuple):
    """What enters a decoder."""

    hidden: Tensor
    cos: Tensor
    sin: Tensor

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the tokens."""
        return self.hidden[first:last], self.cos[first:last], self.sin[first:last]


def tokens_of(count: int, sizes: Sizes = SMALL) -> Tokens:
    """Random tokens."""
    torch.manual_seed(1)
    angles = 3 * torch.randn(count, sizes.turned)
    return Tokens(torch.randn(count, sizes.hidden), angles.cos(), angles.sin())


def states_of(
    plan: DecoderPlan,
    capacity: int,
    bits: int = 32,
    group_size: int | None = None,
    recent: bool = False,
) -> States:
    """An empty cache whose memory holds NaN, or bytes of 255."""

    def side(width: int | None) -> list[Tensor]:
        shape = plan.kv_heads, capacity, width or plan.head_dim
        if width is None:
            return [torch.full(shape, torch.nan) for _ in plan.blocks]
        return [torch.full(shape, 255, dtype=torch.uint8) for _ in plan.blocks]

    width = None if bits == 32 else kv_row_bytes(plan.head_dim, bits, group_size)
    new = [None, None]
    if recent:
        size = kv_row_bytes(plan.head_dim, 8, recent_group_size(plan.head_dim))
        new = [side(size), side(size)]
    return States(side(width), side(width), 0, bits, group_size, new[0], new[1])


def advanced(states: States, tokens: int) -> States:
    """The cache behind a call with so many tokens."""
    if states.recent_keys is None:
        return replace(states, position=states.position + tokens)
    return replace(states, recent=states.recent + tokens)


def rows_of(states: States) -> Iterator[Tensor]:
    """All memory of a cache."""
    for side in (states.keys, states.values, states.recent_keys, states.recent_values):
        yield from side or ()


def expected(plan: DecoderPlan, tokens: Tokens, states: States, counts: Sequence[int]) -> Tensor:
    """The specification's results for so many tokens in each call."""
    results, first = [], 0
    for count in counts:
        part = tokens.part(first, first + count)
        results.append(decode_reference(plan, *part, states))
        states, first = advanced(states, count), first + count
    return torch.cat(results)


def computed(step: Any, tokens: Tokens, states: States, counts: Sequence[int]) -> Tensor:
    """The same from the step in C++."""
    results, first = [], 0
    for count in counts:
        part = tokens.part(first, first + count)
        results.append(step.run(*part, *arguments(states)))
        states, first = advanced(states, count), first + count
    return torch.cat(results)


def arguments(states: States) -> tuple[Any, ...]:
    """Of the step's run, from `keys` on."""
    return (
        states.keys,
        states.values,
        states.position,
        states.bits,
        states.group_size,
        states.recent_keys,
        states.recent_values,
        states.recent,
    )
