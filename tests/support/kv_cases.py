"""Calls of the operators on key/value caches, for tests/cases.py."""

import torch

from support import floats
from support.case_operands import Operands, Samples, generator, sample
from torchquant import functional


def even(o: Operands) -> torch.Tensor:
    """Queries with an even number of channels, of which there are at most 256."""
    return o.query[..., : min(256, o.shape.inputs // 2 * 2) or 1]


@generator
def quantize_kv(o: Operands) -> Samples:
    x = even(o)
    yield sample("8 bits", input=x, bits=8)
    if x.shape[-1] % 2 == 0:
        yield sample("4 bits", input=x.bfloat16(), bits=4, group_size=32)
        yield sample("one row", input=x[0, 0, 0], bits=4)
        yield sample("gradient", "input", input=x, bits=4, group_size=16)
    yield sample("transposed", input=x.half().transpose(1, 2), bits=8, group_size=16)
    yield sample("no tokens", input=x[:, :, :0], bits=8)


@generator
def dequantize_kv(o: Operands) -> Samples:
    x = even(o)
    size = {"head_dim": x.shape[-1]}
    rows = functional.quantize_kv(x, 8)
    yield sample("8 bits", rows=rows, bits=8, **size)
    yield sample("of heads", rows=rows[:, 1::2], bits=8, dtype=torch.float16, **size)
    if x.shape[-1] % 2 == 0:
        four = functional.quantize_kv(x, 4, 32)
        half = {"bits": 4, "group_size": 32, "dtype": torch.bfloat16}
        yield sample("4 bits", rows=four, **half, **size)
    yield sample("no tokens", rows=rows[:, :, :0], bits=8, **size)


@generator
def attention_cached(o: Operands) -> Samples:
    x, tokens = even(o), o.shape.rows
    rows = functional.quantize_kv(x, 8)
    same = {"query": x, "key": rows, "value": rows, "bits": 8}
    yield sample("8 bits", **same)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    yield sample("mask", mask=causal, scale=0.3, **same)
    few = min(16, x.shape[-1])
    other = {"value": functional.quantize_kv(x[..., :few], 8), "value_dim": few}
    added = floats(3, 1, 1, tokens, seed=14)
    yield sample("other values", mask=added, **{**same, **other})
    if x.shape[-1] % 2 == 0:
        keys = functional.quantize_kv(x[:, :2], 4, 32)
        four = {"key": keys, "value": keys, "bits": 4, "group_size": 32}
        yield sample("grouped", query=x.bfloat16(), **four)
        recent = {"recent_key": rows[:, 2:], "recent_value": rows[:, :2]}
        yield sample("recent tokens", query=x.half(), **four, **recent)
    yield sample("no batch", query=x[:0], key=rows[:0], value=rows[:0], bits=8)
