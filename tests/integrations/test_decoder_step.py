"""_C.Decoder: the bits of decode_reference, whatever tokens come together; refusals."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import assert_same_bits, check_everywhere, threads
from torch import Tensor

pytest.importorskip("transformers")

from support.decoder_steps import (
    CONFIGURATIONS,
    SMALL,
    WIDE,
    Sizes,
    advanced,
    arguments,
    computed,
    expected,
    plan_of,
    rows_of,
    states_of,
    tokens_of,
)

from torchquant.integrations.transformers.decoder_forward import _step_of
from torchquant.integrations.transformers.decoder_plan import DecoderPlan, States


def check(
    plan: DecoderPlan, sizes: Sizes, counts: Sequence[int], rest: int = 3, **cache: Any
) -> None:
    """The step has the specification's results and rows, token by token and all at once."""
    total = sum(counts)
    tokens = tokens_of(total, sizes)
    wanted_states = states_of(plan, total + rest, **cache)
    with torch.no_grad():
        wanted = expected(plan, tokens, wanted_states, counts)
    step = _step_of(plan)
    for parts in (counts, [total]):

        def call(parts: Sequence[int] = parts) -> tuple[Tensor, ...]:
            states = states_of(plan, total + rest, **cache)
            result = computed(step, tokens, states, parts)
            return (result, *rows_of(states))

        check_everywhere(call, (wanted, *rows_of(wanted_states)), (1, 2), parts)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_layers(kind: str) -> None:
    check(plan_of([kind], bias=True), SMALL, [2, 1, 1])


def test_layers_of_several_kinds_and_norms_of_heads() -> None:
    kinds = ["int8", "4 bits", "int8, zero points", "float activations", "3 bits, zero points"]
    plan = plan_of(kinds, WIDE, head_norms=True, activation="gelu_tanh")
    check(plan, WIDE, [3, 1, 1])


def test_rows_on_one_side_of_zero() -> None:
    """Their integers minus the zero point do not fit 8 bits."""
    plan = plan_of(["4 bits"], bias=True)
    with torch.no_grad():
        for block in plan.blocks:
            block.value.bias += 5.0
    check(plan, SMALL, [2, 1])


@pytest.mark.parametrize("counts", [[63, 1, 1], [70, 33, 1, 28]], ids=str)
def test_blocks_of_keys(counts: list[int]) -> None:
    check(plan_of(["4 bits"], blocks=1), SMALL, counts)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 16)])
def test_quantized_caches(bits: int, group_size: int | None) -> None:
    check(plan_of(["int8"], blocks=1), SMALL, [66, 1, 3], bits=bits, group_size=group_size)


def test_recent_tokens() -> None:
    """New tokens are appended in 8 bits behind tokens of 4 bits, which stay as they are."""
    plan, tokens = plan_of(["int8"]), tokens_of(8)
    step = _step_of(plan)

    def begun() -> States:
        states = states_of(plan, 12, 4, 16, recent=True)
        old = states_of(plan, 12, 4, 16)
        computed(step, tokens, old, [3])
        return States(
            old.keys, old.values, 3, 4, 16, states.recent_keys, states.recent_values, recent=0
        )

    wanted_states = begun()
    with torch.no_grad():
        wanted = expected(plan, tokens, wanted_states, [3, 1, 4])
    for parts in ([3, 1, 4], [8]):

        def call(parts: Sequence[int] = parts) -> tuple[Tensor, ...]:
            states = begun()
            return (computed(step, tokens, states, parts), *rows_of(states))

        check_everywhere(call, (wanted, *rows_of(wanted_states)), (1, 2), parts)


def test_caches_with_gaps() -> None:
    plan, tokens = plan_of(["int8"]), tokens_of(5)
    step = _step_of(plan)
    plain = states_of(plan, 9)
    wanted = computed(step, tokens, plain, [3, 2])
    shape = 9, 3, plan.kv_heads, 30

    def side() -> list[Tensor]:
        return [torch.zeros(shape)[:, 1, :, :24].transpose(0, 1) for _ in plan.blocks]

    states = States(side(), side(), 0)
    assert_same_bits(computed(step, tokens, states, [3, 2]), wanted)
    for rows, same in zip(rows_of(states), rows_of(plain), strict=True):
        assert_same_bits(rows[:, :5].contiguous(), same[:, :5].contiguous())


def test_many_tokens() -> None:
    """More tokens than go through the blocks together."""
    sizes = Sizes(16, 1, 1, 8, 16, 8)
    plan, tokens = plan_of(["int8"], sizes, blocks=1), tokens_of(600, sizes)
    step = _step_of(plan)
    wanted = computed(step, tokens, states_of(plan, 600), [300, 1, 299])
    for count in (1, 2):
        with threads(count):
            assert_same_bits(computed(step, tokens, states_of(plan, 600), [600]), wanted)


def test_nan_of_a_later_token() -> None:
    plan, tokens = plan_of(["int8"]), tokens_of(4)
    step = _step_of(plan)
    wanted = computed(step, tokens, states_of(plan, 4), [4])
    tokens.hidden[2] = torch.nan
    got = computed(step, tokens, states_of(plan, 4), [4])
    assert_same_bits(got[:2], wanted[:2])
    assert got[2:].isnan().all()


