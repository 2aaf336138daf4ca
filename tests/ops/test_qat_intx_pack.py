"""quantize_pack_intx: the weights of 2 to 8 bits that a layer in training computes with."""

import itertools
from typing import Any

import pytest
import torch
from support import (
    FLOATS,
    INF,
    LAYOUTS,
    NAN,
    NOT_FINITE,
    assert_same_bits,
    check_everywhere,
    floats,
    in_layout,
    positive,
    sprinkle,
)
from support.qat_intx import BITS, SIZES
from torch import Tensor

from torchquant import functional, ops, quant_range

ATEN = torch.ops.torchquant_aten


def packed(result: functional.qat.Quantized, bits: int, group_size: int | None, zero: bool) -> Any:
    """The specification's result in the operator's form."""
    q, scale, zero_point = result
    scale = torch.where(scale.isnan(), NAN, scale)  # one NaN: the packed bytes are compared
    own = zero_point if zero else None
    return (
        ops.pack_intx_weight(q, scale, own, bits=bits, group_size=group_size),
        scale,
        zero_point,
    )


def weights(bits: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, int | None]]:
    """Weights of all shapes with their group sizes; the second of each holds NaN and infinities."""
    found = []
    for _, outputs, inputs, group_size in SIZES:
        w = floats(outputs, inputs, seed=bits, dtype=dtype)
        found += [(w, group_size), (sprinkle(w, NOT_FINITE, seed=3, share=0.02), group_size)]
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_scales_from_ranges(bits: int, dtype: torch.dtype) -> None:
    for (w, group_size), symmetric in itertools.product(weights(bits, dtype), (True, False)):
        options: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
        }
        want = functional.quantize_pack_intx(w, **options)
        check_everywhere(
            lambda w=w, o=options: ops.quantize_pack_intx(w, **o),
            packed(want, bits, group_size, not symmetric),
            counts=(1, 2),
            what=(w.shape, options),
        )


@pytest.mark.parametrize("bits", BITS)
def test_given_scales(bits: int) -> None:
    qmin, _ = quant_range(bits)
    for w, group_size in weights(bits):
        outputs, inputs = w.shape
        shape = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
        scale = positive(*shape, seed=bits)
        scale.view(-1)[0] = 1e-44  # below the least normal number
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "qmin": qmin}
        want = functional.quantize_pack_intx(w, scale, **options)
        check_everywhere(
            lambda w=w, s=scale, o=options: ops.quantize_pack_intx(w, s, **o),
            packed(want, bits, group_size, False),
            what=(w.shape, group_size),
        )


def test_narrow_ranges() -> None:
    w = torch.tensor([[-9.0, 3.0, 1.0], [4.0, -2.0, 0.5]])
    scale = torch.ones(2, 2)
    for qmin, qmax in ((-7, 7), (-3, 2), (0, 7)):
        options: dict[str, Any] = {"bits": 4, "group_size": 2, "qmin": qmin, "qmax": qmax}
        got, *_ = ops.quantize_pack_intx(w, scale, **options)
        q, *_ = ops.unpack_intx_weight(got, 2, 3, bits=4, group_size=2)
        assert torch.equal(q, w.round().clamp(qmin, qmax).to(torch.int8))


def test_a_group_of_nan_or_infinity_does_not_touch_the_others() -> None:
    w = torch.tensor([[1.0, 2.0, NAN, 1.0, 3.0], [1.0, 2.0, 3.0, 4.0, INF]])
    packed_weight, scale, zero = ops.quantize_pack_intx(w, bits=4, group_size=2, symmetric=False)
    q, *_ = ops.unpack_intx_weight(packed_weight, 2, 5, bits=4, group_size=2, has_zero_point=True)
    assert scale.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert q[0, 2:4].tolist() == [0, 0] and q[1, 4].item() == 0
    assert zero[0, 1].item() == zero[1, 2].item() == 0
    clean, *_ = ops.quantize_pack_intx(w[:, :2], bits=4, group_size=2, symmetric=False)
    want, *_ = ops.unpack_intx_weight(clean, 2, 2, bits=4, group_size=2, has_zero_point=True)
    assert torch.equal(q[:, :2], want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str) -> None:
    w = floats(18, 70)
    for got, want in zip(
        ops.quantize_pack_intx(in_layout(w, layout), bits=5, group_size=32),
        ops.quantize_pack_intx(w, bits=5, group_size=32),
        strict=True,
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("bits", BITS)
def test_composed_of_atens_operators(bits: int) -> None:
    qmin, qmax = quant_range(bits)
    for (w, group_size), symmetric in itertools.product(weights(bits), (True, False)):
        call = (w, None, bits, group_size, qmin, qmax, symmetric)
        rows, *got = ATEN.quantize_pack_intx(*call)
        tiles, *want = torch.ops.torchquant.quantize_pack_intx(*call)
        sizes = (*w.shape, bits, group_size, not symmetric)
        got += ATEN.unpack_intx_weight(rows, *sizes)
        want += torch.ops.torchquant.unpack_intx_weight(tiles, *sizes)
        for mine, theirs in zip(got, want, strict=True):
            assert_same_bits(mine, theirs, (w.shape, group_size))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "weight must be float32"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have shape"),
        ({"bits": 1}, ValueError, "bits must be"),
        ({"bits": 9}, ValueError, "bits must be"),
        ({"group_size": 0}, ValueError, "group_size must be None .* in_features = 4, got 0"),
        ({"group_size": 5}, ValueError, "group_size must be None .* in_features = 4, got 5"),
        ({"qmin": -9}, ValueError, "qmin and qmax must lie within -8 .. 7 for bits = 4, got -9"),
        ({"qmin": -3}, ValueError, "qmin must be at most -qmax = -7 .* got -3"),
        ({"scale": torch.ones(2, 3)}, ValueError, "scale must be float32 \\[2, 2\\]"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be float32 \\[2, 2\\]"),
        ({"scale": torch.ones(2, 2).double()}, TypeError, "scale must be float32"),
        (
            {"scale": torch.ones(2, 2), "symmetric": False},
            ValueError,
            "symmetric must be True with scale, got False",
        ),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"weight": torch.randn(2, 4), "bits": 4, "group_size": 2} | changes
    with pytest.raises(error, match=message):
        ops.quantize_pack_intx(**given)
    options = (None, None, True) if "bits" in changes else (-8, 7, True)
    if "bits" in changes:
        return
    low, high, symmetric = options
    low, symmetric = changes.get("qmin", low), changes.get("symmetric", symmetric)
    with pytest.raises(error, match=message):
        ATEN.quantize_pack_intx(
            given["weight"], given.get("scale"), 4, given["group_size"], low, high, symmetric
        )
