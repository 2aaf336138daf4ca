"""Small GGUF files of a Llama, written with the package gguf."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADS, KEY_HEADS, HIDDEN, INNER, ROWS, BLOCKS = 4, 2, 256, 512, 96, 1


def random_blocks(
    kind: str, outputs: int, inputs: int, seed: int = 0, whole: bool = False
) -> NDArray[np.uint8]:
    """Rows of random blocks with usable scales; ``whole``: minimums are multiples of steps."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (outputs * inputs // values, size)).astype(np.uint8)
    places = {  # of the float16 numbers d and m
        **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
    }[kind]
    step = random.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
    for number, place in enumerate(places):
        value = step
        if number:  # the minimum is a negative number, which K-quants subtract
            value = random.uniform(0, 16, len(blocks)) * step.astype(np.float64)
            if whole:
                step = (2.0 ** np.round(np.log2(step.astype(np.float64)))).astype(np.float16)
                blocks[:, places[0] : places[0] + 2] = step.view(np.uint8).reshape(-1, 2)
                value = random.integers(0, 16, len(blocks)) * step.astype(np.float64)
            value = value if kind.endswith("K") else -value
        raw = value.astype(np.float16).view(np.uint8).reshape(-1, 2)
        blocks[:, place : place + 2] = raw
    return blocks.reshape(outputs, -1)


def dequantized(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values by the package's own code."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found: NDArray[np.float32] = dequantize(rows, GGMLQuantizationType[kind])
    return found


SHAPES = {
    "token_embd": (ROWS, HIDDEN),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
    "blk.0.attn_v": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate": (INNER, HIDDEN),
    "blk.0.ffn_up": (INNER, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INNER),
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


def write_llama(
    path: Path,
    kinds: Mapping[str, str],
    default: str = "Q8_0",
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    whole: bool = False,
    key_heads: Any = KEY_HEADS,
) -> dict[str, tuple[str, NDArray[np.uint8]]]:
    """Write a Llama of one layer with a tied output; return type and bytes of each matrix."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer: Any = GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(ROWS)
    written = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        if name in without:
            continue
        kind = kinds.get(name, default)
        rows = random_blocks(kind, *shape, seed=place, whole=whole)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=GGMLQuantizationType[kind])
        written[name] = kind, rows
    random = np.random.default_rng(9)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        norm = random.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        writer.add_tensor(f"{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
