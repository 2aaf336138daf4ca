"""Models whose decoders are not fused, each with its reason; refused models are unchanged."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchquant

transformers = pytest.importorskip("transformers")

from support.decoders import IDS, Static, logits, model  # noqa: E402

from torchquant.integrations.transformers import decoder_check, decoder_forward  # noqa: E402

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "float": (
        "Llama",
        {"configuration": None},
        "layers.0.self_attn.q_proj is a Linear and no quantized linear layer; call",
    ),
    "a sliding window": (
        "Mistral",
        {"sliding_window": 4096},
        "its attention gets sliding_window=4096, which a step does not do",
    ),
    "a sliding window of some blocks": (
        "Qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
        "layers.1.self_attn has a sliding window (64)",
    ),
    "norms of 1 + w": ("Gemma", {}, "layers.0.input_layernorm (GemmaRMSNorm) is no RMSNorm with"),
    "more norms": ("Gemma2", {}, "layers.0 (Gemma2DecoderLayer) has further parts: pre_feed"),
    "projections in one": ("Phi3", {}, "layers.0.self_attn (Phi3Attention) has no"),
    "experts": ("Mixtral", {}, "layers.0.mlp (MixtralSparseMoeBlock) has no gate_proj"),
    "a step without rotary embedding": (
        "SmolLM3",
        {"num_hidden_layers": 4},
        "the queries of block 3 differ by",
    ),
    "channels turned in pairs": ("Ernie4_5", {}, "the queries of block 0 differ by"),
    "factors of residuals": (
        "Granite",
        {"residual_multiplier": 0.3},
        "the outputs of block 0 differ by",
    ),
    "factors of embeddings": (
        "Granite",
        {"embedding_multiplier": 3.0},
        "its first block does not get what the embedding returns",
    ),
    "queries that are scaled by their position": (
        "Ministral3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 64,
            }
        },
        "the queries of block 0 differ by",
    ),
    "training": ("Llama", {}, "it is in training mode; call model.eval()"),
    "bfloat16": ("Llama", {}, "works in bfloat16; call model.float()"),
    "hidden states": ("Llama", {"output_hidden_states": True}, "its configuration asks for output"),
}


@pytest.mark.parametrize("name", MODELS)
def test_refusals(name: str) -> None:
    kind, options, reason = MODELS[name]
    net = model(kind, **options)
    if name == "training":
        net.train()
    if name == "bfloat16":
        net.to(torch.bfloat16)
    before = dict(vars(net.config))
    wanted = f"got {type(net).__name__}: "
    with pytest.raises(ValueError, match=re.escape(wanted) + ".*" + re.escape(reason)):
        torchquant.fuse_decoder_(net)
    assert "forward" not in vars(net.model)
    assert vars(net.config) == before


def test_tables_of_the_rotary_embedding_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tables_of = model(), decoder_check.tables_of
    with monkeypatch.context() as patch:
        patch.setattr(decoder_check, "tables_of", lambda net, x, past: tables_of(net, x, past + 1))
        with pytest.raises(ValueError, match="its rotary embedding gives other values"):
            torchquant.fuse_decoder_(net)


def test_attention_that_is_not_causal() -> None:
    net = model()
    net.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="its attention is not causal"):
        torchquant.fuse_decoder_(net)


def test_other_modules() -> None:
    with pytest.raises(ValueError, match="got Linear: no module has blocks with self_attn and mlp"):
        torchquant.fuse_decoder_(nn.Linear(2, 2))
    for verb in (torchquant.fuse_decoder_, torchquant.unfuse_decoder_):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            verb(1)  # type: ignore[arg-type]


def test_a_decoder_of_another_library() -> None:
    net = model().model
    net.config = SimpleNamespace(max_position_embeddings=64)
    with pytest.raises(ValueError, match="transformers makes no cache for its configuration"):
        torchquant.fuse_decoder_(net)
    net.config = {}
    with pytest.raises(ValueError, match="no module has blocks with self_attn and mlp"):
        torchquant.fuse_decoder_(net)


def test_a_model_of_several_decoders_has_rows_with_reasons() -> None:
    both = nn.ModuleDict({"small": model(), "other": model(configuration=None)})
    report = torchquant.fuse_decoder_(both)
    assert repr(report) == "<DecoderReport: 2 of 4 blocks fused>"
    left = report["other.model.layers.1"]
    assert left.action == "left" and left.reason.startswith("layers.0.self_attn.q_proj is a Linear")
    assert report["small.model.layers.0"].action == "fused"


def test_a_decoder_that_no_step_takes_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = nn.ModuleDict({"other": model(), "small": model()})
    step_of, plans = decoder_forward._step_of, []

    def refuse_the_first(plan: Any) -> Any:
        plans.append(plan)
        if len(plans) == 1:
            raise ValueError("Decoder: bias must have a value for each channel")
        return step_of(plan)

    monkeypatch.setattr(decoder_forward, "_step_of", refuse_the_first)
    report = torchquant.fuse_decoder_(both)
    assert repr(report) == "<DecoderReport: 2 of 4 blocks fused>"
    left = report["other.model.layers.0"]
    assert left.action == "left"
    assert left.reason == "ValueError: Decoder: bias must have a value for each channel"
    assert "forward" not in vars(both["other"].model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ValueError])
def test_an_interrupted_comparison_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    expected = logits(net)
    implementation = net.config._attn_implementation
    calls = 0

    def fail(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("stop")
        return attention(*given, **options)

    from transformers.integrations import sdpa_attention

    attention = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", fail)
    raised = KeyboardInterrupt if error is KeyboardInterrupt else ValueError
    with pytest.raises(raised, match="stop"):
        torchquant.fuse_decoder_(net)
    monkeypatch.undo()
    assert net.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert decoder_check._recording.get() is None
    assert torch.equal(logits(net), expected)


def test_a_plan_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a plan is compared: a wrong number in it is found."""
    from dataclasses import replace

    from torchquant.integrations.transformers import decoder_structure
    from torchquant.integrations.transformers.decoder_plan import Norm

    net = model("Qwen3")
    plan = decoder_structure.plan_of(net.model)
    block = plan.blocks[1]
    loud = Norm(torch.full((64,), 3.0), 1e-6)
    for wrong, reason in (
        (replace(plan, activation="gelu"), "the outputs of block 0"),
        (replace(plan, scale=0.5), "block 0 scales attention by"),
        (replace(plan, final_norm=loud), "its result is not the norm"),
        (replace(plan, blocks=plan.blocks[:1]), "calls 2 blocks and 2 attention functions, not 1"),
        *(
            (replace(plan, blocks=(plan.blocks[0], replace(block, **part))), reason)
            for part, reason in (
                ({"input_norm": Norm(block.post_norm.weight, 1e-6)}, "the queries of block 1"),
                ({"key_norm": None}, "the keys of block 1"),
                ({"value": block.key}, "the outputs of block 1"),
                ({"post_norm": block.input_norm}, "the outputs of block 1"),
                ({"gate": block.up, "up": block.gate}, "the outputs of block 1"),
                ({"output": plan.blocks[0].output}, "the outputs of block 1"),
            )
        ),
    ):
        with pytest.raises(decoder_structure.Refusal, match=reason):
            decoder_check.check(net.model, wrong)
    decoder_check.check(net.model, plan)


def test_regions_with_int8_values_are_not_fused() -> None:
    """Values between the layers of a converted model are int8; a step would keep them in float."""
    net = model(configuration=None)
    torchquant.prepare_(net, Static())
    torchquant.calibrate(net, [{"input_ids": IDS}])
    torchquant.convert_(net)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.forward was replaced"):
        torchquant.fuse_decoder_(net)