def test_no_tokens() -> None:
    plan = plan_of(["int8"])
    assert _step_of(plan).run(*tokens_of(0), *arguments(states_of(plan, 0))).shape == (0, 48)


def test_calls_at_the_same_time() -> None:
    plan, tokens = plan_of(["4 bits"]), tokens_of(40)
    step = _step_of(plan)
    wanted = computed(step, tokens, states_of(plan, 40), [40])
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(3):
            results.append(computed(step, tokens, states_of(plan, 40), [30, 1, 9]))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 9
    for result in results:
        assert_same_bits(result, wanted)


# ---------------------------------------------------------------- refusals


def refused(match: str, kind: type[Exception] = ValueError, **changed: Any) -> None:
    """run refuses the changed argument, and has written nothing."""
    plan, tokens = plan_of(["int8"]), tokens_of(2)
    states = states_of(plan, 4, changed.get("bits", 32) if changed.get("bits") in (4, 8) else 32)
    given = {
        "hidden": tokens.hidden,
        "cos": tokens.cos,
        "sin": tokens.sin,
        "keys": states.keys,
        "values": states.values,
        "position": 0,
        **changed,
    }
    with pytest.raises(kind, match=match):
        _step_of(plan).run(**given)
    for rows in rows_of(states):
        assert rows.isnan().all() if rows.is_floating_point() else (rows == 255).all()


def test_refused_tokens() -> None:
    tokens = tokens_of(2)
    refused(
        r"hidden must be float32 on the CPU, got float64 \[2, 48\]",
        TypeError,
        hidden=tokens.hidden.double(),
    )
    refused(
        r"hidden must be \[tokens, hidden size\], got float32 \[2, 47\]",
        hidden=tokens.hidden[:, 1:],
    )
    refused("hidden must not require gradients", hidden=tokens.hidden.clone().requires_grad_())
    refused(r"cos must be \[tokens, rotated channels\]", cos=tokens.cos[:1])
    refused("cos must have an even number of channels up to head_dim = 24", **odd(tokens.cos))
    refused("sin must be", sin=tokens.sin[:, :2])


def odd(cos: Tensor) -> dict[str, Tensor]:
    return {"cos": cos[:, :3], "sin": cos[:, :3]}


def test_refused_caches() -> None:
    plan = plan_of(["int8"])
    states = states_of(plan, 4)
    short = [rows[:, :1] for rows in states.keys]
    refused("keys must have room for 2 tokens, got float32", keys=short)
    refused(r"values must be a list of 2 tensors, one for each block, got 1", values=short[:1])
    refused(r"keys must be \[2, capacity, 24\]", keys=[rows[:1] for rows in states.keys])
    refused(
        "keys must be float32 on the CPU for these bits, got float16",
        TypeError,
        keys=[rows.half() for rows in states.keys],
    )
    turned = [torch.zeros(2, 24, 4).transpose(1, 2) for _ in plan.blocks]
    refused("values must have rows without gaps, got stride 4", values=turned)
    same = [torch.zeros(2, 1, 24).expand(2, 4, 24) for _ in plan.blocks]
    refused("values must have memory for each element, got an expanded tensor", values=same)
    refused("position and recent must not be negative", position=-1)
    refused("keys must have room for 5 tokens", position=3)
    refused("at most 1048576 tokens", position=2**62)
    refused(r"bits must be 32 \(float32\), 8 or 4, got 16", bits=16)
    refused("group_size must be None for bits = 32", group_size=16)
    refused("recent must be 0 without recent_keys, got 1", recent=1)
    refused("recent_keys and recent_values must be given together", recent_keys=[])
    refused("only quantized caches have recent tokens", recent_keys=[], recent_values=[])
    refused("recent_keys must be a list of 2", recent_keys=[], recent_values=[], bits=8)


def test_refused_layers() -> None:
    good = plan_of(["int8"])
    with pytest.raises(ValueError, match="out_features of gate and up must be"):
        _step_of(with_layer(good, "gate", good.blocks[0].query))
    with pytest.raises(ValueError, match="in_features must be 80 as the layer's place wants"):
        _step_of(with_layer(good, "down", good.blocks[0].gate, index=1))


def with_layer(plan: DecoderPlan, name: str, layer: Any, index: int = 0) -> DecoderPlan:
    from dataclasses import replace

    blocks = list(plan.blocks)
    blocks[index] = replace(blocks[index], **{name: layer})
    return replace(plan, blocks=tuple(blocks))


def test_memory_that_was_replaced() -> None:
    plan, tokens = plan_of(["int8"]), tokens_of(1)
    step = _step_of(plan)
    plan.blocks[1].up.packed.share_memory_()
    with pytest.raises(ValueError, match=r"Decoder\.run: the tensors of the layers must keep"):
        step.run(*tokens, *arguments(advanced(states_of(plan, 4), 1)))
