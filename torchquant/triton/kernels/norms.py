"""RMSNorm and LayerNorm of rows, with the order of additions that torchquant/functional defines.

Element i of a row belongs to lane i mod 16. A lane adds its elements one after the other; then
lanes 8 apart are added, then lanes 4, 2 and 1 apart. A row is therefore summed 16 elements per
step. For speed, a program works on several rows and has the loads of many steps in flight. The
number of programs is limited so that the rows of all programs fit into the cache, where the later
passes over a row read it.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

import triton
import triton.language as tl

from torchquant.triton.kernels.language import divide, fma

ROWS = 8  # per program, which has one warp
COLUMNS = 128  # that a program writes at once
CACHED_BYTES = 24 * 2**20  # half of a large GPU's L2 cache
LEAST_PROGRAMS = 512  # with fewer programs, long rows would leave the GPU idle


@triton.jit
def _load(x, residual, at, residual_at, inside, RESIDUAL: tl.constexpr):
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        v = v + tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _sum_of_lanes(lanes, ROWS: tl.constexpr):
    """fp32 ``[ROWS, 16]`` to ``[ROWS, 1]``."""
    # Each sum has two terms, so its order does not matter.
    halves = tl.reshape(lanes, (ROWS, 2, 2, 2, 2))
    return tl.reshape(tl.sum(tl.sum(tl.sum(tl.sum(halves, 1), 1), 1), 1), (ROWS, 1))


@triton.jit
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    count,
    length,
    x_stride,
    residual_stride,
    size,
    eps,
    CENTERED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """CENTERED: layer_norm instead of rms_norm. CAST: round to the output's type before the weight.

    STEPS: steps of 16 elements whose loads are in flight together. size: length as fp32.
    """
    for block in range(tl.program_id(0), (count + ROWS - 1) // ROWS, tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        present = rows < count
        lane = tl.arange(0, 16)[None, :]
        mean = tl.zeros((ROWS, 1), tl.float32)
        if CENTERED:
            lanes = tl.zeros((ROWS, 16), tl.float32)
            for begin in range(0, length, 16 * STEPS):
                for step in tl.static_range(STEPS):
                    i = begin + step * 16 + lane
                    inside = present & (i < length)
                    at, residual_at = rows * x_stride + i, rows * residual_stride + i
                    lanes += _load(x, residual, at, residual_at, inside, RESIDUAL)
            mean = divide(_sum_of_lanes(lanes, ROWS), size)
        lanes = tl.zeros((ROWS, 16), tl.float32)
        for begin in range(0, length, 16 * STEPS):
            for step in tl.static_range(STEPS):
                i = begin + step * 16 + lane
                inside = present & (i < length)
                at, residual_at = rows * x_stride + i, rows * residual_stride + i
                v = _load(x, residual, at, residual_at, inside, RESIDUAL)
                if CENTERED:
                    v = tl.where(inside, v - mean, 0.0)
                lanes = fma(v, v, lanes)
        inverse = divide(_sum_of_lanes(lanes, ROWS), size) + eps
        inverse = divide(1.0, tl.sqrt_rn(inverse))
        for begin in range(0, length, COLUMNS):
            i = begin + tl.arange(0, COLUMNS)[None, :]
            inside = present & (i < length)
            at, residual_at = rows * x_stride + i, rows * residual_stride + i
            v = _load(x, residual, at, residual_at, inside, RESIDUAL)
            if CENTERED:
                v = v - mean
            v = v * inverse
            if CAST:
                v = v.to(out.dtype.element_ty).to(tl.float32)
            if WEIGHT:
                w = tl.load(weight + i, mask=i < length, other=0.0).to(tl.float32)
                if BIAS:
                    v = fma(v, w, tl.load(bias + i, mask=i < length, other=0.0).to(tl.float32))
                else:
                    v = v * w
            tl.store(out + (rows * length + i), v.to(out.dtype.element_ty), mask=inside)
