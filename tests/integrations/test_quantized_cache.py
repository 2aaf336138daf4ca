"""QuantizedCache in models of transformers: values, memory, and what a cache must be able to do."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from torch import Tensor

import torchquant
from torchquant import ops

transformers = pytest.importorskip("transformers")

from torchquant.integrations.transformers import QuantizedCache  # noqa: E402
from torchquant.integrations.transformers.cached_states import CachedStates  # noqa: E402
from torchquant.integrations.transformers.kv_cache import QuantizedLayer  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(48).reshape(2, 24) * 7 % 50
CACHES = {
    "8 bits": lambda: QuantizedCache(8),
    "8 bits in groups": lambda: QuantizedCache(8, group_size=16),
    "4 bits": lambda: QuantizedCache(4, recent=4),
    "4 bits without recent ones": lambda: QuantizedCache(4, group_size=16, recent=0),
}
CLOSE = {"8 bits": 0.02, "8 bits in groups": 0.02}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"intermediate_size": 64, "num_key_value_heads": 2, **SIZES, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def mistral() -> Any:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=6
    )
    return transformers.MistralForCausalLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "mistral": mistral}


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor = IDS, prompt: int = 17, **options: Any) -> Tensor:
    """Of a prompt, and of the tokens after it one by one."""
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.cat(
        [model(part, past_key_values=cache, use_cache=True, **options).logits for part in parts], 1
    )


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    return floats(batch, 2, tokens, 64, seed=seed), floats(batch, 2, tokens, 64, seed=seed + 1)


def fill(layer: Any, key: Tensor, value: Tensor, *sizes: int) -> Any:
    for k, v in zip(key.split(sizes, 2), value.split(sizes, 2), strict=True):
        layer.update(k, v)
    return layer


def rows(layer: Any) -> list[Tensor]:
    return [part.view() for side in layer._sides for part in side.parts()]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", CACHES)
def test_models_compute_on_the_caches_values(name: str, model: Any) -> None:
    """Any attention, and the operator's: close to each other, and to a float cache."""
    net = model()
    expected = logits(net, transformers.DynamicCache())
    sdpa = logits(net, CACHES[name]())
    torchquant.replace_attention_(net)
    cache = CACHES[name]()
    with torch.profiler.profile() as profile:
        ours = logits(net, cache)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["torchquant::attention_cached"] == 7 * 2  # tokens, layers
    # The prompt's attention multiplies in bfloat16, so that later keys differ, too.
    scale = expected.std()
    assert (ours - sdpa).abs().max() < 0.1 * scale
    assert (ours - expected).std() < CLOSE.get(name, 0.2) * scale
    assert cache.get_seq_length() == 24


def test_a_decoding_step_has_the_operators_bits() -> None:
    """The same values from transformers' attention on the floats, up to 16-bit rounding."""
    layer = fill(QuantizedLayer(4, 32, 8), *states(40), 39, 1)
    query = floats(2, 4, 1, 64, seed=9) / 16
    key, value = layer.update(*states(1, 5))
    assert isinstance(key, CachedStates) and isinstance(value, CachedStates)
    ours = key.cached.attention(query, None, None)
    side = layer._sides
    expected = ops.attention_cached(
        query,
        side[0].quantized.view(),
        side[1].quantized.view(),
        4,
        32,
        recent_key=side[0].recent.view(),
        recent_value=side[1].recent.view(),
    )
    assert_same_bits(ours, expected)
    wide = [t.repeat_interleave(2, 1) for t in (layer.keys, layer.values)]
    torch.testing.assert_close(
        ours, torch.nn.functional.scaled_dot_product_attention(query, *wide), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("replaced", [False, True], ids=["sdpa", "ours"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, replaced: bool) -> None:
    model = llama().to(dtype)
    expected = logits(model, transformers.DynamicCache()).float()
    if replaced:
        torchquant.replace_attention_(model)
    got = logits(model, QuantizedCache(8))
    assert got.dtype == dtype
    assert (got.float() - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize("replaced", [False, True], ids=["sdpa", "ours"])
def test_padding_on_the_left_has_no_influence(replaced: bool) -> None:
    model = llama()
    if replaced:
        torchquant.replace_attention_(model)
    prompt = IDS[:1, :7]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), prompt], 1)
    mask = torch.ones(1, 11, dtype=torch.int64)
    mask[:, :4] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, past_key_values=QuantizedCache(8), **options)
    got = model.generate(padded, attention_mask=mask, past_key_values=QuantizedCache(8), **options)
    assert got[0, 11:].equal(expected[0, 7:])


