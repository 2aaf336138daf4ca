"""The report on models of transformers: experts, tied heads, tied biases, GPT-2."""

from typing import Any

import pytest
from support.layers import outcome
from torch import nn

from torchquant import quantize_

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def of(name: str, config: str, **options: Any) -> Any:
    values = getattr(transformers, config)(**{**SIZES, **options})
    return getattr(transformers, name)(values).eval()


def test_the_experts_of_mixtral() -> None:
    model = of("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2, num_local_experts=4)
    before = total(model)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    report = quantize_(model, strict=True)
    assert report.parameters == before
    assert report.float_families["experts"] == experts > 0.8 * before
    row = report["model.layers.0.mlp.experts"]
    assert row.reason == "MixtralExperts, no integer path yet: gate_up_proj, down_proj"
    assert ("; 86 % stay in float: experts 81 %, embeddings 4 %, " in report.summary()) is True
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: MixtralExperts, no int"):
        quantize_(model, filter_fn="model.layers.*", strict=True)


def test_gpt2_does_not_grow() -> None:
    config = transformers.GPT2Config(vocab_size=2000, n_embd=128, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    before = total(model)
    report = quantize_(model)
    assert report.parameters == before
    assert report.bytes_after <= report.bytes_before
    assert "larger" not in report.summary()
    conv1d_is_quantized = report["transformer.h.0.attn.c_attn"].action == "quantized"
    assert (report["lm_head"].action == "quantized") is conv1d_is_quantized
    assert model.transformer.wte.weight.shape == (2000, 128)


def test_a_tied_head_is_copied_where_the_model_still_shrinks() -> None:
    model = of("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = total(model)
    report = quantize_(model)
    assert outcome(report)["lm_head"] == "quantized: untied from model.embed_tokens.weight"
    assert report.parameters == before
    assert report.float_families["embeddings"] == 320 * 128
    assert report.bytes_after < report.bytes_before


def test_the_tied_bias_of_bert() -> None:
    model = of("BertForMaskedLM", "BertConfig")
    before = total(model)
    report = quantize_(model)
    assert outcome(report)["cls.predictions.decoder"] == (
        "quantized: untied from bert.embeddings.word_embeddings.weight; "
        "bias tied to cls.predictions.bias"
    )
    assert report.parameters == before


def test_blocks_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    model = of("BertModel", "BertConfig", num_hidden_layers=12)
    text = str(quantize_(model))
    assert "bert" not in text
    assert "encoder.layer.{0..11}.attention.self.query" in text
    assert len(text.splitlines()) < 25
