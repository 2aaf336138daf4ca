"""replace_attention_ and restore_attention_: which modules are served, and the way back."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import run_python
from torch import nn

import torchquant

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(30).reshape(2, 15)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64, **options)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


def falcon() -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)).eval()


def detr() -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    return transformers.DetrForObjectDetection(config).eval()


def implementations(model: nn.Module) -> dict[str, Any]:
    configs = {name: getattr(m, "config", None) for name, m in model.named_modules()}
    return {
        name: config._attn_implementation
        for name, config in configs.items()
        if hasattr(config, "_attn_implementation")
    }


def test_a_row_per_attention_module() -> None:
    report = torchquant.replace_attention_(llama())
    assert repr(report) == "<AttentionReport: 2 of 2 attention modules replaced>"
    assert [row.name for row in report.rows] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert report["model.layers.1.self_attn"].kind == "LlamaAttention"
    assert report.changed == report.rows


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (t5, "it adds a position bias to the attention weights, which the operator does not do"),
        (bloom, "BloomModel does not support 'sdpa', which is what is replaced"),
        (falcon, "it computes attention itself, without looking up a function"),
    ],
)
def test_models_that_cannot_be_served_are_told_the_reason(make: Any, reason: str) -> None:
    model = make()
    before = implementations(model)
    report = torchquant.replace_attention_(model)
    assert report.rows
    assert {row.action for row in report.rows} == {"left"}
    assert {row.reason for row in report.rows} == {reason}
    assert implementations(model) == before


def test_code_that_compares_the_name_is_left() -> None:
    """Another name would take another branch in the model's own code."""
    config = transformers.GemmaConfig(**SIZES, intermediate_size=64, head_dim=8)
    model = transformers.GemmaForCausalLM(config)
    module = sys.modules[type(model).__module__]
    source = Path(str(module.__file__)).read_text()
    from torchquant.integrations.transformers import attention_modules

    assert attention_modules._COMPARISON.search(source) is None
    for text in (
        'if self.config._attn_implementation in ("eager", "sdpa"):',
        'if self.config._attn_implementation == "sdpa" and not output_attentions:',
        "x = config._attn_implementation != 'sdpa'",
    ):
        assert attention_modules._COMPARISON.search(text)
    model_ = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    assert attention_modules._asks_for_the_name(model_.DeepseekV32Attention)


def test_an_implementation_that_the_user_chose_stays() -> None:
    model = llama(attn_implementation="eager")
    with pytest.raises(ValueError, match="must use attention implementation 'sdpa', got 'eager'"):
        torchquant.replace_attention_(model)
    assert set(implementations(model).values()) == {"eager"}


def test_parts_keep_the_implementation_that_they_had() -> None:
    model = detr()
    before = implementations(model)
    assert set(before.values()) == {"sdpa", "eager"}
    report = torchquant.replace_attention_(model)
    assert len(report.changed) == 3
    assert set(implementations(model).values()) == {"torchquant", "eager"}
    report = torchquant.restore_attention_(model)
    assert repr(report) == "<AttentionReport: 3 of 3 attention modules restored>"
    assert implementations(model) == before


def test_undo() -> None:
    model = llama()
    with torch.inference_mode():
        expected = model(IDS).logits
        torchquant.replace_attention_(model)
        new = model(IDS).logits
        twin = copy.deepcopy(model)
        assert not torch.equal(new, expected)
        assert torch.equal(twin(IDS).logits, new)
        for one in (model, twin):
            torchquant.restore_attention_(one)
            assert torch.equal(one(IDS).logits, expected)
    assert torchquant.restore_attention_(model).rows == ()


def test_saved_configurations_do_not_have_the_name(tmp_path: Path) -> None:
    model = llama()
    torchquant.replace_attention_(model)
    model.save_pretrained(tmp_path)
    assert "torchquant" not in (tmp_path / "config.json").read_text()


def test_another_process_can_use_the_model(tmp_path: Path) -> None:
    """A process that gets the model by pickle has not registered the function."""
    model = llama()
    torchquant.replace_attention_(model)
    with torch.inference_mode():
        expected = model(IDS).logits
    (tmp_path / "model").write_bytes(pickle.dumps((model, IDS, expected)))
    code = f"""
import pickle, torch
from pathlib import Path
model, ids, expected = pickle.loads(Path({str(tmp_path / "model")!r}).read_bytes())
with torch.inference_mode():
    assert torch.equal(model(ids).logits, expected)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_compiled() -> None:
    model = llama()
    torchquant.replace_attention_(model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("verb", [torchquant.replace_attention_, torchquant.restore_attention_])
def test_the_model_must_be_of_transformers(verb: Any) -> None:
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        verb(nn.Linear(2, 2))