@pytest.mark.parametrize("replaced", [False, True], ids=["sdpa", "ours"])
def test_beam_search_and_sampling(replaced: bool) -> None:
    model = llama()
    if replaced:
        torchquant.replace_attention_(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    beams = {"num_beams": 3, "do_sample": False, **options}
    got = model.generate(IDS[:, :9], past_key_values=QuantizedCache(8), **beams)
    expected = model.generate(IDS[:, :9], past_key_values=transformers.DynamicCache(), **beams)
    assert got.shape == expected.shape == (2, 17)
    assert (got == expected).float().mean() > 0.8
    several = {"num_return_sequences": 2, "do_sample": True, **options}
    assert model.generate(IDS[:, :9], past_key_values=QuantizedCache(4), **several).shape == (4, 17)


def test_compiled_models_get_the_same_values() -> None:
    model = llama(num_hidden_layers=1)
    torchquant.replace_attention_(model)
    expected = logits(model, QuantizedCache(8), IDS[:, :6], 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = logits(compiled, QuantizedCache(8), IDS[:, :6], 5)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 1, 30, 12), (49, 1)], ids=str)
@pytest.mark.parametrize("layer", [(8, None, 0), (4, 32, 8), (4, 16, 0), (4, 32, 64)], ids=str)
def test_rows_do_not_depend_on_how_tokens_were_added(layer: Any, sizes: tuple[int, ...]) -> None:
    key, value = states(50)
    expected = rows(fill(QuantizedLayer(*layer), key, value, 25, 25))
    got = rows(fill(QuantizedLayer(*layer), key, value, *sizes))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_bits(ours, theirs)


def test_recent_tokens_are_kept_in_8_bits() -> None:
    key, value = states(50)
    layer = fill(QuantizedLayer(4, 32, 8), key, value, 50)
    old = [side.quantized.tokens for side in layer._sides]
    assert old == [40, 40]
    eight = ops.dequantize_kv(ops.quantize_kv(key, 8), 64, 8)
    assert_same_bits(layer.keys[:, :, 40:], eight[:, :, 40:])
    four = ops.dequantize_kv(ops.quantize_kv(eight, 4, 32), 64, 4, 32)
    assert_same_bits(layer.keys[:, :, :40], four[:, :, :40])


def test_a_prompt_sees_itself_in_8_bits() -> None:
    key, value = states(50)
    layer = QuantizedLayer(4, 32, 8)
    keys, values = layer.update(key, value)
    assert type(keys) is Tensor
    assert_same_bits(keys, ops.dequantize_kv(ops.quantize_kv(key, 8), 64, 8))
    assert_same_bits(values, ops.dequantize_kv(ops.quantize_kv(value, 8), 64, 8))


def test_states_from_before_stay_as_they_are() -> None:
    layer = fill(QuantizedLayer(4, 32, 8), *states(30), 30)
    key, value = layer.update(*states(1, 3))
    before = layer.keys.clone(), layer.values.clone()
    for seed in range(40):
        layer.update(*states(1, seed))
    assert_same_bits(key + 0, before[0])
    assert_same_bits(value + 0, before[1])


def test_states_are_tensors_for_every_operation() -> None:
    layer = fill(QuantizedLayer(8, None, 0), *states(5), 5)
    key, value = layer.update(*states(1, 3))
    assert key.shape == (2, 2, 6, 64) and key.dtype == torch.float32 and key.dim() == 4
    for result in (key.transpose(2, 3), key[:, :, :2], torch.cat([key, value]), key.bfloat16()):
        assert type(result) is Tensor
    assert_same_bits(key[:, 1:, :, ::2], layer.keys[:, 1:, :, ::2])
    copied = torch.empty(2, 2, 6, 64).copy_(value)
    assert_same_bits(copied, layer.values)


@pytest.mark.parametrize("recent", [0, 8])
def test_crop_takes_tokens_off_the_end(recent: int) -> None:
    bits = 4 if recent else 8
    key, value = states(50)
    layer = fill(QuantizedLayer(bits, 32, recent), key, value, 50)
    before = layer.keys.clone()
    layer.crop(-3)
    assert layer.get_seq_length() == 47
    assert_same_bits(layer.keys, before[:, :, :47])
    layer.crop(0)
    layer.update(key[:, :, 47:], value[:, :, 47:])
    if not recent:
        assert_same_bits(layer.keys, before)
    layer.crop(-20)  # into the quantized rows
    assert layer.get_seq_length() == 30
    assert_same_bits(layer.keys, before[:, :, :30])
    layer.update(key[:, :, 30:31], value[:, :, 30:31])
    assert_same_bits(layer.keys[:, :, :30], before[:, :, :30])
    layer.crop(-100)
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"must be 0 or negative, got 2; crop\(-n\) removes n"):
        layer.crop(2)


