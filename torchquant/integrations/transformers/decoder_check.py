"""Does a plan compute what the decoder computes? Compared on random tokens, block by block.

The decoder's own forward runs on a few tokens, and on a few at the end of the positions that its
configuration names. Hooks and an attention function of ours record what enters and leaves its
blocks and its attention; both are removed in any case. The plan computes the same from the same
inputs, block by block, so that differences do not add up.

Attention functions get options from their model, such as a sliding window or a limit of the scores,
which a few tokens would not show: every option that is not known to be harmless rules a plan out.
"""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.integrations.transformers import decoder_structure as structure
from torchquant.integrations.transformers.decoder_plan import (
    DecoderPlan,
    States,
    decode_reference,
    projections,
)
from torchquant.integrations.transformers.decoder_structure import Refusal

RECORDER = "torchquant_recorder"  # name of our function in transformers' registry
CACHE_NAMES = (
    "cache",
    "past_key_values",
)  # of an argument and of a result; transformers 5.24: cache
_PROMPT = 6
_FOLLOWING = 3
# Float rounding moves few activations to another integer, which changes the output of their tokens
# by 1 % and more. Half of the tokens must agree within the first, all within the second.
_TOLERANCE, _MOST = 1e-2, 0.3
_HARMLESS = frozenset(
    (
        *("dropout", "scaling", "is_causal", "position_ids", "use_cache", "cache_position"),
        *("position_embeddings", "past_key_value", *CACHE_NAMES),
        *("output_attentions", "output_hidden_states", "return_dict"),
    )
)
_recording: ContextVar[Record | None] = ContextVar("_recording", default=None)


@dataclass
class Record:
    """One run of a decoder's own forward.

    Attributes:
        queries, keys: of each attention: ``[heads, M, head_dim]``, and ``[kv_heads, T, head_dim]``.
        options: of each attention: its module's scale and further arguments.
        inputs, outputs: of each block, ``[M, hidden_size]``.
        embedded: what the embedding returned.
        tables: cos and sin, ``[M, R]``.
        result: what the forward returned.
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    embedded: Tensor | None = None
    tables: tuple[Tensor, Tensor] | None = None
    result: Any = None


@dataclass(frozen=True)
class Calls:
    """How a decoder's forward is called, and what it returns.

    Attributes:
        result: the class of its result.
        cache: the name of the cache in the result.
    """

    result: type
    cache: str


def check(decoder: Any, plan: DecoderPlan) -> Calls:
    """Compare a plan with the decoder's own forward.

    Raises:
        Refusal: they differ.
    """
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise Refusal("transformers is not installed, whose caches a step needs") from error
    try:
        cache = DynamicCache(config=decoder.config)
    except (AttributeError, TypeError) as error:
        raise Refusal(f"transformers makes no cache for its configuration: {error}") from error
    with torch.no_grad(), _recorder(decoder):
        far = _far_position(decoder)
        prompt = _run(decoder, cache, _PROMPT, None)
        following = _run(
            decoder, cache, _FOLLOWING, torch.arange(far, far + _FOLLOWING, device="cpu")[None]
        )
        _check_results((prompt, following), cache)
        for record, first in ((prompt, 0), (following, far)):
            _check_tables(decoder, plan, record, first)
        _check_blocks(plan, prompt, following)
        _check_ends(plan, prompt)
    return Calls(type(prompt.result), _cache_name(prompt.result, cache))


def tables_of(decoder: nn.Module, hidden: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, ``[M, R]``, for new tokens behind ``past`` others.

    Args:
        decoder: the module.
        hidden: float32 ``[1, M, hidden_size]``.
        past: the number of tokens before.
    """
    rotary: Any = decoder._modules[structure.ROTARY]
    positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
    cos, sin = rotary(hidden, position_ids=positions)
    return cos[0], sin[0]


def own_forward(decoder: nn.Module) -> Any:
    """The forward of a decoder's class, bound to the decoder."""
    return type(decoder).forward.__get__(decoder)


@contextlib.contextmanager
def _recorder(decoder: nn.Module) -> Iterator[None]:
    """Let the decoder's attention modules call our function."""
    _register()
    configs: dict[int, Any] = {}
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = RECORDER
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        record = _recording.get()
        if record is not None:
            record.queries.append(query[0].clone())
            record.keys.append(key[0].clone())
            record.options.append({"module": module, **options})
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(RECORDER, attention)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)


def _run(decoder: nn.Module, cache: Any, tokens: int, positions: Tensor | None) -> Record:
    """One call of the decoder's own forward, recorded; calls of other threads are not."""
    record, handles = Record(), []
    modules: Any = decoder._modules

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if _recording.get() is record:
            record.inputs.append(_hidden(args[0] if args else kwargs["hidden_states"]))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if _recording.get() is record:
            record.outputs.append(_hidden(output if isinstance(output, Tensor) else output[0]))

    def embedded(module: nn.Module, args: Any, output: Tensor) -> None:
        if _recording.get() is record:
            record.embedded = _hidden(output)

    def turned(module: nn.Module, args: Any, output: Any) -> None:
        if _recording.get() is record:
            record.tables = (output[0][0].clone(), output[1][0].clone())

    embedding = modules[structure.EMBEDDING]
    generator = torch.Generator("cpu").manual_seed(tokens)
    numbers = torch.randint(
        0, embedding.num_embeddings, (1, tokens), generator=generator, device="cpu"
    )
    token = _recording.set(record)
    try:
        for layer in modules[structure.LAYERS]:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        handles.append(embedding.register_forward_hook(embedded))
        handles.append(modules[structure.ROTARY].register_forward_hook(turned))
        given = {_cache_argument(decoder): cache, "position_ids": positions, "use_cache": True}
        record.result = own_forward(decoder)(input_ids=numbers, **given)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Refusal(
            f"its forward did not run on tokens and a cache: {type(error).__name__}: {error}"
        ) from error
    finally:
        _recording.reset(token)
        for handle in handles:
            handle.remove()
    return record


