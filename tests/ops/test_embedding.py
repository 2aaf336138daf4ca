"""Rows of quantized tables and sums of rows have the bits of their specification.

A row of a table is that row of the dequantized table; a bag is compared with torch's own
embedding_bag, too. On every instruction set.
"""

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, check_everywhere, floats, integers, positive
from support import generator as seeded
from support.aten import ATEN, KERNELS
from torch import Tensor, nn

from torchquant import functional, ops

BITS = range(2, 9)


class Table:
    """A quantized table: canonical, packed, and its arguments."""

    def __init__(
        self,
        rows: int,
        size: int,
        bits: int,
        group_size: int | None,
        zero_points: bool,
    ) -> None:
        self.rows, self.size, self.bits = rows, size, bits
        self.group_size = None if group_size is None else min(group_size, size)
        groups = -(-size // (self.group_size or size))
        shape = (rows,) if group_size is None else (rows, groups)
        self.weight = integers(rows, size) >> (8 - bits)
        self.scale = positive(*shape, seed=1)
        self.zeros = integers(*shape, seed=2) >> (8 - bits) if zero_points else None

    @property
    def canonical(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "weight_scale": self.scale,
            "weight_zero_point": self.zeros,
            "bits": self.bits,
            "group_size": self.group_size,
        }

    def packed(self, namespace: Any = KERNELS) -> dict[str, Any]:
        tensors = (self.weight, self.scale, self.zeros)
        return {
            "packed": namespace.pack_intx_weight(*tensors, self.bits, self.group_size),
            "num_embeddings": self.rows,
            "embedding_dim": self.size,
            "bits": self.bits,
            "group_size": self.group_size,
            "has_zero_point": self.zeros is not None,
        }

    def indices(self, *shape: int, seed: int = 3) -> Tensor:
        return torch.randint(self.rows, shape, generator=seeded(seed))

    def dequantized(self) -> Tensor:
        """By hand, in float64, where the product is exact before it is rounded once."""
        group = torch.arange(self.size) // (self.group_size or self.size)
        scale = self.scale.reshape(self.rows, -1)[:, group].double()
        q = self.weight.double()
        if self.zeros is not None:
            q = q - self.zeros.reshape(self.rows, -1)[:, group].double()
        return (q * scale).float()


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("group_size", [None, 32, 64, 20, 1], ids=lambda size: f"group_{size}")
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_those_of_the_dequantized_table(
    bits: int, group_size: int | None, zero_points: bool
) -> None:
    # 1100 values: a row is read in parts of 512, and the last block has 12.
    for size in (1, 31, 200, 1100):
        table = Table(37, size, bits, group_size, zero_points)
        everywhere = torch.cat([torch.arange(37), table.indices(9)])
        expected = table.dequantized()[everywhere]
        assert_same_bits(functional.embedding_intx(everywhere, **table.canonical), expected)
        arguments = table.packed()
        check_everywhere(lambda a=arguments, x=everywhere: ops.embedding_intx(x, **a), expected)
        got = ATEN.embedding_intx(everywhere, **table.packed(ATEN))
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_rounded_once(dtype: torch.dtype) -> None:
    table = Table(40, 77, 8, 20, True)
    x = table.indices(3, 5, 2).int()
    expected = table.dequantized()[x.long()].to(dtype)
    arguments = {**table.packed(), "output_dtype": dtype}
    check_everywhere(lambda: ops.embedding_intx(x, **arguments), expected, counts=(1, 2))
    got = functional.embedding_intx(x, **table.canonical, output_dtype=dtype)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("scale", [2.0**-126, 3.4e38, NAN, INF])
def test_scales_of_any_size(scale: float) -> None:
    table = Table(20, 40, 8, None, True)
    table.scale[::3] = scale
    expected = table.dequantized()
    expected[::3] = (table.weight.float() - table.zeros.float().unsqueeze(1))[::3] * scale
    rows = torch.arange(20)
    check_everywhere(lambda: ops.embedding_intx(rows, **table.packed()), expected)
    assert_same_bits(functional.embedding_intx(rows, **table.canonical), expected)


def test_every_form_of_indices() -> None:
    table = Table(50, 64, 4, 32, False)
    arguments, dequantized = table.packed(), table.dequantized()
    x = table.indices(6, 4, 2)
    for view in (x, x.transpose(0, 2), x[::2], x[0, 0, 0], x[:0], x.int()[:, 1:]):
        got = ops.embedding_intx(view, **arguments)
        assert_same_bits(got, dequantized[view.long()])
        assert got.is_contiguous()


def test_many_rows_on_several_threads() -> None:
    table = Table(300, 300, 6, 100, True)
    x = table.indices(5000)
    arguments = table.packed()
    check_everywhere(lambda: ops.embedding_intx(x, **arguments), table.dequantized()[x], (1, 2, 3))
    matrix, sums = x.reshape(500, 10), {"mode": "sum"}
    expected = functional.embedding_bag_intx(matrix[:50], **table.canonical, **sums)
    for count in (1, 2):
        check_everywhere(
            lambda: ops.embedding_bag_intx(matrix, **arguments, **sums)[:50], expected, (count,)
        )


# ---------------------------------------------------------------- bags


@st.composite
def bags(draw: st.DrawFn) -> tuple[Table, dict[str, Any]]:
    """A table and the arguments of a call on it."""
    size = draw(st.sampled_from((1, 5, 33, 64, 600)))
    group_size = draw(st.sampled_from((None, 1, 20, 32, 500)))
    bits, zero_points = draw(st.sampled_from(BITS)), draw(st.booleans())
    table = Table(draw(st.sampled_from((1, 7, 33))), size, bits, group_size, zero_points)
    lengths = draw(st.lists(st.integers(0, 6), max_size=5))
    call: dict[str, Any] = {"mode": draw(st.sampled_from(functional.embedding.BAG_MODES))}
    index = draw(st.sampled_from((torch.int32, torch.int64)))
    if draw(st.booleans()):
        call["input"] = table.indices(len(lengths), draw(st.integers(0, 4))).to(index)
    else:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(index)
        last = draw(st.booleans())
        behind = draw(st.integers(0, 2)) if last else 0
        call["input"] = table.indices(sum(lengths) + behind).to(index)
        call |= {"offsets": ends if last else ends[:-1], "include_last_offset": last}
    if call["mode"] == "sum" and draw(st.booleans()):
        dtype = draw(st.sampled_from(FLOATS))
        call["per_sample_weights"] = floats(*call["input"].shape, seed=4, dtype=dtype)
    if draw(st.booleans()):
        call["padding_idx"] = draw(st.integers(-table.rows, table.rows - 1))
    call["output_dtype"] = draw(st.sampled_from(FLOATS))
    return table, call


@settings(max_examples=60)
@given(made=bags())
def test_bags_are_their_specification(made: tuple[Table, dict[str, Any]]) -> None:
    table, call = made
    expected = functional.embedding_bag_intx(**table.canonical, **call)
    arguments = {**table.packed(), **call}
    check_everywhere(lambda: ops.embedding_bag_intx(**arguments), expected)
    rest = {name: call.get(name) for name in ("offsets", "per_sample_weights")}
    got = ATEN.embedding_bag_intx(**table.packed(ATEN), **{**call, **rest})
    assert_same_bits(got, expected)


@pytest.mark.parametrize("mode", functional.embedding.BAG_MODES)
def test_bags_are_torchs_bags(mode: str) -> None:
    table = Table(30, 50, 4, 32, True)
    x, offsets = table.indices(40), torch.tensor([0, 3, 3, 20])
    padding = int(x[5])
    weights = floats(40, seed=5) if mode == "sum" else None
    expected = nn.functional.embedding_bag(
        *(x, table.dequantized(), offsets),
        mode=mode,
        padding_idx=padding,
        per_sample_weights=weights,
    )
    options = {"mode": mode, "padding_idx": padding}
    given = {"offsets": offsets, "per_sample_weights": weights, **options, **table.packed()}
    got = ops.embedding_bag_intx(x, **given)
    torch.testing.assert_close(got, expected)


def test_a_bags_row_with_nan_gives_nan() -> None:
    table = Table(4, 20, 4, None, False)
    table.scale[2] = NAN
    x = torch.tensor([[0, 2, 1], [2, 0, 1], [0, 1, 3]])
    for mode in functional.embedding.BAG_MODES:
        expected = functional.embedding_bag_intx(x, **table.canonical, mode=mode)
        assert expected.isnan().all(1).tolist() == [True, True, False]
        arguments = table.packed()
        check_everywhere(
            lambda a=arguments, m=mode: ops.embedding_bag_intx(x, **a, mode=m), expected
        )


def test_gradient_of_the_sample_weights() -> None:
    table = Table(30, 50, 4, 32, True)
    x, offsets = table.indices(12), torch.tensor([0, 3, 3, 10])
    padding = int(x[4])
    arguments = table.packed()
    for include_last_offset in (False, True):
        ours, torchs = (floats(12, seed=5).requires_grad_() for _ in range(2))
        options = {"padding_idx": padding, "include_last_offset": include_last_offset}
        got = ops.embedding_bag_intx(
            x, offsets=offsets, per_sample_weights=ours, mode="sum", **options, **arguments
        )
        rows = table.dequantized()[x] * torchs.unsqueeze(1) * (x != padding).unsqueeze(1)
        ends = [*offsets.tolist(), *([] if include_last_offset else [12])]
        expected = torch.stack([rows[a:b].sum(0) for a, b in pairwise(ends)])
        torch.testing.assert_close(got, expected)
        weights = floats(*got.shape, seed=6)
        (got * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.grad, torchs.grad)


# ---------------------------------------------------------------- wrong arguments

TABLE = Table(6, 40, 4, 32, False)
X, OFFSETS = torch.tensor([1, 0, 5, 5]), torch.tensor([0, 2])
ROWS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float indices": (
        {"input": X.float()},
        TypeError,
        "input must be int64 or int32, got float32 [4]; convert it with .to(torch.int64)",
    ),
    "small indices": (
        {"input": X.to(torch.int16)},
        TypeError,
        "input must be int64 or int32, got int16 [4]; convert it with .to(torch.int64)",
    ),
    "too large": (
        {"input": torch.tensor([1, 6, 0, 9])},
        IndexError,
        "input must hold indices from 0 to 5 (num_embeddings = 6), got 6",
    ),
    "negative": (
        {"input": torch.tensor([1, -1])},
        IndexError,
        "input must hold indices from 0 to 5 (num_embeddings = 6), got -1",
    ),
    "output type": (
        {"output_dtype": torch.float64},
        TypeError,
        "output_dtype must be float32, bfloat16 or float16, got float64",
    ),
    "bits": ({"bits": 9}, ValueError, "bits must be from 2 to 8, got 9"),
    "group size": (
        {"group_size": 41},
        ValueError,
        "group_size must be None (one scale per output channel) or between 1 and embedding_dim = "
        "40, got 41",
    ),
    "no rows": (
        {"num_embeddings": 0},
        ValueError,
        "num_embeddings must be between 1 and 2147483647, got 0",
    ),
    "packed type": (
        {"packed": TABLE.weight},
        TypeError,
        "packed must be the uint8 result of pack_intx_weight, got int8 [6, 40]",
    ),
}
MORE_ROWS = "num_embeddings = 6, embedding_dim = 40, bits = 4, group_size = 32 (layout 1)"
BAGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    **ROWS,
    "mode": (
        {"mode": "min"},
        ValueError,
        "mode must be one of sum, mean, max, got 'min'",
    ),
    "one dimension": (
        {"offsets": None},
        ValueError,
        "input must be [bags, N], or [N] with offsets, got int64 [4]",
    ),
    "two dimensions": (
        {"input": X.reshape(2, 2)},
        ValueError,
        "input must be [N] where offsets are given, got int64 [2, 2]; each row of a matrix is a "
        "bag without offsets",
    ),
    "ends without offsets": (
        {"input": X.reshape(2, 2), "offsets": None, "include_last_offset": True},
        ValueError,
        "include_last_offset must come with offsets, got none",
    ),
    "no end": (
        {"offsets": OFFSETS[:0], "include_last_offset": True},
        ValueError,
        "offsets must be [bags] and the end of the last bag, got int64 [0]",
    ),
    "offsets' dimensions": (
        {"offsets": OFFSETS.reshape(1, 2)},
        ValueError,
        "offsets must be [bags], got int64 [1, 2]",
    ),
    "offsets' type": (
        {"offsets": OFFSETS.float()},
        TypeError,
        "offsets must be int64 or int32, got float32 [2]; convert it with .to(torch.int64)",
    ),
    "weights of a mean": (
        {"mode": "mean", "per_sample_weights": floats(4)},
        ValueError,
        "per_sample_weights must come with mode = 'sum', got 'mean'",
    ),
    "weights' shape": (
        {"per_sample_weights": floats(3)},
        ValueError,
        "per_sample_weights must have input's shape [4], got float32 [3]",
    ),
    "padding": (
        {"padding_idx": 6},
        ValueError,
        "padding_idx must be from -6 to 5 (num_embeddings = 6), got 6",
    ),
}
OFFSET_VALUES: dict[str, tuple[Tensor, str]] = {
    "the first": (torch.tensor([1, 2]), "offsets must begin with 0, got 1"),
    "descending": (
        torch.tensor([0, 3, 2]),
        "offsets must ascend to at most 4, the number of indices, got 3 and 2",
    ),
    "behind the end": (
        torch.tensor([0, 5]),
        "offsets must ascend to at most 4, the number of indices, got 0 and 5",
    ),
}


