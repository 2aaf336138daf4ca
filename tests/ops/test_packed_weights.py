"""Packed weights: their layout, and refusals of tensors that are not packed weights."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    LAYOUTS,
    check_everywhere,
    in_layout,
    integers,
)
from support.linear_layers import (
    SIZES,
)
from support.operands import (
    CALL,
    PACKED,
    K,
    N,
    Q,
    dynamic,
    static,
)
from torch import Tensor

from torchquant import PackedWeight, ops, quantized_linear


def packed_by_hand(weight: Tensor) -> Tensor:
    """csrc/formats/int8_tiles.h, read from its picture."""
    outputs, inputs = weight.shape
    tiles, depth = -(-outputs // 16), -(-inputs // 64) * 64
    padded = torch.zeros(tiles * 16, depth, dtype=torch.int8)
    padded[:outputs, :inputs] = weight
    rows = padded.reshape(tiles, 16, depth // 4, 4).transpose(1, 2).reshape(tiles, depth * 16)
    sums = padded.to(torch.int32).sum(1, dtype=torch.int32).reshape(tiles, 16)
    flags = torch.zeros(tiles, 16, dtype=torch.int32)
    flags[:, 0] = (padded == -128).reshape(tiles, -1).any(1)
    flags[:, 1], flags[:, 2], flags[:, 3] = inputs, outputs, 1
    tail = torch.cat([sums, flags], dim=1).view(torch.int8)
    return torch.cat([rows, tail], dim=1)


@settings(max_examples=40)
@given(SIZES, SIZES, st.booleans(), st.sampled_from(LAYOUTS), st.integers(0, 1000))
def test_pack_weight_is_its_picture(outputs, inputs, minus_128, layout, seed):
    weight = integers(outputs, inputs, seed=seed).clamp(min=-128 if minus_128 else -127)
    weight = in_layout(weight, layout)
    expected = packed_by_hand(weight)
    check_everywhere(lambda: ops.pack_weight(weight), expected)
    check_everywhere(lambda: ops.unpack_weight(ops.pack_weight(weight), outputs, inputs), weight)


def test_pack_weight_with_threads():
    weight = integers(1000, 1111)
    check_everywhere(lambda: ops.pack_weight(weight), packed_by_hand(weight), (1, 2))
    packed = ops.pack_weight(weight)
    check_everywhere(lambda: ops.unpack_weight(packed, 1000, 1111), weight, (1, 2))


def damaged(change: Callable[[Tensor], None]) -> Tensor:
    blob = PACKED.clone()
    change(blob)
    return blob


HEADER = PACKED.shape[1] - 64  # flags: holds -128, K, N, version


DAMAGE: dict[str, Callable[[], Tensor]] = {
    "truncated": lambda: PACKED[:, :-1],
    "a tile too few": lambda: PACKED[:1],
    "a tile too many": lambda: torch.cat([PACKED, PACKED[:1]]),
    "one long row": lambda: PACKED.reshape(1, -1),
    "transposed in memory": lambda: PACKED.t().contiguous().t(),
    "zeros": lambda: torch.zeros_like(PACKED),
    "a header of zeros": lambda: damaged(lambda blob: blob[:, HEADER:].zero_()),
    "a version to come": lambda: damaged(lambda blob: blob[:, HEADER + 12].fill_(2)),
    "another K in the same padding": lambda: ops.pack_weight(integers(N, K + 20)),
    "another N in the same tiles": lambda: ops.pack_weight(integers(N + 5, K)),
    "uint8": lambda: PACKED.view(torch.uint8),
}


@pytest.mark.parametrize("make", DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_packed_weights_are_refused(make):
    packed = make()
    for call in (
        lambda: dynamic(packed=packed),
        lambda: static(packed=packed),
        lambda: ops.int8_mm(Q, packed, N),
        lambda: ops.unpack_weight(packed, N, K),
        lambda: quantized_linear(Q, PackedWeight(packed, N, K), **CALL),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=r"^\w+: packed (must be the int8|was made)"
        ):
            call()