def _hidden(states: Tensor) -> Tensor:
    return states[0].clone()


def _cache_argument(decoder: nn.Module) -> str:
    names = parameters_of(decoder)
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[-1])


def parameters_of(decoder: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a decoder's own forward, in their order, without self."""
    return tuple(inspect.signature(type(decoder).forward).parameters)[1:]


def _cache_name(result: Any, cache: Any) -> str:
    for name in CACHE_NAMES:
        if getattr(result, name, None) is cache:
            return name
    raise Refusal("its forward does not return the cache that it was given")


def _check_results(records: tuple[Record, ...], cache: Any) -> None:
    for record in records:
        result = record.result
        held = {name for name in getattr(result, "keys", tuple)() if result[name] is not None}
        held -= set(CACHE_NAMES)
        if held != {"last_hidden_state"} or record.tables is None or record.embedded is None:
            names = ", ".join(sorted(held)) or type(result).__name__
            raise Refusal(f"its forward returns {names} instead of last_hidden_state and a cache")
        for options in record.options:
            _check_options(**options)
    kinds = {type(layer).__name__ for layer in cache.layers}
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if kinds != {"DynamicLayer"} or lengths != {_PROMPT + _FOLLOWING}:
        raise Refusal(f"its blocks do not keep all tokens in their caches ({', '.join(kinds)})")


def _check_options(module: nn.Module, **options: Any) -> None:
    unknown = [name for name in options if options[name] is not None and name not in _HARMLESS]
    if unknown:
        given = ", ".join(f"{name}={options[name]}" for name in unknown)
        raise Refusal(f"its attention gets {given}, which a step does not do")
    if options.get("dropout"):
        raise Refusal("its attention drops weights")
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Refusal("its attention is not causal")


def _far_position(decoder: nn.Module) -> int:
    """The first of a few positions at the end of those that a decoder is made for."""
    end = getattr(decoder.config, "max_position_embeddings", None)
    return max(_PROMPT, end - _FOLLOWING) if isinstance(end, int) else _PROMPT


def _check_tables(decoder: nn.Module, plan: DecoderPlan, record: Record, first: int) -> None:
    assert record.tables is not None
    shape = list(record.tables[0].shape)
    if len(shape) != 2 or shape[1] % 2 or shape[1] > plan.head_dim:
        raise Refusal(f"its rotary embedding has tables of the shape {shape}")
    try:
        ours = tables_of(decoder, record.inputs[0][None], first)
    except (TypeError, ValueError) as error:
        raise Refusal(f"its rotary embedding takes other arguments: {error}") from error
    if not all(map(torch.equal, ours, record.tables)):
        raise Refusal("its rotary embedding gives other values for the positions of the tokens")


def _check_blocks(plan: DecoderPlan, prompt: Record, following: Record) -> None:
    count = len(plan.blocks)
    for record in (prompt, following):
        found = len(record.options), len(record.inputs), len(record.outputs)
        if found != (count, count, count):
            raise Refusal(
                f"its forward calls {found[1]} blocks and {found[0]} attention functions, not "
                f"{count}"
            )
    for index, block in enumerate(plan.blocks):
        scale = prompt.options[index].get("scaling")
        if scale != plan.scale:
            raise Refusal(f"block {index} scales attention by {scale}, not by {plan.scale}")
        alone = replace(plan, blocks=(block,))
        shape = plan.kv_heads, _PROMPT + _FOLLOWING, plan.head_dim
        keys, values = (
            torch.empty(shape, dtype=torch.float32, device=prompt.inputs[index].device)
            for _ in range(2)
        )
        for record, position in ((prompt, 0), (following, _PROMPT)):
            assert record.tables is not None
            cos, sin = record.tables
            hidden = record.inputs[index]
            query, key, _ = projections(plan, block, hidden, cos, sin)
            _compare(index, "queries", query, record.queries[index])
            _compare(index, "keys", key, record.keys[index][:, position:])
            states = States([keys], [values], position)
            output = decode_reference(alone, hidden, cos, sin, states)
            _compare(index, "outputs", output - hidden, record.outputs[index] - hidden)


def _check_ends(plan: DecoderPlan, record: Record) -> None:
    assert record.embedded is not None
    if not torch.equal(record.embedded, record.inputs[0]):
        raise Refusal("its first block does not get what the embedding returns")
    last = record.result.last_hidden_state[0]
    if _differ(plan.final_norm(record.outputs[-1]), last):
        raise Refusal("its result is not the norm of its last block's output")


def _compare(index: int, what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise Refusal(f"block {index} has {what} {list(theirs.shape)}, not {list(ours.shape)}")
    difference = _differ(ours, theirs)
    if difference:
        raise Refusal(f"the {what} of block {index} differ by {difference} from those of a step")


def _differ(ours: Tensor, theirs: Tensor) -> str:
    """By how many percent values ``[M, size]`` or ``[heads, M, size]`` differ; empty if they agree.

    It is the median of the tokens' differences, or the largest one if only that is too large.
    """
    difference, size = ours - theirs, theirs
    if ours.dim() == 3:
        difference, size = (x.transpose(0, 1).flatten(1) for x in (difference, size))
    tokens = difference.norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-30)
    ordered = sorted(tokens.nan_to_num(torch.inf).tolist())
    median, largest = ordered[len(ordered) // 2], ordered[-1]
    if median <= _TOLERANCE:
        return f"{largest:.0%} in one token" if largest > _MOST else ""
    return f"{median:.0%}"
