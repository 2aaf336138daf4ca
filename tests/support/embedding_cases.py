"""Calls of the operators on quantized embeddings, for tests/cases.py."""

from typing import Any

import torch
from torch import Tensor

from support import floats
from support import generator as seeded
from support.case_operands import Operands, Samples, generator, sample
from support.intx_cases import weight


def indices(o: Operands, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(o.shape.outputs, shape, generator=seeded(seed))


def table(
    o: Operands, bits: int, group_size: int | None = None, zero_points: bool = False
) -> dict[str, Any]:
    """The table's arguments."""
    packed = weight(o, bits, group_size, zero_points)
    sizes = {"num_embeddings": o.shape.outputs, "embedding_dim": o.shape.inputs}
    rest = {"group_size": packed.group_size, "has_zero_point": zero_points or None}
    return {"packed": packed, "bits": bits, **sizes, **rest}


@generator
def embedding_intx(o: Operands) -> Samples:
    rows = o.shape.rows
    yield sample("rows", input=indices(o, rows), **table(o, 4))
    yield sample("groups", input=indices(o, 2, rows), **table(o, 3, 32))
    half = {"output_dtype": torch.bfloat16}
    yield sample("zero points", input=indices(o, rows).int(), **half, **table(o, 5, 20, True))
    float16 = {"output_dtype": torch.float16}
    yield sample("one index", input=indices(o), **float16, **table(o, 8, None, True))
    yield sample("no index", input=indices(o, 0), **table(o, 2, 64))


@generator
def embedding_bag_intx(o: Operands) -> Samples:
    count = 2 * o.shape.rows + 1
    flat, matrix = indices(o, count, seed=1), indices(o, o.shape.rows, 3, seed=2)
    offsets = torch.tensor([0, 1, 1, count])  # the second bag is empty
    weights = floats(count, seed=3)
    yield sample("matrix", input=matrix, **table(o, 4))
    ragged = {"input": flat, "offsets": offsets, "mode": "sum"}
    yield sample("sums", per_sample_weights=weights, **ragged, **table(o, 8, 32, True))
    padded = {"mode": "max", "padding_idx": int(matrix[0, 0]), "output_dtype": torch.bfloat16}
    yield sample("maxima", input=matrix.int(), **padded, **table(o, 2, 20))
    last = {**ragged, "include_last_offset": True, "padding_idx": -1, "mode": "mean"}
    yield sample("ends of bags", **last, **table(o, 7, 64))
    given = {**ragged, "offsets": offsets[:2].int(), "include_last_offset": True}
    half = {"per_sample_weights": weights.half(), "output_dtype": torch.float16}
    yield sample("gradient", "per_sample_weights", **given, **half, **table(o, 5, 20, True))
    of_bags = {"input": matrix, "per_sample_weights": floats(*matrix.shape), "mode": "sum"}
    rest = {"padding_idx": int(matrix[0, 1])}
    yield sample("gradient of a matrix", "per_sample_weights", **of_bags, **rest, **table(o, 3))
    yield sample("no bags", input=matrix[:0], **table(o, 4, 32))
