"""The convolution operators give the bits of their specification, on every instruction set.

The other side of each comparison is `torchquant.functional`, whose sums are matrix products of
integers in float64.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, floats, integers, positive
from support.conv_layers import FORMATS, NAMED, Convolution, convolutions
from torch import Tensor

from torchquant import functional, ops

STEP, ZERO = torch.tensor([0.05]), torch.tensor([-7], dtype=torch.int32)
INT8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.4])}
named = pytest.mark.parametrize("conv", NAMED.values(), ids=NAMED)


def outputs(conv: Convolution) -> tuple[int, ...]:
    w, x = conv.weight, torch.empty(conv.input_shape, device="meta")
    return (conv.batch, w.shape[0], *functional_output(x, w, conv))


def functional_output(x: Tensor, w: Tensor, conv: Convolution) -> tuple[int, ...]:
    sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
    both = functional.conv.conv_sizes("test", x.shape, w, *sizes).output
    return both if x.dim() == 4 else both[1:]


@settings(max_examples=60)
@given(conv=convolutions(), dtype=st.sampled_from(FLOATS), symmetric=st.booleans())
def test_conv_dynamic_is_its_specification(conv, dtype, symmetric):
    conv.check_dynamic(dtype, symmetric=symmetric)


@settings(max_examples=100)
@given(
    conv=convolutions(),
    zero=st.sampled_from((None, -128, 0, 127)),
    residual=st.sampled_from((None, torch.float32, torch.int8)),
    output=st.sampled_from((*FLOATS, torch.int8)),
    limits=st.sampled_from(((-128, 127, 0), (-128, 127, -128), (-100, 90, 17), (-8, 7, 7))),
    scale=st.sampled_from((0.4, 30.0, 1e-3)),
)
def test_conv_static_of_integers_is_its_specification(conv, zero, residual, output, limits, scale):
    options: dict[str, Any] = {"output_dtype": output}
    if output == torch.int8:
        options |= {"output_scale": torch.tensor([scale])}
        options |= dict(
            zip(("output_qmin", "output_qmax", "output_zero_point"), limits, strict=True)
        )
    if residual is not None:
        shape = outputs(conv)
        values = integers(*shape) if residual == torch.int8 else floats(*shape)
        options["residual"] = conv.formed(values)
        if residual == torch.int8:
            options |= {"residual_scale": torch.tensor([0.2]), "residual_zero_point": -3}
    zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    conv.check_static(integers(*conv.input_shape), STEP, zero_point, **options)


@settings(max_examples=40)
@given(
    conv=convolutions(),
    dtype=st.sampled_from(FLOATS),
    limits=st.sampled_from(((-128, 127), (-127, 127), (-8, 7))),
    to_int8=st.booleans(),
)
def test_conv_static_of_floats_is_its_specification(conv, dtype, limits, to_int8):
    options = dict(zip(("input_qmin", "input_qmax"), limits, strict=True))
    if to_int8:
        options |= INT8
    conv.check_static(floats(*conv.input_shape, dtype=dtype), STEP, ZERO, **options)


@named
@pytest.mark.parametrize("output", [torch.float32, torch.int8], ids=str)
def test_kernels_of_well_known_networks(conv: Convolution, output: torch.dtype) -> None:
    options = INT8 if output == torch.int8 else {}
    conv.check_static(integers(*conv.input_shape), STEP, ZERO, (1, 2), **options)


@named
def test_dynamic_kernels_of_well_known_networks(conv: Convolution) -> None:
    conv.check_dynamic(torch.float32, (1, 2), symmetric=False)


@pytest.mark.parametrize("tiles", range(1, 10))
def test_outputs_around_the_tiles(tiles: int) -> None:
    """The int8 product takes one to four tiles of 16 outputs side by side."""
    for outputs in (16 * tiles, 16 * tiles - 3):
        conv = Convolution(1, 5, outputs, (7, 5), (2, 1), (1, 1), (0,) * 4, (1, 1), seed=tiles)
        conv.check_static(integers(*conv.input_shape), STEP, ZERO, **INT8)


@pytest.mark.parametrize("pixels", [*range(1, 19), 49, 50, 98, 99, 113])
def test_pixels_around_the_blocks(pixels: int) -> None:
    conv = Convolution(1, 7, 70, (pixels,), (1,), (1,), (0, 0), (1,), seed=pixels)
    conv.check_static(integers(*conv.input_shape), STEP, ZERO, **INT8)


def test_samples_of_their_own() -> None:
    conv = Convolution(3, 6, 20, (5, 4), (3, 3), (1, 1), (1,) * 4, (1, 1))
    scale, zero = positive(3), integers(3).to(torch.int32)
    for output in ({}, INT8):
        for one, other in ((scale, zero), (scale, None), (scale, ZERO), (STEP, zero)):
            conv.check_static(integers(*conv.input_shape), one, other, **output)


def test_values_that_int8_products_do_not_hold() -> None:
    """Scales so large, or not numbers, that the conversion to an integer needs care."""
    base = Convolution(1, 9, 20, (4, 4), (3, 3), (1, 1), (1,) * 4, (1, 1))
    x, packed = integers(*base.input_shape), ops.pack_conv_weight(base.weight, 1)
    for value in (1e30, 3e38, NAN, INF, 1e-38):
        scale, bias = base.scale.clone(), base.bias_values
        scale[7] = value
        for so in (0.4, 1e-30, 1e30):
            options = {**base.sizes, **INT8, "output_scale": torch.tensor([so])}
            expected = functional.conv_static(x, STEP, ZERO, base.weight, scale, bias, **options)
            options["weight_shape"] = list(base.weight.shape)
            got = ops.conv_static(x, STEP, ZERO, packed, scale, bias, **options)
            assert_same_bits(got, expected, (value, so))


# ---------------------------------------------------------------- memory, batches, NaN

CONV = Convolution(3, 12, 20, (6, 5), (3, 2), (2, 1), (1, 0, 2, 1), (1, 1))
LAYER = {"weight_shape": list(CONV.weight.shape), **CONV.sizes}
PACKED = ops.pack_conv_weight(CONV.weight, 1)


def static(x: Tensor, **options: Any) -> Tensor:
    call = (x, STEP, ZERO, PACKED, CONV.scale, CONV.bias_values)
    return ops.conv_static(*call, **{**LAYER, **options})


def dynamic(x: Tensor) -> Tensor:
    return ops.conv_dynamic(x, PACKED, CONV.scale, CONV.bias_values, **LAYER)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_the_memory_of_the_input_changes_no_bits(form: str, dtype: torch.dtype) -> None:
    x = integers(*CONV.input_shape)
    x = x if dtype == torch.int8 else floats(*CONV.input_shape)
    formed = Convolution(**{**vars(CONV), "form": form}).formed(x)
    assert torch.equal(formed, x)
    got = static(formed)
    assert_same_bits(got, static(x))
    if form == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert not got.is_contiguous()
    if form == "contiguous":
        assert got.is_contiguous()


@pytest.mark.parametrize("call", [static, dynamic])
def test_a_sample_alone_has_the_bits_of_the_batch(isa: str, call: Any) -> None:
    x = floats(*CONV.input_shape, seed=3)
    whole = call(x)
    for i in range(3):
        assert_same_bits(call(x[i : i + 1]), whole[i : i + 1])
    assert_same_bits(torch.cat([call(x[:1]), call(x[1:])]), whole)


def test_a_sample_with_nan_is_nan_and_others_are_untouched(isa: str) -> None:
    x = floats(*CONV.input_shape, seed=3)
    bad = x.clone()
    bad[1, 4, 3, 2] = NAN
    for call in (static, dynamic):
        got, clean = call(bad), call(x)
        assert got[1].isnan().all()
        assert_same_bits(got[[0, 2]], clean[[0, 2]])
    got, clean = static(bad, **INT8, output_zero_point=9), static(x, **INT8, output_zero_point=9)
    assert (got[1] == 9).all()
    assert_same_bits(got[[0, 2]], clean[[0, 2]])
    bad[1, 4, 3, 2] = -INF
    assert dynamic(bad)[1].isnan().all()
    saturated = x.clone()
    saturated[1, 4, 3, 2] = -1e30
    assert_same_bits(static(bad), static(saturated))


def test_no_samples() -> None:
    for dtype in (torch.float32, torch.int8):
        x = torch.empty(0, *CONV.input_shape[1:], dtype=dtype)
        assert static(x).shape == (0, *static(integers(*CONV.input_shape)).shape[1:])
    assert dynamic(torch.empty(0, *CONV.input_shape[1:])).shape[0] == 0
    assert static(torch.empty(0, *CONV.input_shape[1:]), **INT8).dtype == torch.int8


@named
def test_packing_keeps_the_weight(conv: Convolution) -> None:
    w = conv.weight
    packed = ops.pack_conv_weight(w, conv.groups)
    assert torch.equal(ops.unpack_conv_weight(packed, list(w.shape), conv.groups), w)
    transposed = w.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(ops.pack_conv_weight(transposed, conv.groups), packed)
