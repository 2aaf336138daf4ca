"""Embeddings in quantize_: which are quantized, which share a weight with the output layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchquant.graph.modules import tensor_bytes
from torchquant.nn import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedIntxLinear
from torchquant.report.words import human_bytes

IDS = torch.tensor([[1, 99, 4], [4, 0, 7]])
FOUR = IntxWeightOnlyConfig(4, 32)
DYNAMIC = Int8DynamicActivationIntxWeightConfig(4, 32)


class Model(nn.Module):
    """A language model with three embeddings; the head may be tied to one of them."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(200, 64)
        self.positions = nn.Embedding(128, 64)
        self.kinds = nn.Embedding(2, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 200, bias=False)
        if tie:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        logits: Tensor = self.head(self.body(x + self.kinds(ids % 2)))
        return logits


def quantized(config: Any, tie: bool = True, **options: Any) -> tuple[Any, Any, Tensor]:
    """The model, the report and the outputs in float."""
    model = Model(tie).eval()
    expected = model(IDS).detach()
    return model, torchquant.quantize_(model, config, **options), expected


def close(got: Tensor, expected: Tensor, least: float = 0.97) -> bool:
    return float(nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0)) > least


def classes(model: Any) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_children()}


def is_tied(model: Any) -> bool:
    return model.tokens.packed is model.head.packed


# ---------------------------------------------------------------- which are quantized


@pytest.mark.parametrize("config", [FOUR, Int8WeightOnlyConfig()], ids=["int4", "int8"])
def test_weight_only_configurations_quantize_embeddings(config: Any) -> None:
    model, report, expected = quantized(config, tie=False)
    table, linear = "QuantizedEmbedding", "QuantizedIntxLinear"
    assert classes(model) == {
        "tokens": table,
        "positions": table,
        "kinds": "Embedding",
        "body": linear,
        "head": linear,
    }
    assert report["kinds"].reason == "too small to benefit"
    assert report["tokens"].action == "quantized" and report["tokens"].shape == (200, 64)
    assert model.tokens.shared_weight is None
    assert close(model(IDS), expected)
    least = 5 if config == FOUR else 3.3  # rows of 64 values are short
    assert report.bytes_after == tensor_bytes(model) < report.bytes_before / least


def test_other_configurations_leave_embeddings() -> None:
    model, report, _ = quantized(None, tie=False)
    assert type(model.tokens) is nn.Embedding
    assert "tokens" not in [layer.name for layer in report.layers]
    assert report["tokens"].reason == (
        "Embedding; only quantize_ quantizes it, with weights alone, such as IntxWeightOnlyConfig()"
    )
    model, _, _ = quantized(DYNAMIC, tie=False)
    assert type(model.tokens) is nn.Embedding


def test_a_selected_embedding() -> None:
    for filter_fn in ("tokens", ["tok*"], lambda module, name: name == "tokens"):
        model, report, _ = quantized(FOUR, tie=False, filter_fn=filter_fn)
        found = [name for name, kind in classes(model).items() if kind.startswith("Quantized")]
        assert found == ["tokens"]
        assert report["positions"].reason == "filter_fn"
    model, _, _ = quantized(FOUR, tie=False, filter_fn="kinds")  # small, but selected
    assert type(model.kinds) is QuantizedEmbedding
    model, _, _ = quantized({"tokens": Int8WeightOnlyConfig(), "*": DYNAMIC}, tie=False)
    assert model.tokens.config == Int8WeightOnlyConfig()
    assert type(model.positions) is nn.Embedding
    assert model.head.config == DYNAMIC
    model, report, _ = quantized({"*o*s": None, "*": FOUR}, tie=False)
    assert classes(model)["positions"] == "Embedding" == classes(model)["tokens"]
    assert report["tokens"].reason == "None for the pattern '*o*s'"
    assert not report.notes


