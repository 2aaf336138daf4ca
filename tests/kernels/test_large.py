"""Tensors of more than 2^31 elements: every index is 64 bits wide, and no call takes memory beside
its result.

Large tensors are a block of rows repeated (the number of rows in the block is prime, so that an
index that wrapped around meets another row), and the expected result is the block's, repeated.

Slow, and up to 7 GiB of memory: ``pytest -m slow tests/kernels/test_large.py``.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, floats, integers, positive
from torch import Tensor

from torchquant import cpu, ops
from torchquant.scheme import Granularity, PerAxis, PerGroup, PerTensor

LIMIT = 2**31
BLOCK = 4099
GIB = 2**30

best_and_plainest = pytest.mark.parametrize("name", [cpu.available_isas()[0], "scalar"])


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable in /proc/meminfo")


@pytest.fixture(autouse=True)
def _enough_memory() -> None:
    if available_memory() < 8 * GIB:
        pytest.skip(f"needs 8 GiB of free memory, {available_memory() / GIB:.1f} there")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


# ---------------------------------------------------------------- tools


def repeated(block: Tensor, rows: int) -> Tensor:
    """``rows`` rows: the block's, again and again."""
    result = torch.empty((rows, *block.shape[1:]), dtype=block.dtype)
    for first in range(0, rows, len(block)):
        count = min(len(block), rows - first)
        result[first : first + count] = block[:count]
    assert result.numel() > LIMIT
    return result


def assert_repeats(result: Tensor, block: Tensor) -> None:
    """``result`` is ``block``'s rows, again and again, bit for bit."""
    for first in range(0, len(result), len(block)):
        count = min(len(block), len(result) - first)
        if not torch.equal(result[first : first + count], block[:count]):
            assert_same_bits(result[first : first + count], block[:count], f"rows from {first}")


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/self/status")