def test_entries_of_the_batch_are_selected() -> None:
    cache = QuantizedCache(4, recent=8)
    for layer in range(2):
        cache.update(*states(30, layer), layer)
    before = [layer.keys.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer, keys in zip(cache.layers, before, strict=True):
        assert_same_bits(layer.keys, keys[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([3]))
    assert_same_bits(cache.layers[0].values.shape[0] * torch.ones(1), torch.ones(1))
    cache.update(*states(1, batch=1), 0)
    assert cache.get_seq_length() == 31


def test_copies_are_independent() -> None:
    cache = QuantizedCache(4, recent=8)
    cache.update(*states(30), 0)
    other = copy.deepcopy(cache)
    other.update(*states(5, 7), 0)
    assert (cache.get_seq_length(), other.get_seq_length()) == (30, 35)
    cache.update(*states(5, 7), 0)
    assert_same_bits(cache.layers[0].keys, other.layers[0].keys)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    cache.update(*states(3, batch=1), 0)
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 35)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"bits": 8}, 64 + 4),
        ({"bits": 8, "group_size": 16}, 64 + 16),
        ({"bits": 4, "recent": 0}, 32 + 8),
        ({"bits": 4, "recent": 0, "group_size": 64}, 32 + 4),
    ],
    ids=str,
)
def test_bytes_per_token(options: dict[str, Any], row: int) -> None:
    cache = QuantizedCache(**options)
    assert cache.bytes_per_token == cache.nbytes == 0
    for layer in range(3):
        cache.update(*states(100, layer), layer)
    assert cache.bytes_per_token == 3 * 2 * 2 * row  # layers, heads, keys and values
    assert cache.nbytes == 2 * 100 * cache.bytes_per_token
    held = sum(part._typed_storage()._size() for layer in cache.layers for part in rows(layer))
    assert held == cache.nbytes


def test_recent_tokens_cost_8_bits() -> None:
    cache = QuantizedCache(4)
    cache.update(*states(1000), 0)
    old, recent = 768, 232
    assert cache.bytes_per_token == 2 * 2 * 40
    assert cache.nbytes == 2 * 2 * 2 * (old * 40 + recent * 68)


def test_a_token_does_not_copy_the_cache() -> None:
    """The buffers grow by half: a thousand tokens need few of them."""
    layer = QuantizedLayer(8, None, 0)
    buffers = set()
    for token in range(1000):
        layer.update(*states(1, token, batch=1))
        buffers.add(layer._sides[0].quantized.buffer.shape[2])
    assert len(buffers) <= 9 and max(buffers) <= 1500


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "QuantizedCache: bits must be 8 or 4, got 5"),
        ({"group_size": 24}, "group_size must be None or a multiple of 16 up to 256, got 24"),
        ({"bits": 4, "recent": -1}, "recent must be None, 0 or positive, got -1"),
        ({"bits": 8, "recent": 64}, "recent must be None or 0 for bits = 8, got 64"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizedCache(**options)


def test_wrong_states_change_nothing() -> None:
    cache = QuantizedCache(4, recent=8)
    odd = floats(1, 2, 3, 33)
    with pytest.raises(ValueError, match="head_dim must be even for bits = 4, got 33"):
        cache.update(odd, odd, 0)
    assert cache.get_seq_length() == 0
    cache.update(*states(20), 0)
    before = rows(cache.layers[0])
    key, value = states(1)
    for wrong, message in (
        ((key[:1], value[:1]), "must be [2, 2, 1, 64], as the states before, got [1, 2, 1, 64]"),
        ((key, value[..., :32]), "value_states must be [2, 2, 1, 64]"),
        ((key, value[:, :, :0]), "got [2, 2, 0, 64] beside [2, 2, 1, 64]"),
        ((key[0], value[0]), "must be [batch, heads, tokens, channels]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            cache.update(*wrong, 0)
    with pytest.raises(TypeError, match="input must be float32, bfloat16 or float16, got float64"):
        cache.update(key.double(), value.double(), 0)
    for now, then in zip(rows(cache.layers[0]), before, strict=True):
        assert_same_bits(now, then)


def test_other_states_than_keys_and_values_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="use transformers' DynamicCache"):
        QuantizedCache(8).update_conv_state(torch.zeros(1), 0)
