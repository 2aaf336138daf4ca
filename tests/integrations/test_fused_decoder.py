"""fuse_decoder_: which models are fused, what they compute, which calls run the model's forward."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import torchquant

transformers = pytest.importorskip("transformers")

from support.decoders import CACHE, CONFIGURATIONS, IDS, counted, logits, model  # noqa: E402

from torchquant.integrations.transformers import decoder_structure  # noqa: E402
from torchquant.integrations.transformers.decoder_forward import forward_of  # noqa: E402

# A value between two integers of an activation may be rounded otherwise after float rounding.
CLOSE = 2e-2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with another activation": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "one head for each query": ("Llama", {"num_key_value_heads": 4}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2, biases of q, k, v": ("Qwen2", {}),
    "Qwen3, norms of heads": ("Qwen3", {}),
    "SmolLM3": ("SmolLM3", {}),
    "Granite": ("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "SeedOss": ("SeedOss", {}),
}


def near(got: torch.Tensor, expected: torch.Tensor, allowed: float = CLOSE) -> bool:
    return bool((got - expected).norm() <= allowed * expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = MODELS[name]
    net = model(kind, **options)
    expected = logits(net)
    report = torchquant.fuse_decoder_(net)
    assert repr(report) == "<DecoderReport: 2 of 2 blocks fused>"
    assert [row.name for row in report] == ["model.layers.0", "model.layers.1"]
    with counted(monkeypatch) as calls:
        got = logits(net, None, IDS, 9, 10, 11)
    assert calls == [9, 1, 1, IDS.shape[1] - 11]
    assert near(got, expected) and got.dtype == expected.dtype


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_configurations(configuration: str) -> None:
    net = model(configuration=configuration)
    expected = logits(net)
    torchquant.fuse_decoder_(net)
    assert near(logits(net, None, IDS, 9), expected)


def test_another_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    expected = logits(net)
    torch.set_default_dtype(torch.float64)
    try:
        torchquant.fuse_decoder_(net)
        with counted(monkeypatch) as calls:
            assert near(logits(net, None, IDS, 9), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls == [9, IDS.shape[1] - 9]


def test_tokens_have_the_same_bits_in_every_call() -> None:
    net = model("Qwen3")
    torchquant.fuse_decoder_(net)
    whole = logits(net)
    assert torch.equal(logits(net, None, IDS, 5, 6, 7, 16), whole)
    assert torch.equal(logits(net, None, IDS[:, :6], *range(1, 6)), whole[:, :6])


def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    expected = net.generate(IDS, do_sample=False, **options)
    torchquant.fuse_decoder_(net)
    with counted(monkeypatch) as calls:
        assert torch.equal(net.generate(IDS, do_sample=False, **options), expected)
        assert calls == [IDS.shape[1]] + [1] * 4
        assert net.generate(IDS, do_sample=True, **options).shape == expected.shape
        assert len(calls) == 10
        mask = torch.ones_like(IDS)
        net.generate(IDS, attention_mask=mask, do_sample=False, **options)
        assert len(calls) == 15


def test_calls_that_steps_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    with torch.no_grad():
        expected = net(IDS)
        embedded = net.model.embed_tokens(IDS)
        torchquant.fuse_decoder_(net)
        with counted(monkeypatch) as calls:
            assert near(net(IDS).logits, expected.logits)
            assert getattr(net(IDS, use_cache=False), CACHE) is None
            assert near(net(IDS, return_dict=False)[0], expected.logits)
            assert near(net(inputs_embeds=embedded).logits, expected.logits)
            strided = embedded.transpose(1, 2).contiguous().transpose(1, 2)
            assert near(net(inputs_embeds=strided).logits, expected.logits)
            assert near(net(IDS, logits_to_keep=2).logits, expected.logits[:, -2:])
            assert near(net(IDS, labels=IDS).loss, net(IDS, labels=IDS).loss)
            positions = torch.arange(IDS.shape[1])[None]
            assert near(net(IDS, None, positions).logits, expected.logits)
            state = net.model(IDS).last_hidden_state
            assert near(net.lm_head(state), expected.logits)
    assert calls == [IDS.shape[1]] * 10


OTHERS: dict[str, dict[str, Any]] = {
    "two sequences": {"input_ids": IDS.expand(2, -1)},
    "padding": {"attention_mask": torch.tensor([[0] * 3 + [1] * 16])},
    "a mask of four dimensions": {"attention_mask": torch.zeros(1, 1, 19, 19).triu(1) - 1e9},
    "other positions": {"position_ids": torch.arange(5, 24)[None]},
    "hidden states": {"output_hidden_states": True},
    "attention weights": {"output_attentions": True},
    "a static cache": {CACHE: "static"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_run_the_models_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin = model(), model()
    torchquant.fuse_decoder_(net)
    if name == "attention weights":
        for one in (net, twin):
            one.set_attn_implementation("eager")
    results = []
    with counted(monkeypatch) as calls, torch.no_grad():
        for one in (net, twin):
            given = {"input_ids": IDS, **OTHERS[name]}
            if given.get(CACHE) == "static":
                given[CACHE] = transformers.StaticCache(config=net.config, max_cache_len=32)
            results.append(one(**given))
        assert calls == []
        assert torch.equal(results[0].logits, results[1].logits)
        for field in ("hidden_states", "attentions"):
            found = results[0].get(field)
            assert (found is None) == (results[1].get(field) is None)
            assert found is None or all(map(torch.equal, found, results[1][field]))
        assert near(net(IDS).logits, twin(IDS).logits)
        assert len(calls) == 1  # afterwards steps serve calls as before


def test_global_hooks_and_collectors_of_outer_models_run_the_models_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing = pytest.importorskip("transformers.utils.output_capturing")
    net = model()
    torchquant.fuse_decoder_(net)
    seen: list[str] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(type(module).__name__)

    with counted(monkeypatch) as calls:
        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            logits(net)
        finally:
            handle.remove()
        assert seen.count("LlamaDecoderLayer") == 2
        token = capturing._active_collector.set({"hidden_states": []})
        try:
            logits(net)
        finally:
            capturing._active_collector.reset(token)
        assert calls == []
        logits(net)
    assert len(calls) == 1


def test_threads_share_a_fused_model() -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    expected = logits(net)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda cut: logits(net, None, IDS, cut), range(4, 12)))
    assert all(torch.equal(result, expected) for result in results)


def test_assisted_generation() -> None:
    """Candidates that are not accepted are cropped from the cache."""
    net = model()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = net.generate(IDS, **options)
    torchquant.fuse_decoder_(net)
    assert torch.equal(net.generate(IDS, prompt_lookup_num_tokens=3, **options), expected)


def test_a_step_at_another_position_runs_the_models_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, twin = model(), model()
    torchquant.fuse_decoder_(net)
    results = []
    with counted(monkeypatch) as calls, torch.no_grad():
        for one in (net, twin):
            cache = transformers.DynamicCache()
            one(IDS, use_cache=True, **{CACHE: cache})
            given = {CACHE: cache, "position_ids": torch.tensor([[40]])}
            results.append(one(IDS[:, :1], use_cache=True, **given).logits)
    assert calls == [IDS.shape[1]] and near(*results)


def test_gradients_training_and_autocast_run_the_models_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    with counted(monkeypatch) as calls:
        assert net(IDS).logits.requires_grad
        with torch.no_grad():
            net.train()(IDS)
            net.eval()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                net(IDS)
            assert calls == []
            net(IDS)
        with torch.inference_mode():
            net(IDS)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_compiled_model_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(num_hidden_layers=1)
    torchquant.fuse_decoder_(net)
    expected = logits(net)
    torch._dynamo.reset()
    with counted(monkeypatch) as calls, torch.no_grad():
        compiled = torch.compile(net, backend="eager")
        assert near(compiled(IDS, use_cache=False).logits, expected)
        assert calls == []


# ---------------------------------------------------------------- the way back, copies


def test_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    expected = logits(net)
    cache = transformers.DynamicCache()
    torchquant.fuse_decoder_(net)
    assert repr(torchquant.fuse_decoder_(net)) == "<DecoderReport: 2 of 2 blocks fused>"
    fused = logits(net, cache, IDS[:, :9])
    report = torchquant.unfuse_decoder_(net)
    assert repr(report) == "<DecoderReport: 2 of 2 blocks restored>"
    assert "forward" not in vars(net.model)
    with counted(monkeypatch) as calls:
        assert torch.equal(logits(net), expected)
        rest = logits(net, cache, IDS[:, 9:])  # the cache stays valid
    assert calls == [] and near(torch.cat((fused, rest), 1), expected)
    assert torchquant.unfuse_decoder_(net).rows == ()


def test_copies_and_pickles_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    expected = logits(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        forward = forward_of(other.model)
        assert forward is not None and forward.decoder is other.model
        with counted(monkeypatch) as calls:
            assert torch.equal(logits(other), expected)
        assert calls == [IDS.shape[1]]
        other.model.layers[0].mlp.down_proj.qweight_scale.mul_(2)
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(net), expected)


def test_state_dicts_and_files_do_not_hold_the_fusion(tmp_path: Any) -> None:
    net = model()
    names = list(net.state_dict())
    torchquant.fuse_decoder_(net)
    assert list(net.state_dict()) == names
    expected = logits(net)
    torchquant.save(net, tmp_path / "model")
    loaded = torchquant.load(tmp_path / "model", model(configuration=None))
    assert forward_of(loaded.model) is None
    torchquant.fuse_decoder_(loaded)
    assert torch.equal(logits(loaded), expected)


# ---------------------------------------------------------------- changes


def lora(net: Any) -> None:
    net.model.layers[1].self_attn.q_proj = nn.Linear(64, 128, bias=False).eval()


def replace_forward(net: Any) -> None:
    mlp = net.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def hook(net: Any) -> None:
    net.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, y: 2 * y)


def scale_attention(net: Any) -> None:
    net.model.layers[0].self_attn.scaling = 0.5


def drop_a_block(net: Any) -> None:
    net.config.num_hidden_layers = 1


def train_a_part(net: Any) -> None:
    net.model.layers[0].self_attn.train()


REASONS = {
    lora: "layers.1.self_attn.q_proj is a Linear and no quantized linear layer",
    replace_forward: "layers.0.mlp.forward was replaced",
    hook: "layers.0.self_attn.o_proj has hooks",
    scale_attention: "its blocks differ in heads, scale or activation",
    drop_a_block: "its configuration names 1 of 2 blocks",
    train_a_part: "layers.0.self_attn is in training mode",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_changes_run_the_models_forward(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin = model(), model()
    torchquant.fuse_decoder_(net)
    before = logits(net)
    torch.manual_seed(1)
    change(net)
    torch.manual_seed(1)
    change(twin)
    with counted(monkeypatch) as calls:
        with pytest.warns(RuntimeWarning, match="its own forward runs instead") as warned:
            got = logits(net)
        assert str(warned[0].message).startswith(f"model: {REASONS[change]}")
        monkeypatch.setattr(decoder_structure, "plan_of", lambda *given: pytest.fail("read again"))
        assert torch.equal(logits(net), got)  # and warns once
    assert calls == []
    assert torch.equal(got, logits(twin))
    assert change is train_a_part or not near(got, before)


def test_harmless_changes_are_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    with counted(monkeypatch) as calls:
        handle = net.model.layers[0].register_forward_hook(lambda *given: None)
        with pytest.warns(RuntimeWarning, match=r"model: layers\.0 has hooks"):
            logits(net)
        handle.remove()
        logits(net)
        assert calls == [IDS.shape[1]]
        for layer in net.model.layers:
            layer.self_attn.scaling = 0.5
        twin = model()
        for layer in twin.model.layers:
            layer.self_attn.scaling = 0.5
        assert near(logits(net), logits(twin))
        norm = net.model.layers[0].input_layernorm
        with torch.no_grad():
            norm.weight.mul_(2)
            twin.model.layers[0].input_layernorm.weight.mul_(2)
        assert near(logits(net), logits(twin))
        assert len(calls) == 3
        net.to(torch.bfloat16)
        with torch.no_grad():
            assert net(IDS).logits.dtype == torch.bfloat16
        assert len(calls) == 3


def test_a_state_dict_is_loaded_into_a_fused_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = model(), model("Llama", "int8", hidden_act="silu", initializer_range=0.1)
    torchquant.fuse_decoder_(net)
    net.load_state_dict(other.state_dict())
    with counted(monkeypatch) as calls:
        assert near(logits(net), logits(other))
    assert calls == [IDS.shape[1]]
