"""Affine quantization of tensors, rows and weights on Triton's kernels: the CPU's bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    EXTREME,
    FLOATS,
    LAYOUTS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    in_layout,
    integers,
    positive,
    sprinkle,
)
from support.triton import module
from support.triton_operators import (
    CPU,
    ZERO_POINTS,
    awkward,
    call,
    check,
    check_rows,
    in_rows,
    layouts_of_scales,
    scales_of,
    seeds,
    shapes,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
    zero_points,
)

rows = module("kernels.rows")
EXAMPLES = settings(max_examples=30)
SIZES = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 70])
DEPTHS = st.sampled_from([1, 2, 7, 16, 63, 64, 65, 100, 128, 200])

# The interpreter computes with numpy, which warns of overflow and NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles_and_poisoned_memory"),
]


@settings(deadline=None, max_examples=50)
@given(
    shapes,
    st.sampled_from(FLOATS),
    st.sampled_from(LAYOUTS),
    st.sampled_from((torch.int8, torch.uint8)),
    st.sampled_from(ZERO_POINTS),
    seeds,
    st.data(),
)
def test_quantize_and_dequantize(shape, dtype, memory, integer, kind, seed, data):
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype), memory)
    layout = data.draw(st.sampled_from(layouts_of_scales(shape)))
    s = scales_of(x, layout, seed)
    limits = (-128, 127) if integer == torch.int8 else (0, 255)
    z = zero_points(kind, s.shape, *limits, seed)
    check("quantize", x, s, z, *limits, **layout, dtype=integer)
    check("quantize", x, s, z, 0, 7, **layout, dtype=integer)
    q = in_layout(integers(*shape, seed=seed, dtype=integer), memory)
    check("dequantize", q, s, z, **layout, dtype=dtype)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 2, 17), (2, 300), (9, 64)], ids=str)
def test_quantize_per_token(shape: tuple[int, ...], symmetric: bool, dtype: torch.dtype) -> None:
    for seed in range(3):
        x = floats(*shape, seed=seed).to(dtype)
        x = sprinkle(x, (SPECIAL, EXTREME, NOT_FINITE)[seed], seed).to(dtype)
        check_rows("quantize_per_token", [x, symmetric], [x, symmetric], seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_any_memory(layout: str) -> None:
    x = in_layout(floats(6, 40), layout)
    check_rows("quantize_per_token", [x, False], [x, False])
    w = integers(20, 40)
    args = [torch.full((20,), 0.02), None, None, 20]
    check_rows("linear_dynamic", [x, CPU.pack_weight(w), *args], [x, in_rows(w), *args])
    q = in_layout(integers(6, 40), layout)
    check_rows("int8_mm", [q, CPU.pack_weight(w), 20], [q, in_rows(w), 20])


@EXAMPLES
@given(data=st.data())
def test_quantize_rows(data: st.DataObject) -> None:
    m, k = data.draw(SIZES), data.draw(DEPTHS)
    qmin, qmax = data.draw(st.sampled_from([(-128, 127), (-127, 127), (-8, 7), (-2, 1), (0, 1)]))
    x = sprinkle(floats(m, k, seed=k), SPECIAL + NOT_FINITE, m, share=0.05)
    x = x.to(data.draw(st.sampled_from(FLOATS)))
    scale = zero = None
    if data.draw(st.booleans()):
        scale = torch.tensor([data.draw(st.sampled_from([0.03, 2.0**-130, 1e30, float("nan")]))])
        if data.draw(st.booleans()):
            zero = torch.tensor([data.draw(st.integers(qmin, qmax))], dtype=torch.int32)
    symmetric = qmin < 0 and data.draw(st.booleans())  # a symmetric range has both signs
    args = [x, scale, zero, qmin, qmax, symmetric]
    check_rows("quantize_rows", args, args)


@pytest.fixture
def narrow_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of a few hundred elements go in two passes."""
    monkeypatch.setattr(rows, "_ONE_PASS", 32)
    monkeypatch.setattr(rows, "_LOOP", 64)


@pytest.mark.usefixtures("narrow_passes")
@pytest.mark.parametrize("k", [33, 64, 200])
def test_rows_in_two_passes(k: int) -> None:
    x = floats(4, k)
    x[1, -1] = float("nan")
    x[2, -1] = 1e4
    for symmetric in (True, False):
        check_rows("quantize_per_token", [x, symmetric], [x, symmetric])
    args = [x, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), -128, 127, False]
    check_rows("quantize_rows", args, args)
    w = integers(20, k)
    args = [torch.full((20,), 0.02), torch.full((20,), 3, dtype=torch.int32), None, 20]
    check_rows("linear_dynamic", [x, CPU.pack_weight(w), *args], [x, in_rows(w), *args])


@EXAMPLES
@given(data=st.data())
def test_quantize_pack(data: st.DataObject) -> None:
    n, k = data.draw(SIZES), data.draw(DEPTHS)
    qmin, qmax = data.draw(st.sampled_from([(-127, 127), (-128, 127), (-8, 7)]))
    w = sprinkle(floats(n, k, seed=n), SPECIAL + NOT_FINITE, k, share=0.05)
    w = w.to(data.draw(st.sampled_from(FLOATS)))
    count = data.draw(st.sampled_from([None, 1, n]))
    scale = None if count is None else positive(count, seed=k)
    args = [w, scale, qmin, qmax, data.draw(st.booleans())]
    packed, *params = call("quantize_pack", *args)
    expected, *wanted = CPU.quantize_pack(*args)
    assert_same_bits(packed.cpu(), in_rows(CPU.unpack_weight(expected, n, k)), "packed")
    for got, want in zip(params, wanted, strict=True):
        assert_same_bits(got.cpu(), want)


@pytest.mark.usefixtures("narrow_passes")
@pytest.mark.parametrize("n, k", [(1, 100), (17, 33), (16, 64)])
def test_quantize_pack_in_two_passes(n: int, k: int) -> None:
    w = floats(n, k).half()
    for scale in (None, torch.tensor([0.5])):
        packed, *_ = call("quantize_pack", w, scale, -127, 127, False)
        expected, *_ = CPU.quantize_pack(w, scale, -127, 127, False)
        assert_same_bits(packed.cpu(), in_rows(CPU.unpack_weight(expected, n, k)))