def refused(error: type[Exception], operator: str, message: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(f'{operator}: {message}')}")


@pytest.mark.parametrize("name", ROWS)
def test_wrong_arguments_of_rows(name: str) -> None:
    changes, error, message = ROWS[name]
    for namespace in (KERNELS, ATEN):
        if error is IndexError and namespace is ATEN:
            continue  # values are not read: index_select raises
        with refused(error, "embedding_intx", message):
            namespace.embedding_intx(**{"input": X, **TABLE.packed(namespace), **changes})


@pytest.mark.parametrize("name", BAGS)
def test_wrong_arguments_of_bags(name: str) -> None:
    changes, error, message = BAGS[name]
    call = {"input": X, "offsets": OFFSETS, "per_sample_weights": None, "mode": "sum"}
    for namespace in (KERNELS, ATEN):
        if error is IndexError and namespace is ATEN:
            continue
        given = {**call, **TABLE.packed(namespace), **changes}
        with refused(error, "embedding_bag_intx", message):
            namespace.embedding_bag_intx(**given)


@pytest.mark.parametrize("name", OFFSET_VALUES)
def test_wrong_offsets(name: str) -> None:
    offsets, message = OFFSET_VALUES[name]
    with refused(ValueError, "embedding_bag_intx", message):
        ops.embedding_bag_intx(X, offsets=offsets, mode="sum", **TABLE.packed())
    with refused(ValueError, "embedding_bag_intx", message):
        functional.embedding_bag_intx(X, offsets=offsets, mode="sum", **TABLE.canonical)


def test_a_table_of_another_shape() -> None:
    message = "packed was made for " + MORE_ROWS
    with refused(ValueError, "embedding_intx", message):
        ops.embedding_intx(X, **{**TABLE.packed(), "num_embeddings": 7})


def test_the_specification_refuses_the_same() -> None:
    for name in ("float indices", "too large", "negative", "output type"):
        changes, error, message = ROWS[name]
        given = {"input": X, **TABLE.canonical, **changes}
        wanted = message.split(";")[0]
        with refused(error, "embedding_intx", wanted):
            functional.embedding_intx(**given)
