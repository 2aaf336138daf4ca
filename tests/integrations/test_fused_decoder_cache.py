"""Caches of fused decoders: what steps and the model's own forward write, both read."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats

import torchquant

transformers = pytest.importorskip("transformers")

from support.decoders import CACHE, IDS, counted, logits, model  # noqa: E402

from torchquant.integrations.transformers import FusedCache, QuantizedCache  # noqa: E402
from torchquant.integrations.transformers.decoder_cache import FusedLayer, take  # noqa: E402
from torchquant.integrations.transformers.decoder_structure import plan_of  # noqa: E402

QUANTIZED = {
    "8 bits": lambda: QuantizedCache(8),
    "8 bits in groups": lambda: QuantizedCache(8, group_size=16),
    "4 bits": lambda: QuantizedCache(4, recent=4),
    "4 bits without recent ones": lambda: QuantizedCache(4, group_size=16, recent=0),
}
CACHES: dict[str, Any] = {
    "fused": FusedCache,
    "with room": lambda: FusedCache(capacity=256),
    "dynamic": transformers.DynamicCache,
    **QUANTIZED,
}
CLOSE = {"4 bits": 0.25, "4 bits without recent ones": 0.3}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A fused model, and the same model with its own forward and attention to integers."""
    net, own = model(), model()
    torchquant.fuse_decoder_(net)
    torchquant.replace_attention_(own)
    return net, own