def test_a_selected_embedding_with_activations_is_refused() -> None:
    model = Model(tie=False)
    with pytest.raises(ValueError, match="tokens: Embedding; only quantize_ quantizes it"):
        torchquant.quantize_(model, filter_fn="tokens", strict=True)
    assert type(model.tokens) is nn.Embedding
    report = torchquant.quantize_(model, filter_fn="tokens")
    assert report["tokens"].reason.endswith("IntxWeightOnlyConfig(); selected by filter_fn")


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_reasons() -> None:
    model = nn.ModuleDict(
        {
            "scaled": Scaled(100, 64),
            "norm": nn.Embedding(100, 64, max_norm=1.0),
            "bag": nn.EmbeddingBag(100, 64, mode="sum"),
            "narrow": nn.Embedding(1000, 16),
        }
    )
    report = torchquant.quantize_(model, FOUR)
    assert {layer.name: layer.reason for layer in report.layers} == {
        "scaled": "Scaled (subclass of nn.Embedding)",
        "norm": "max_norm, with which each call changes the weight",
        "bag": "",
        "narrow": "group_size must be at most embedding_dim = 16, got 32",
    }
    assert type(model["bag"]) is QuantizedEmbeddingBag
    again = torchquant.quantize_(model, FOUR)
    assert again["bag"].reason == "already quantized"
    other = torchquant.quantize_(model, Int8WeightOnlyConfig())
    assert other["bag"].reason == "already quantized, with another configuration"


def test_a_bare_embedding() -> None:
    with pytest.raises(ValueError, match=r"use torchquant\.nn\.QuantizedEmbedding\.from_float"):
        torchquant.quantize_(nn.Embedding(100, 64))


@pytest.mark.parametrize("verb", ["prepare_", "prepare_qat_"])
def test_other_verbs_leave_embeddings(verb: str) -> None:
    model = Model(tie=True)
    report = getattr(torchquant, verb)(model)
    assert type(model.tokens) is nn.Embedding
    assert "tokens" not in [layer.name for layer in report.layers]


# ---------------------------------------------------------------- tied to the output layer


@pytest.mark.parametrize("config", [FOUR, DYNAMIC, Int8WeightOnlyConfig()])
def test_a_tied_head_shares_one_weight(config: Any) -> None:
    model, report, expected = quantized(config)
    assert is_tied(model)
    assert model.head.config == config and model.tokens.config.activations is None
    assert model.tokens.config.weights == config.weights
    assert report["head"].reason == "shares its weight with tokens"
    assert report["tokens"].reason == "shares its weight with head"
    size = human_bytes(model.head.packed.nbytes)
    assert report.notes == (
        f"One quantized weight for tied layers, {size} less than a weight for each: tokens and "
        "head.",
    )
    assert close(model(IDS), expected)
    assert report.parameters == sum(p.numel() for p in Model(True).parameters())
    floats = 2 * 64 + (128 * 64 if config == DYNAMIC else 0)
    assert report.float_families.get("embeddings", 2 * 64) == floats
    table = QuantizedEmbedding.from_float(Model(True).tokens, model.tokens.config)
    assert_same_bits(model.tokens(IDS), table(IDS))


def test_int8_heads_keep_a_copy_of_their_own() -> None:
    """The packed format of QuantizedLinear has no rows to look up."""
    model, report, _ = quantized(Int8DynamicActivationInt8WeightConfig())
    assert type(model.tokens) is nn.Embedding
    assert report["head"].reason == (
        "shares its weight with tokens.weight; an integer copy would make the model larger than in "
        "float"
    )
    assert report.bytes_after <= report.bytes_before
    model, report, _ = quantized(Int8DynamicActivationInt8WeightConfig(), filter_fn="[bh]*")
    assert type(model.tokens) is nn.Embedding
    assert report["head"].reason == "untied from tokens.weight"


def test_what_the_arguments_exclude_is_not_tied() -> None:
    model, report, _ = quantized(DYNAMIC, filter_fn="head")
    assert classes(model)["tokens"] == "Embedding"
    assert report["head"].reason == "untied from tokens.weight"
    model, _, _ = quantized(FOUR, filter_fn=["tokens"])
    assert classes(model)["head"] == "Linear"
    different = {"tokens": Int8WeightOnlyConfig(), "head": FOUR}
    model, report, expected = quantized(different)
    assert model.tokens.packed.shape != model.head.packed.shape
    assert report["head"].reason == "untied from tokens.weight; as 'head'"
    assert close(model(IDS), expected)