@contextmanager
def memory_of(result_bytes: int) -> Iterator[None]:
    """The block's peak of resident memory is its result's size and little more."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    yield
    used = status("VmHWM") - before
    assert used < result_bytes + 128 * 2**20, f"{used / GIB:.2f} GiB for {result_bytes / GIB:.2f}"


def rows_for(columns: int) -> int:
    return LIMIT // columns + 3


# ---------------------------------------------------------------- linear


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
    """Every argument that a row or a column has a value of its own in."""
    outputs = len(weight)
    side = {
        "weight_scale": positive(outputs),
        "weight_zero_point": integers(outputs).int(),
        "bias": floats(outputs),
        "out_features": outputs,
        "activation": "silu",
    }
    packed = ops.pack_weight(weight) if packed is None else packed
    if x.is_floating_point() and dtype.is_floating_point:
        return ops.linear_dynamic(x, packed, symmetric=False, output_dtype=dtype, **side)
    quantized = {} if dtype.is_floating_point else {"output_scale": torch.tensor(0.05)}
    return ops.linear_static(
        x, torch.tensor(0.02), None, packed, output_dtype=dtype, **quantized, **side
    )


@best_and_plainest
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])
def test_large_input(dtype: torch.dtype, name: str) -> None:
    inputs = 1030
    block = integers(BLOCK, inputs) if dtype == torch.int8 else floats(BLOCK, inputs, dtype=dtype)
    x, weight = repeated(block, rows_for(inputs)), integers(3, inputs)
    with cpu.use_isa(name), memory_of(len(x) * 3 * 4):
        result = linear(x, weight, torch.float32)
    assert_repeats(result, linear(block, weight, torch.float32))


def test_large_input_of_int8_mm() -> None:
    inputs = 4111
    block, weight = integers(BLOCK, inputs), ops.pack_weight(integers(2, inputs))
    x = repeated(block, rows_for(inputs))
    with memory_of(len(x) * 2 * 4):
        result = ops.int8_mm(x, weight, 2)
    assert_repeats(result, ops.int8_mm(block, weight, 2))


@pytest.mark.parametrize(
    ("outputs", "name"),
    [(700, cpu.available_isas()[0]), (4096, cpu.available_isas()[0]), (700, "scalar")],
    ids=["odd_width", "even_width", "scalar"],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=["int8", "bfloat16"])
def test_large_output(dtype: torch.dtype, outputs: int, name: str) -> None:
    """More rows than threads can share: each takes its own (gemm_driver.h, by rows)."""
    block, weight = floats(BLOCK, 8), integers(outputs, 8)
    rows = rows_for(outputs)
    x = block.repeat(-(-rows // BLOCK), 1)[:rows]
    with cpu.use_isa(name), memory_of(rows * outputs * dtype.itemsize):
        result = linear(x, weight, dtype)
    assert result.numel() > LIMIT
    assert_repeats(result, linear(block, weight, dtype))


def test_large_output_of_few_rows() -> None:
    """Few rows, so many columns that every row's offset needs 64 bits (by columns)."""
    rows, block = 129, integers(BLOCK * 16, 4)
    outputs = rows_for(rows)
    times = -(-outputs // len(block))
    weight, x = block.repeat(times, 1)[:outputs], integers(rows, 4)
    packed, scale = ops.pack_weight(weight), torch.full((1,), 0.01)
    with memory_of(rows * outputs):
        result = ops.linear_static(
            x,
            torch.tensor(0.5),
            None,
            packed,
            scale,
            out_features=outputs,
            output_dtype=torch.int8,
            output_scale=torch.tensor(0.7),
        )
    assert result.numel() > LIMIT
    expected = ops.linear_static(
        x,
        torch.tensor(0.5),
        None,
        ops.pack_weight(block),
        scale,
        out_features=len(block),
        output_dtype=torch.int8,
        output_scale=torch.tensor(0.7),
    )
    for row in range(rows):  # one by one: a transposed copy would be as large again
        got = result[row]
        for first in range(0, outputs, len(block)):
            count = min(len(block), outputs - first)
            assert torch.equal(got[first : first + count], expected[row, :count]), (row, first)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_large_weight(order: str) -> None:
    """A weight, in either order in memory, whose packed form has more than 2^31 bytes."""
    inputs = 1024
    outputs = rows_for(inputs) + 4096
    if order == "rows":
        block = integers(BLOCK, inputs)
        weight = repeated(block, outputs)
    else:  # [inputs, outputs] in memory: the whole is a block of columns repeated
        block = integers(inputs, BLOCK).t()
        wide = torch.empty(inputs, outputs, dtype=torch.int8)
        for first in range(0, outputs, BLOCK):
            count = min(BLOCK, outputs - first)
            wide[:, first : first + count] = block[:count].t()
        weight = wide.t()
    with memory_of(outputs * inputs * 9 // 8):
        packed = ops.pack_weight(weight)
    assert packed.numel() > LIMIT
    del weight
    x = floats(3, inputs)
    scale = torch.full((1,), 0.01)
    result = ops.linear_dynamic(x, packed, scale, out_features=outputs)
    expected = ops.linear_dynamic(x, ops.pack_weight(block), scale, out_features=BLOCK)
    assert_repeats(result.t(), expected.t())
    with memory_of(outputs * inputs):
        unpacked = ops.unpack_weight(packed, outputs, inputs)
    assert_repeats(unpacked, block)


def test_rows_far_apart() -> None:
    """A slice of a matrix whose rows are 2^30 elements long: the offset of row 2 is 2^31."""
    length, inputs = 2**30 + 64, 100
    weight = integers(20, inputs)
    block = integers(5, inputs)
    far = torch.empty(5, length, dtype=torch.int8)[:, 64 : 64 + inputs]  # untouched pages are free
    far.copy_(block)
    with memory_of(0):
        result = linear(far, weight, torch.float32)
    assert_same_bits(result, linear(block, weight, torch.float32))
    block = floats(5, inputs, dtype=torch.bfloat16)
    far = torch.empty(5, length, dtype=torch.bfloat16)[:, 64 : 64 + inputs]
    far.copy_(block)
    with memory_of(0):
        result = linear(far, weight, torch.float32)
    assert_same_bits(result, linear(block, weight, torch.float32))


# ---------------------------------------------------------------- elements

COLUMNS = 1031  # prime: groups of 100 leave a tail, vectors of 16 too
GRANULARITIES: dict[str, tuple[Granularity, Callable[[int], tuple[int, ...]]]] = {
    "per_tensor": (PerTensor(), lambda rows: ()),
    "per_column": (PerAxis(1), lambda rows: (COLUMNS,)),
    "per_row": (PerAxis(0), lambda rows: (rows,)),
    "per_group": (PerGroup(100), lambda rows: (rows, 11)),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize_and_dequantize(granularity: str) -> None:
    kind, shape_of = GRANULARITIES[granularity]
    rows = rows_for(COLUMNS)
    block = floats(BLOCK, COLUMNS, dtype=torch.bfloat16)
    scale = positive(*shape_of(BLOCK))
    zero = torch.full(scale.shape, 3, dtype=torch.int32)
    per_row = scale.dim() > 0 and len(scale) == BLOCK
    times = -(-rows // BLOCK)
    wide = scale.repeat(times, *[1] * (scale.dim() - 1))[:rows] if per_row else scale
    wide_zero = torch.full(wide.shape, 3, dtype=torch.int32)
    x = repeated(block, rows)
    parameters = 8 * wide.numel() * 4  # reciprocals, limits and zero points, a value per scale
    with memory_of(x.numel() + parameters):
        q = ops.quantize(x, wide, wide_zero, granularity=kind)
    del x
    expected = ops.quantize(block, scale, zero, granularity=kind)
    assert_repeats(q, expected)
    with memory_of(2 * q.numel() + parameters):
        back = ops.dequantize(q, wide, wide_zero, granularity=kind, dtype=torch.float16)
    del q
    wanted = ops.dequantize(expected, scale, zero, granularity=kind, dtype=torch.float16)
    assert_repeats(back, wanted)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_quantize_per_token(symmetric: bool) -> None:
    block = floats(BLOCK, COLUMNS, dtype=torch.bfloat16)
    x = repeated(block, rows_for(COLUMNS))
    with memory_of(x.numel() + 8 * len(x)):
        results = ops.quantize_per_token(x, symmetric=symmetric)
    for result, expected in zip(
        results, ops.quantize_per_token(block, symmetric=symmetric), strict=True
    ):
        assert_repeats(result, expected)


def test_one_long_row() -> None:
    """A single span of more than 2^31 elements, shared by threads."""
    block = floats(BLOCK * 1031, dtype=torch.bfloat16)
    x = repeated(block, LIMIT + 5)
    q = ops.quantize(x, 0.02)
    del x
    assert_repeats(q, ops.quantize(block, 0.02))


def test_a_token_of_more_than_two_billion() -> None:
    """One row: its range is found over all of it, its largest value is the last."""
    block = floats(BLOCK * 1031, dtype=torch.bfloat16).clamp(-20, 20)
    x = repeated(block, LIMIT + 5)
    x[-1] = 40.0
    q, scale, _ = ops.quantize_per_token(x.view(1, -1))
    assert scale.item() == torch.tensor(40.0).div(127.0).item()
    assert q[0, -1] == 127
    del x
    assert_repeats(q[0, :-1], ops.quantize(block, scale.view(())))
