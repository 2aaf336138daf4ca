"""The packed weight of 2 to 8 bits: its picture, and refusals of tensors that are none."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, check_everywhere, in_layout, positive
from support.aten import ATEN
from support.intx_cases import few_bits
from support.intx_layers import BITS, GROUPS
from support.linear_layers import SIZES
from torch import Tensor

from torchquant import functional, ops
from torchquant.ops.intx import packed_intx_shape

CPU = torch.device("cpu")


def blocks_by_hand(u: Tensor, bits: int) -> Tensor:
    """Unsigned integers uint8 ``[16, 32 * blocks]`` as the blocks of a group."""
    quads = u.reshape(16, -1, 8, 4).permute(1, 2, 0, 3).reshape(-1, 8, 64).int()
    if bits == 8:
        return quads.to(torch.uint8).flatten()
    planes, below = [], 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        part = (quads >> below) % 2**width
        below += width
        for vector in range(width):
            held = range(vector, 8, width)
            planes.append(sum(part[:, quad] << i * width for i, quad in enumerate(held)))
    return torch.stack(planes, 1).to(torch.uint8).flatten()


def packed_by_hand(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int | None
) -> Tensor:
    """csrc/formats/intx_tiles.h, read from its picture."""
    outputs, inputs = weight.shape
    size, middle, tiles = group_size or inputs, 2 ** (bits - 1), []
    scale = scale.reshape(outputs, -1)
    for first in range(0, outputs, 16):
        rows = slice(first, first + 16)
        count, tile = len(weight[rows]), []
        for g in range(scale.shape[1]):
            sixteen = torch.zeros(16)
            sixteen[:count] = scale[rows, g]
            part = weight[rows, g * size : (g + 1) * size]
            u = torch.zeros(16, -(-part.shape[1] // 32) * 32, dtype=torch.int32)
            u[:count, : part.shape[1]] = part.int() + middle
            tile += [sixteen.view(torch.uint8), blocks_by_hand(u, bits)]
        if zero is not None:
            points = torch.zeros(-(-scale.shape[1] // 4) * 4, 16, dtype=torch.int32)
            points[: scale.shape[1], :count] = zero.reshape(outputs, -1)[rows].t().int() + middle
            tile.append(points.to(torch.uint8).flatten())
        header = torch.zeros(16, dtype=torch.int32)
        header[:4] = torch.tensor([1, outputs, inputs, bits])
        header[4:6] = torch.tensor([group_size or 0, zero is not None])
        tiles.append(torch.cat([*tile, header.view(torch.uint8)]))
    return torch.stack(tiles)


def drawn(
    outputs: int, inputs: int, bits: int, group_size: int | None, zero_points: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
    zero = few_bits(*shape, bits=bits, seed=seed + 2) if zero_points else None
    scale = positive(*shape, seed=seed + 1)
    return few_bits(outputs, inputs, bits=bits, seed=seed), scale, zero


def check_packing(
    weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int | None
) -> None:
    how = {"bits": bits, "group_size": group_size}
    expected = packed_by_hand(weight, scale, zero, bits, group_size)
    check_everywhere(lambda: ops.pack_intx_weight(weight, scale, zero, **how), expected, what=how)
    assert packed_intx_shape(*weight.shape, bits, group_size, zero is not None, CPU) == (
        expected.shape
    )
    zeros = torch.zeros(scale.shape, dtype=torch.int8) if zero is None else zero
    sizes = {**how, "has_zero_point": zero is not None}
    check_everywhere(
        lambda: ops.unpack_intx_weight(expected, *weight.shape, **sizes), (weight, scale, zeros)
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_pack_intx_weight_is_its_picture(bits, group_size):
    for number, (outputs, inputs) in enumerate(((1, 1), (16, 64), (17, 70), (35, 200), (40, 33))):
        size = None if group_size is None else min(group_size, inputs)
        for zero_points in (False, True):
            check_packing(*drawn(outputs, inputs, bits, size, zero_points, number), bits, size)


@settings(max_examples=30)
@given(
    SIZES,
    SIZES,
    st.sampled_from(BITS),
    st.integers(1, 140),
    st.booleans(),
    st.sampled_from(LAYOUTS),
)
def test_any_sizes_and_layouts(outputs, inputs, bits, group_size, zero_points, layout):
    size = min(group_size, inputs)
    weight, scale, zero = drawn(outputs, inputs, bits, size, zero_points, group_size)
    weight, scale = in_layout(weight, layout), in_layout(scale, layout)
    check_packing(weight, scale, zero if zero is None else in_layout(zero, layout), bits, size)


def test_packing_with_threads():
    tensors = drawn(1000, 1111, 5, 128, True)
    packed = packed_by_hand(*tensors, 5, 128)
    check_everywhere(
        lambda: ops.pack_intx_weight(*tensors, bits=5, group_size=128), packed, (1, 2, 5)
    )
    sizes = {"bits": 5, "group_size": 128, "has_zero_point": True}
    check_everywhere(
        lambda: ops.unpack_intx_weight(packed, 1000, 1111, **sizes), tensors, (1, 2, 5)
    )


@pytest.mark.parametrize("bits", BITS)
def test_every_integer_and_any_scale_survive(bits):
    weight = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).repeat(3, 1)
    scale = torch.tensor([2.0**-126, float("inf"), float("nan")])
    zero = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0], dtype=torch.int8)
    packed = ops.pack_intx_weight(weight, scale, zero, bits=bits)
    got = ops.unpack_intx_weight(packed, *weight.shape, bits=bits, has_zero_point=True)
    assert torch.equal(got[0], weight) and torch.equal(got[2], zero)
    assert torch.equal(got[1].view(torch.int32), scale.view(torch.int32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_rows_of_atens_layout_begin_with_the_canonical_bytes(bits, zero_points):
    """On devices other than the CPU: bits, scales, zero points of each output, without a gap."""
    weight, scale, zero = drawn(19, 45, bits, 20, zero_points)
    packed = ATEN.pack_intx_weight(weight, scale, zero, bits, 20)
    parts = [functional.pack_integers(weight, bits), scale.view(torch.uint8)]
    parts += [zero.view(torch.uint8)] if zero_points else []
    assert torch.equal(packed, torch.cat(parts, 1))
    cuda = torch.device("cuda")
    assert packed_intx_shape(19, 45, bits, 20, zero_points, cuda) == packed.shape


def test_memory_is_that_of_the_bits_and_scales():
    for bits in BITS:
        for group_size, overhead in ((32, 4 / 32), (128, 4 / 128), (None, 4 / 4096)):
            scale = torch.ones((64,) if group_size is None else (64, 4096 // group_size))
            weight = torch.zeros(64, 4096, dtype=torch.int8)
            packed = ops.pack_intx_weight(weight, scale, bits=bits, group_size=group_size)
            wanted = 64 * 4096 * (bits / 8 + overhead)
            assert wanted <= packed.numel() <= 1.01 * wanted


# ---------------------------------------------------------------- foreign tensors

N, K, HOW = 20, 70, {"bits": 4, "group_size": 32}
PACKED = ops.pack_intx_weight(*drawn(N, K, 4, 32, False), **HOW)
HEADER = PACKED.shape[1] - 64  # version, N, K, bits, group_size, zero points


def packed_for(outputs: int, inputs: int, group_size: int = 32) -> Tensor:
    tensors = drawn(outputs, inputs, 4, group_size, False)
    return ops.pack_intx_weight(*tensors, bits=4, group_size=group_size)


def damaged(change: Callable[[Tensor], object]) -> Tensor:
    blob = PACKED.clone()
    change(blob)
    return blob


DAMAGE: dict[str, Callable[[], Tensor]] = {
    "truncated": lambda: PACKED[:, :-1],
    "a tile too few": lambda: PACKED[:1],
    "a tile too many": lambda: torch.cat([PACKED, PACKED[:1]]),
    "one long row": lambda: PACKED.reshape(1, -1),
    "transposed in memory": lambda: PACKED.t().contiguous().t(),
    "zeros": lambda: torch.zeros_like(PACKED),
    "a header of zeros": lambda: damaged(lambda blob: blob[:, HEADER:].zero_()),
    "a version to come": lambda: damaged(lambda blob: blob[:, HEADER].fill_(2)),
    "another K in the same blocks": lambda: packed_for(N, K + 1),
    "another N in the same tiles": lambda: packed_for(N + 5, K),
    "another group size in as many blocks": lambda: packed_for(N, K, 31),
    "int8": lambda: PACKED.view(torch.int8),
    "another layout": lambda: ATEN.pack_intx_weight(*drawn(N, K, 4, 32, False), 4, 32),
    "int8 tiles": lambda: ops.pack_weight(drawn(N, K, 4, 32, False)[0]),
}


@pytest.mark.parametrize("make", DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_packed_weights_are_refused(make):
    packed, x = make(), torch.ones(3, K)
    for call in (
        lambda: ops.linear_dynamic_intx(x, packed, out_features=N, **HOW),
        lambda: ops.linear_static_intx(x, torch.ones(1), None, packed, out_features=N, **HOW),
        lambda: ops.unpack_intx_weight(packed, N, K, **HOW),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=r"^\w+: packed (must be the uint8|was made for)"
        ):
            call()


def test_zero_points_must_be_there_or_not():
    with pytest.raises(ValueError, match="packed must be the uint8"):
        ops.unpack_intx_weight(PACKED, N, K, **HOW, has_zero_point=True)


def test_every_tile_has_its_header():
    """What a call reads is the first one; copies in the others make a part of a weight whole."""
    packed = ops.pack_intx_weight(*drawn(50, K, 4, 32, True), **HOW)
    headers = packed[:, -64:]
    assert torch.equal(headers, headers[:1].expand(4, 64))
