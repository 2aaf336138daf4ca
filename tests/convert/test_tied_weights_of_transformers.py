"""transformers' tie_weights() and resize_token_embeddings() on quantized and prepared models."""

import copy
from typing import Any

import pytest
import torch
from support import assert_same_bits
from torch import Tensor, nn

import torchquant
from torchquant.nn import TrainedModule

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
IDS = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(0))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))


def albert() -> Any:
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SIZES, embedding_size=128))


def blip() -> Any:
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    config = transformers.BlipTextConfig(**SIZES, encoder_hidden_size=128, is_decoder=True)
    return BlipTextLMHeadModel(config)


def t5() -> Any:
    sizes = {"vocab_size": 320, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=320, n_embd=128, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def tied_llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


MODELS = {model.__name__: model for model in (bert, roberta, albert, blip, t5, gpt2, tied_llama)}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def logits(model: Any) -> Tensor:
    ids = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=IDS, **ids).logits
    return result


@pytest.mark.filterwarnings("ignore:QuantizedLinear. weight is read-only")
@models
def test_tying_leaves_a_quantized_model_as_it_is(make: Any) -> None:
    model = make().eval()
    wanted = logits(model).detach()
    torchquant.quantize_(model)
    expected = logits(model).detach()
    assert nn.functional.cosine_similarity(expected.flatten(), wanted.flatten(), 0) > 0.99
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    model.tie_weights()
    assert_same_bits(logits(model).detach(), expected)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names


def test_the_warning_names_the_remedy() -> None:
    model = bert()
    torchquant.quantize_(model)
    with pytest.warns(UserWarning, match=r"assigned to it is ignored.*to_float_\(model\)"):
        model.tie_weights()


@models
def test_tying_a_model_that_is_prepared_with_learned_steps(make: Any) -> None:
    model = make()
    config = torchquant.QATConfig(weight_bits=4, learned_weights=True)
    torchquant.prepare_qat_(model, config, filter_fn=lambda _, name: "crossattention" not in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, TrainedModule))
    weight = head.weight
    model.eval()
    expected = logits(model).detach()
    model.tie_weights()
    assert head.weight is weight
    assert_same_bits(logits(model).detach(), expected)
    trained = copy.deepcopy(model)
    torchquant.convert_(model)
    assert_same_bits(logits(model).detach(), expected)
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    assert torchquant.verify(trained, model, [inputs]).differing_bits == 0


@pytest.mark.parametrize("make", [bert, roberta], ids=["bert", "roberta"])
def test_the_bias_of_the_head_stays_tied(make: Any) -> None:
    model = make().eval()
    torchquant.quantize_(model)
    head = model.lm_head if make is roberta else model.cls.predictions
    assert head.decoder.bias is head.bias
    before = logits(model).detach()
    with torch.no_grad():
        head.bias += 5
    torch.testing.assert_close(logits(model).detach(), before + 5)


@pytest.mark.filterwarnings("ignore:QuantizedLinear. weight is read-only")
@pytest.mark.parametrize("make", [llama, tied_llama, bert], ids=["llama", "tied_llama", "bert"])
def test_resizing_the_embeddings_raises_one_clear_error(make: Any) -> None:
    model = make().eval()
    torchquant.quantize_(model)
    expected = logits(model).detach()
    model.resize_token_embeddings(320)  # no change
    assert_same_bits(logits(model).detach(), expected)
    with pytest.raises(TypeError, match=r"language model head .*QuantizedLinear"):
        model.resize_token_embeddings(330)
    assert_same_bits(logits(model).detach(), expected)  # further tokens do not change it
    torchquant.to_float_(model)
    model.resize_token_embeddings(330)
    assert logits(model).shape[-1] == 330