def test_everything_after_quantize_keeps_the_weight_shared(tmp_path: Path) -> None:
    model, report, _ = quantized(FOUR)
    expected = model(IDS)
    path = tmp_path / "model.safetensors"
    torchquant.save(model, path)
    assert path.stat().st_size < 1.02 * report.bytes_after + 4096
    for made in (
        torchquant.load(path, Model(tie=True)),
        torchquant.load(path, Model(tie=False)),
        torchquant.load(path, model_on_meta()),
        torchquant.load(path, quantized(FOUR)[0]),
        torchquant.load(path, quantized(FOUR, tie=False)[0]),
        copy.deepcopy(model),
    ):
        assert is_tied(made)
        assert_same_bits(made.eval()(IDS), expected)
        assert tensor_bytes(made) == report.bytes_after
    untied, _, _ = quantized(FOUR, tie=False)
    torchquant.save(untied, path)
    made = torchquant.load(path, model)  # which shares its weight
    assert not is_tied(made) and made.tokens.shared_weight is None
    assert_same_bits(made(IDS), untied(IDS))


def model_on_meta() -> Model:
    with torch.device("meta"):
        return Model(tie=True)


def test_float_again_is_tied_again() -> None:
    model, _, _ = quantized(FOUR)
    weight = model.tokens.dequantized()
    report = torchquant.to_float_(model)
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model.tokens.weight, weight)
    assert report["tokens"].action == "restored"


def test_a_file_that_does_not_fit_leaves_the_model(tmp_path: Path) -> None:
    model, _, _ = quantized(FOUR)
    path = tmp_path / "model.safetensors"
    torchquant.save(quantized(FOUR, filter_fn="!body")[0], path)
    other, _, _ = quantized(Int8WeightOnlyConfig())
    other.positions = nn.Embedding(64, 64)
    before, expected = copy.deepcopy(other), other(IDS[:1])
    with pytest.raises(ValueError, match="does not fit the model"):
        torchquant.load(path, other)
    assert is_tied(other) and repr(before) == repr(other)
    assert_same_bits(other(IDS[:1]), expected)
    assert is_tied(model)
    assert type(model.head) is QuantizedIntxLinear


# ---------------------------------------------------------------- models of transformers

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
TOKENS = torch.randint(5, 500, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def bert(transformers: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def t5(transformers: Any) -> Any:
    sizes = {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))


MODELS = {
    "gpt2": (gpt2, "transformer.wte", "lm_head"),
    "llama": (llama, "model.embed_tokens", "lm_head"),
    "bert": (bert, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "t5": (t5, "shared", "lm_head"),
}


def logits(model: Any) -> Tensor:
    ids = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=TOKENS, **ids).logits
    return result.detach()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_models_of_transformers(name: str, bits: int) -> None:
    make, table, head = MODELS[name]
    model = make(pytest.importorskip("transformers")).eval()
    expected, parameters = logits(model), sum(p.numel() for p in model.parameters())
    embeddings = [n for n, m in model.named_modules() if type(m) is nn.Embedding]
    report = torchquant.quantize_(model, IntxWeightOnlyConfig(bits, 32))
    assert report.parameters == parameters
    left = sum(layer.parameters for layer in (*report.layers, *report.others) if layer.stays_float)
    wanted = 4 * left + (parameters - left) * (bits / 8 + 4 / 32)
    assert left < 0.06 * parameters
    assert wanted <= report.bytes_after < 1.1 * wanted  # rows of 128 values are short
    assert model.get_submodule(table).packed is model.get_submodule(head).packed
    tables = [model.get_submodule(n) for n in embeddings]
    assert sum(isinstance(m, QuantizedEmbedding) for m in tables) >= len(tables) - 1 - (
        name == "t5"
    )
    assert close(logits(model), expected, 0.999 if bits == 8 else 0.9)
    before = logits(model)
    model.tie_weights()
    assert model.get_submodule(table).packed is model.get_submodule(head).packed
    assert_same_bits(logits(model), before)
    made = copy.deepcopy(model)
    assert made.get_submodule(table).packed is made.get_submodule(head).packed
    assert_same_bits(logits(made), before)


def test_resizing_raises_one_clear_error() -> None:
    model = llama(pytest.importorskip("transformers")).eval()
    torchquant.quantize_(model, FOUR)
    before = logits(model)
    model.resize_token_embeddings(512)  # no change
    with pytest.raises(TypeError, match=r"QuantizedEmbedding"):
        model.resize_token_embeddings(530)
    assert_same_bits(logits(model), before)
    torchquant.to_float_(model)
    model.resize_token_embeddings(530)
    assert model.lm_head.weight is model.model.embed_tokens.weight