@pytest.mark.parametrize("name", CACHES)
def test_both_forwards_go_on_with_the_others_tokens(
    name: str, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, own = pair
    expected = logits(net, CACHES[name](), IDS, 9, 10, 11)
    for first, second in ((net, own), (own, net)):
        cache = CACHES[name]()
        with counted(monkeypatch) as calls:
            parts = [logits(first, cache, IDS[:, :9]), logits(second, cache, IDS[:, 9:10])]
            parts += [logits(first, cache, IDS[:, 10:11]), logits(second, cache, IDS[:, 11:])]
        assert calls == ([9, 1] if first is net else [1, IDS.shape[1] - 11])
        assert cache.get_seq_length() == IDS.shape[1]
        got = torch.cat(parts, 1)
        assert (got - expected).norm() <= CLOSE.get(name, 0.05) * expected.norm()


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_caches_hold_the_rows_of_the_models_forward(
    name: str, pair: tuple[Any, Any]
) -> None:
    """In the first block, whose keys do not depend on attention."""
    net, own = pair
    ours, theirs = QUANTIZED[name](), QUANTIZED[name]()
    logits(net, ours, IDS, 9, 10, 11)
    logits(own, theirs, IDS, 9, 10, 11)
    for got, expected in zip(ours.layers[0].parts(), theirs.layers[0].parts(), strict=True):
        assert [rows.tokens for rows in got] == [rows.tokens for rows in expected]
        for one, other in zip(got, expected, strict=True):
            assert (one.view() != other.view()).float().mean() < 0.01


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_caches_are_as_close_as_in_the_models_forward(
    name: str, pair: tuple[Any, Any]
) -> None:
    net, own = pair
    expected = logits(own, FusedCache(), IDS, 9, 10, 11)
    ours, theirs = (logits(m, QUANTIZED[name](), IDS, 9, 10, 11) for m in (net, own))
    assert (ours - expected).norm() <= 1.5 * (theirs - expected).norm()


def test_a_step_reads_the_rows_that_the_models_forward_reads(pair: tuple[Any, Any]) -> None:
    """The eighth token moves the first four to 4 bits, before attention reads them."""
    net, own = pair
    cache = QuantizedCache(4, recent=4)
    logits(own, cache, IDS[:, :7])
    twin = copy.deepcopy(cache)
    got, expected = logits(net, cache, IDS[:, 7:8]), logits(own, twin, IDS[:, 7:8])
    assert [rows.tokens for rows in cache.layers[0].parts()[0]] == [4, 4]
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_a_dynamic_cache_keeps_its_tokens(pair: tuple[Any, Any]) -> None:
    net, own = pair
    cache = transformers.DynamicCache(config=net.config)
    logits(own, cache, IDS[:, :9])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    held = [layer.keys for layer in cache.layers]
    logits(net, cache, IDS[:, 9:])
    assert {type(layer) for layer in cache.layers} == {FusedLayer}
    assert cache.get_seq_length() == IDS.shape[1]
    for layer, (keys, values), old in zip(cache.layers, before, held, strict=True):
        assert_same_bits(layer.keys[:, :, :9], keys)
        assert_same_bits(layer.values[:, :, :9], values)
        assert_same_bits(old, keys)


@pytest.mark.parametrize("name", CACHES)
def test_copies_of_a_cache_are_independent(name: str, pair: tuple[Any, Any]) -> None:
    net, _ = pair
    cache = CACHES[name]()
    logits(net, cache, IDS[:, :9])
    twin = copy.deepcopy(cache)
    rest = logits(net, cache, IDS[:, 9:11])
    other = logits(net, twin, IDS.flip(1)[:, :2])
    whole = logits(net, CACHES[name](), IDS[:, :11], 9)
    assert torch.equal(rest, whole[:, 9:]) and not torch.equal(rest, other)
    assert cache.get_seq_length() == twin.get_seq_length() == 11


@pytest.mark.parametrize("name", CACHES)
def test_both_forwards_write_into_a_cache_from_a_pickle(name: str, pair: tuple[Any, Any]) -> None:
    net, own = pair
    cache = CACHES[name]()
    logits(net, cache, IDS[:, :9])
    loaded = pickle.loads(pickle.dumps(cache))
    for step, one in ((9, net), (10, own), (11, net), (12, own)):
        got, expected = (logits(one, c, IDS[:, step : step + 1]) for c in (loaded, cache))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_wide_heads(bits: int) -> None:
    """Rows of more than 256 channels have several scales."""
    net = model(head_dim=320, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    expected = logits(net, QuantizedCache(bits), IDS, 9, 10)
    torchquant.fuse_decoder_(net)
    got = logits(net, QuantizedCache(bits), IDS, 9, 10)
    assert (got - expected).norm() <= 0.1 * expected.norm()


def caches_that_are_not_served() -> dict[str, Any]:
    batch = transformers.DynamicCache()
    for index in range(2):
        batch.update(torch.zeros(2, 2, 3, 32), torch.zeros(2, 2, 3, 32), index)
    uneven = FusedCache()
    for index in range(2):
        tokens = torch.zeros(1, 2, 3 + index, 32)
        uneven.update(tokens, tokens, index)
    wide = FusedCache()
    for index in range(2):
        wide.update(torch.zeros(1, 2, 3, 32).double(), torch.zeros(1, 2, 3, 32).double(), index)
    return {"a batch": batch, "uneven blocks": uneven, "float64": wide}


@pytest.mark.parametrize("name", caches_that_are_not_served())
def test_other_caches_are_left_as_they_are(name: str, pair: tuple[Any, Any]) -> None:
    cache = caches_that_are_not_served()[name]
    before = copy.deepcopy(cache)
    assert take(cache, plan_of(pair[0].model), 1) is None
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert type(layer) is type(old)
        assert_same_bits(layer.keys.float(), old.keys.float())


@pytest.mark.parametrize("name", ["fused", "8 bits", "4 bits"])
def test_a_step_that_fails_leaves_the_tokens(
    name: str, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = pair
    expected = logits(net, CACHES[name](), IDS[:, :12], 9, 10, 11)
    cache = CACHES[name]()
    parts = [logits(net, cache, IDS[:, :9]), logits(net, cache, IDS[:, 9:10])]

    def fail(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            torchquant.integrations.transformers.decoder_forward.FusedForward, "run", fail
        )
        with pytest.raises(KeyboardInterrupt):
            logits(net, cache, IDS[:, 10:11])
    assert cache.get_seq_length() == 10
    parts += [logits(net, cache, IDS[:, 10:11]), logits(net, cache, IDS[:, 11:12])]
    assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("name", CACHES)
def test_beams_and_batches(name: str, pair: tuple[Any, Any]) -> None:
    net, _ = pair
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    beams = net.generate(IDS, num_beams=2, **{CACHE: CACHES[name]()}, **options)
    assert beams.shape == (1, IDS.shape[1] + 4)
    cache = CACHES[name]()
    logits(net, cache, IDS[:, :4])
    cache.crop(-4)
    two = net.generate(IDS.expand(2, -1), **{CACHE: cache}, **options)
    assert torch.equal(two[0], two[1])


# ---------------------------------------------------------------- layers


def states(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return floats(2, 2, tokens, 8, seed=seed), floats(2, 2, tokens, 8, seed=seed + 1)


def test_layers_do_what_transformers_layers_do() -> None:
    ours, theirs = FusedLayer(), transformers.cache_utils.DynamicLayer()

    def same() -> None:
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
        if theirs.keys is None:
            assert ours.keys is None and ours.values is None
            return
        assert_same_bits(ours.keys, theirs.keys)
        assert_same_bits(ours.values, theirs.values)

    same()
    for tokens in (3, 1, 1, 80, 1):
        for result, expected in zip(
            ours.update(*states(tokens)), theirs.update(*states(tokens)), strict=True
        ):
            assert_same_bits(result, expected)
    for method, argument in (
        ("crop", -5),
        ("crop", 0),
        ("reorder_cache", torch.tensor([1, 0])),
        ("update", states(2, 5)),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([0, 3])),
        ("update", states(1, 7)),
    ):
        for layer in (ours, theirs):
            getattr(layer, method)(*argument if method == "update" else (argument,))
        same()
    for layer in (ours, theirs):
        layer.reset()
    same()


def test_states_from_before_stay_as_they_are() -> None:
    layer = FusedLayer()
    keys, values = layer.update(*states(5))
    before = keys.clone(), values.clone()
    layer.crop(-2)
    for seed in range(70):
        layer.update(*states(1, seed))
    assert_same_bits(keys, before[0])
    assert_same_bits(values, before[1])


def test_gradients_reach_the_states() -> None:
    layer = FusedLayer()
    layer.update(*states(3))
    key, value = (x.requires_grad_() for x in states(2, 5))
    keys, values = layer.update(key, value)
    (keys.sum() + 2 * values.sum()).backward()
    assert math.isclose(key.grad.sum(), key.numel()) and float(value.grad.max()) == 2
    keys, _ = layer.update(*states(1, 7))
    assert keys.shape[2] == 6


def test_gradients_of_queries_alone() -> None:
    """Autograd keeps the keys and values of a call, which later calls do not change."""
    layer, cat = FusedLayer(), transformers.cache_utils.DynamicLayer()
    query = floats(2, 2, 1, 8, seed=9)
    gradients = []
    for one in (layer, cat):
        own, results = query.clone().requires_grad_(), []
        for seed in range(3):
            keys, values = one.update(*states(1, seed))
            results.append(((own @ keys.mT).softmax(-1) @ values).sum())
        sum(results).backward()
        gradients.append(own.grad)
    assert_same_bits(*gradients)


def test_a_token_does_not_copy_the_cache() -> None:
    layer = FusedLayer()
    buffers = set()
    with torch.inference_mode():
        layer.update(*states(3))
    for seed in range(1000):
        layer.update(*states(1, seed))  # outside of inference mode
        buffers.add(layer.rows[0].buffer.shape[2])
    assert len(buffers) <= 9 and max(buffers) <= 1600
    layer = FusedLayer(2000)
    layer.update(*states(3))
    assert layer.rows[1].buffer.shape[2] == 2000


@pytest.mark.parametrize("capacity", [-1, 1.5, True])
def test_wrong_capacities(capacity: Any) -> None:
    with pytest.raises(ValueError, match="FusedCache: capacity must be 0 or a positive int, got"):
        FusedCache(capacity)
