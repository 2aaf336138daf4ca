"""Norms on Triton's kernels: the CPU's bits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, LAYOUTS, floats, in_layout
from support.triton_operators import (
    awkward,
    check,
    seeds,
    small_tiles_and_poisoned_memory,  # noqa: F401  (a fixture)
)

# The interpreter computes with numpy, which warns of overflow and NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("small_tiles_and_poisoned_memory"),
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 6), max_size=2),
    st.integers(1, 300),
    st.sampled_from(FLOATS),
    st.sampled_from((None, *FLOATS)),
    st.sampled_from(LAYOUTS),
    st.sampled_from((0.0, 1e-6, 1e-5, 1e-45)),
    st.booleans(),
    seeds,
)
def test_norms(sizes, last, dtype, weights, memory, eps, flag, seed):
    shape = (*sizes, last)
    x = in_layout(awkward(*shape, seed=seed, dtype=dtype, share=0.02), memory)
    weight = None if weights is None else floats(last, seed=seed + 1, dtype=weights)
    bias = None if weights is None or not flag else floats(last, seed=seed + 2, dtype=weights)
    check("rms_norm", x, weight, eps, flag)
    check("layer_norm", x, weight, bias, eps)
    residual = in_layout(floats(*shape, seed=seed + 3, dtype=dtype), memory)
    check("layer_norm", x, weight, bias, eps, residual)


@pytest.mark.parametrize("size", [15, 16, 17, 255, 256, 257, 1000])
def test_norms_of_many_rows(size):
    x, weight, bias = floats(37, size), floats(size, seed=1), floats(size, seed=2)
    check("rms_norm", x, weight, 1e-6)
    check("layer_norm", x, weight, bias, 1e-5)
