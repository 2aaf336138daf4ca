"""Integer matrix products on the rows layout (csrc/cuda/rows_layout.h), with everything after them.

One kernel call goes from int8 rows to the finished output: zero points, scales, bias, activation,
output type. Three ways, a :class:`Config` says which:

tma
    For large products on Hopper and later. As many programs as there are multiprocessors, each
    taking one output tile after the other; both operands come by the tensor memory accelerator in
    ``stages`` buffers, and the loads of the next tile start during this one's epilogue. Tiles are
    ordered in groups of ``group`` tile rows, so that what runs at one time shares its operands in
    the L2 cache. The output leaves in ``subtiles`` parts, which lets a deeper pipeline fit.
pointer
    Any shape, row stride and device. One program an output tile.
pointer with ``split`` > 1
    For few rows: the programs share out K too, until they cover the multiprocessors. Integer
    partial sums go to a workspace; a second kernel adds them and does the epilogue. Integers: the
    order does not matter.

K beyond what 32-bit sums hold is left to the caller (:func:`greatest_k`). Sums wrap around on the
way, which is fine while the final value fits.
"""
# Annotations must be objects here, not strings: the interpreter finds constexpr parameters by them.

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torchquant.triton.activation import apply_activation
from torchquant.triton.language import fma, quantize, reciprocal
from torchquant.triton.launch import launch, next_power_of_2

# ---------------------------------------------------------------- kernels


@triton.jit
def _finish(
    acc,
    row,
    column,
    m,
    n,
    k,
    sx_ptr,
    zx_ptr,
    row_sums_ptr,
    sw_ptr,
    zw_ptr,
    sums_ptr,
    bias_ptr,
    so_ptr,
    zo,
    qmin,
    qmax,
    SX: tl.constexpr,
    ZX: tl.constexpr,
    SW: tl.constexpr,
    ZW: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """int32 sums ``[rows, columns]`` to what is stored; SX, ZX, SW, ZW: strides, 0 for one value.

    With x' = x - 128 for uint8 input (else x' = x) and zx' = zx - 128 likewise::

        sum (x - zx) (w - zw) = sum x' w - zx' sum w - zw (sum x - K zx)
    """
    is_row = row < m
    is_column = column < n
    if zx_ptr is not None or UNSIGNED:
        shifted = tl.zeros_like(row)
        if zx_ptr is not None:
            shifted += tl.load(zx_ptr + row * ZX, mask=is_row, other=0)
        if UNSIGNED:
            shifted -= 128
        weight_sums = tl.load(sums_ptr + column, mask=is_column, other=0)
        acc -= shifted[:, None] * weight_sums[None, :]
    if zw_ptr is not None:
        zw = tl.load(zw_ptr + column * ZW, mask=is_column, other=0)
        row_sums = tl.load(row_sums_ptr + row, mask=is_row, other=0)
        if zx_ptr is not None:
            row_sums -= k * tl.load(zx_ptr + row * ZX, mask=is_row, other=0)
        acc -= zw[None, :] * row_sums[:, None]
    if sx_ptr is None:
        result = acc
    else:
        sx = tl.load(sx_ptr + row * SX, mask=is_row, other=0.0)
        sw = tl.load(sw_ptr + column * SW, mask=is_column, other=0.0)
        scale = sx[:, None] * sw[None, :]
        if bias_ptr is None:
            y = acc.to(tl.float32) * scale
        else:
            bias = tl.load(bias_ptr + column, mask=is_column, other=0)
            if bias_ptr.dtype.element_ty == tl.int32:
                total = acc.to(tl.int64) + bias.to(tl.int64)[None, :]
                y = total.to(tl.float32) * scale
            else:
                y = fma(acc.to(tl.float32), scale, tl.broadcast_to(bias[None, :], acc.shape))
        y = apply_activation(y, ACTIVATION)
        if so_ptr is None:
            result = y
        else:
            inverse = reciprocal(tl.load(so_ptr))
            lo = (qmin - zo).to(tl.float32)
            hi = (qmax - zo).to(tl.float32)
            result = quantize(y, inverse, lo, hi, zo)
    return result


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def _parts(acc, SUBTILES: tl.constexpr):
    """1, 2 or 4 parts of the columns: an epilogue on all of them at once runs out of registers."""
    if SUBTILES == 1:
        parts = (acc,)
    elif SUBTILES == 2:
        parts = _halves(acc)
    else:
        tl.static_assert(SUBTILES == 4)
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
    return parts


@triton.jit
def _tile_at(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tiles: down GROUP tile rows, then the next column."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def _pointer_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    out_ptr,
    out_stride,
    m,
    n,
    columns,
    k,
    sx_ptr,
    zx_ptr,
    row_sums_ptr,
    sw_ptr,
    zw_ptr,
    sums_ptr,
    bias_ptr,
    so_ptr,
    zo,
    qmin,
    qmax,
    SX: tl.constexpr,
    ZX: tl.constexpr,
    SW: tl.constexpr,
    ZW: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One output tile; SPLIT > 1: the share of K that program_id(1) says, to out[that]."""
    tile_m, tile_n = _tile_at(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_at = w_ptr + column.to(tl.int64)[:, None] * w_stride + inner[None, :]
    is_row = (row < m)[:, None]
    is_column = (column < n)[:, None]

    steps = tl.cdiv(columns, BLOCK_K)
    begin = 0
    if SPLIT > 1:
        share = tl.cdiv(steps, SPLIT)
        begin = tl.program_id(1) * share
        steps = tl.minimum(begin + share, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(begin, steps):
        start = step * BLOCK_K
        if EVEN_K:
            x = tl.load(x_at + start, mask=is_row, other=0)
            w = tl.load(w_at + start, mask=is_column, other=0)
        else:
            inside = (start + inner < columns)[None, :]
            x = tl.load(x_at + start, mask=is_row & inside, other=0)
            w = tl.load(w_at + start, mask=is_column & inside, other=0)
        if UNSIGNED:
            x = x ^ -128  # uint8 seen as int8: x - 128
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)

    out_rows = out_ptr + row.to(tl.int64)[:, None] * out_stride
    if SPLIT > 1:
        out_rows += tl.program_id(1) * m.to(tl.int64) * out_stride
    PART: tl.constexpr = BLOCK_N // SUBTILES
    parts = _parts(acc, SUBTILES)
    for part in tl.static_range(SUBTILES):
        column = tile_n * BLOCK_N + part * PART + tl.arange(0, PART)
        is_output = is_row & (column < n)[None, :]
        result = parts[part]
        if SPLIT == 1:
            result = _finish(
                result,
                row,
                column,
                m,
                n,
                k,
                sx_ptr,
                zx_ptr,
                row_sums_ptr,
                sw_ptr,
                zw_ptr,
                sums_ptr,
                bias_ptr,
                so_ptr,
                zo,
                qmin,
                qmax,
                SX,
                ZX,
                SW,
                ZW,
                UNSIGNED,
                ACTIVATION,
            )
        tl.store(out_rows + column[None, :], result.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def _add_kernel(
    partial_ptr,
    out_ptr,
    out_stride,
    m,
    n,
    k,
    sx_ptr,
    zx_ptr,
    row_sums_ptr,
    sw_ptr,
    zw_ptr,
    sums_ptr,
    bias_ptr,
    so_ptr,
    zo,
    qmin,
    qmax,
    SX: tl.constexpr,
    ZX: tl.constexpr,
    SW: tl.constexpr,
    ZW: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what SPLIT programs left in partial[SPLIT, m, n]."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = (row < m)[:, None] & (column < n)[None, :]
    plane = m.to(tl.int64) * n
    at = partial_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(at + part * plane, mask=is_output, other=0)
    result = _finish(
        acc,
        row,
        column,
        m,
        n,
        k,
        sx_ptr,
        zx_ptr,
        row_sums_ptr,
        sw_ptr,
        zw_ptr,
        sums_ptr,
        bias_ptr,
        so_ptr,
        zo,
        qmin,
        qmax,
        SX,
        ZX,
        SW,
        ZW,
        UNSIGNED,
        ACTIVATION,
    )
    out_at = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["m", "zo", "qmin", "qmax"])
def _tma_kernel(
    x_desc,
    w_desc,
    out,
    out_stride,
    m,
    n,
    columns,
    k,
    sx_ptr,
    zx_ptr,
    row_sums_ptr,
    sw_ptr,
    zw_ptr,
    sums_ptr,
    bias_ptr,
    so_ptr,
    zo,
    qmin,
    qmax,
    SX: tl.constexpr,
    ZX: tl.constexpr,
    SW: tl.constexpr,
    ZW: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_DESC: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output tiles one after the other; out is a descriptor where OUT_DESC, else a pointer."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(columns, BLOCK_K)
    PART: tl.constexpr = BLOCK_N // SUBTILES
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = _tile_at(tile, tiles_m, tiles_n, GROUP)
        first_row = tile_m * BLOCK_M
        first_column = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([first_row, step * BLOCK_K])
            w = w_desc.load([first_column, step * BLOCK_K])
            if UNSIGNED:
                x = x ^ -128
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)

        row = first_row + tl.arange(0, BLOCK_M)
        parts = _parts(acc, SUBTILES)
        for part in tl.static_range(SUBTILES):
            column = first_column + part * PART + tl.arange(0, PART)
            result = _finish(
                parts[part],
                row,
                column,
                m,
                n,
                k,
                sx_ptr,
                zx_ptr,
                row_sums_ptr,
                sw_ptr,
                zw_ptr,
                sums_ptr,
                bias_ptr,
                so_ptr,
                zo,
                qmin,
                qmax,
                SX,
                ZX,
                SW,
                ZW,
                UNSIGNED,
                ACTIVATION,
            )
            if OUT_DESC:
                out.store([first_row, first_column + part * PART], result.to(out.dtype))
            else:
                at = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
                is_output = (row < m)[:, None] & (column < n)[None, :]
                tl.store(at, result.to(out.dtype.element_ty), mask=is_output)


# ---------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Config:
    """Which kernel, in which shape (this module's docstring); all fields plain, for a cache."""

    kind: str  # "tma" or "pointer"
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    subtiles: int = 1


@dataclass(frozen=True, eq=False)
class Problem:
    """One product with its epilogue; checked by who makes it.

    Args:
        x: int8 or uint8 ``[M, K']``, last stride 1; columns from ``k`` to K' have any content, the
            weight is 0 there (K' = weight's width then).
        weight: int8 ``[N16, K64]``, the rows of the layout.
        sums: int32 ``[N16]``, of the weight's rows.
        out: ``[M, N]``, last stride 1. int32 for raw sums, float, or int8 or uint8.
        k: in_features.
        scale: fp32 ``[1]`` or ``[M]``; None: raw sums.
        zero_point: int32 ``[1]`` or ``[M]``, or None.
        row_sums: int32 ``[M]``, of x over the k inputs; needed with weight_zero_point.
        weight_scale: fp32 ``[1]`` or ``[N]``; weight_zero_point: int32 ``[1]`` or ``[N]`` or None.
        bias: fp32 or int32 ``[N]`` or None.
        activation: a name of functional.ACTIVATIONS.
        output_scale: fp32 ``[1]`` for an int8 or uint8 output, with its zero point and range.
    """

    x: Tensor
    weight: Tensor
    sums: Tensor
    out: Tensor
    k: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    row_sums: Tensor | None = None
    weight_scale: Tensor | None = None
    weight_zero_point: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    output_scale: Tensor | None = None
    output_zero_point: int = 0
    output_qmin: int = -128
    output_qmax: int = 127

    @property
    def m(self) -> int:
        return self.out.shape[0]

    @property
    def n(self) -> int:
        return self.out.shape[1]

    @property
    def unsigned(self) -> bool:
        return self.x.dtype == torch.uint8

    @property
    def columns(self) -> int:
        """Over which the product runs: all of x, which is the layout's padded K or k itself."""
        return self.x.shape[1]

    @property
    def loads_by_tma(self) -> bool:
        """Whether the tensor memory accelerator can read x: 16-byte aligned rows."""
        return self.x.stride(0) % 16 == 0 and self.x.data_ptr() % 16 == 0

    @property
    def stores_by_tma(self) -> bool:
        """Whether it can write the output."""
        size = self.out.element_size()
        return self.out.stride(0) * size % 16 == 0 and self.out.data_ptr() % 16 == 0

    @property
    def key(self) -> tuple[str, ...]:
        """What besides M, N, K decides how fast a configuration is."""

        def kind(tensor: Tensor | None) -> str:
            if tensor is None:
                return "none"
            return f"{str(tensor.dtype)[6:]}{'' if tensor.numel() == 1 else '[]'}"

        return (
            kind(self.x),
            kind(self.out),
            kind(self.scale),
            kind(self.zero_point),
            kind(self.weight_zero_point),
            kind(self.bias),
            self.activation,
            "aligned" if self.loads_by_tma and self.stores_by_tma else "unaligned",
        )


def greatest_k(unsigned: bool, zero_point: bool, weight_zero_point: bool) -> int:
    """Up to which K the final sum fits into 32 bits, whatever the integers are."""
    x = 255 if unsigned or zero_point else 128
    w = 255 if weight_zero_point else 128
    return (2**31 - 1) // (x * w)


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration depends on."""

    capability: tuple[int, int]
    sms: int
    shared: int  # bytes of shared memory that a program may have

    @staticmethod
    def of(device: torch.device) -> "Device":
        """Of a CUDA device; an H200 under the interpreter."""
        if device.type != "cuda":
            return Device((9, 0), 132, 232448)
        found = torch.cuda.get_device_properties(device)
        shared = getattr(found, "shared_memory_per_block_optin", 101376)
        return Device((found.major, found.minor), found.multi_processor_count, shared)


# Tiles of the persistent kernel. Sums take 128 registers a thread at most; an epilogue of a quarter
# tile fits beside them. Triton waits for an integer product before the next step, so either a step
# is long (K of 128 or 256 bytes), or two programs share a multiprocessor: one multiplies while the
# other waits.
_TMA = (
    Config("tma", 128, 256, 128, warps=8, stages=4, subtiles=4),
    Config("tma", 128, 128, 128, warps=4, stages=3, subtiles=4),
    Config("tma", 128, 256, 256, warps=8, stages=2, subtiles=4),
    Config("tma", 256, 128, 128, warps=8, stages=4, subtiles=4),
    Config("tma", 128, 128, 128, warps=8, stages=4, subtiles=2),
    Config("tma", 128, 64, 128, warps=4, stages=4, subtiles=2),
    Config("tma", 64, 128, 128, warps=4, stages=4, subtiles=2),
)
_POINTER = (
    Config("pointer", 128, 256, 64, warps=8, stages=3, subtiles=4),
    Config("pointer", 128, 128, 128, warps=8, stages=3, subtiles=2),
    Config("pointer", 128, 128, 64, warps=4, stages=3, subtiles=4),
    Config("pointer", 64, 128, 128, warps=4, stages=3, subtiles=2),
    Config("pointer", 64, 64, 128, warps=4, stages=3),
    Config("pointer", 32, 64, 128, warps=4, stages=4),
)
# Columns, K, warps, stages where rows are few: what streams is the weight, 16 bytes a thread, and
# stages times block_n times block_k bytes of it are under way at any time, for each program.
_FEW_ROWS = ((32, 256, 4, 4), (64, 256, 4, 4), (16, 512, 4, 4), (32, 512, 4, 4), (128, 128, 4, 4))
_MOST_SPLIT = 16


def shared_bytes(config: Config, out_bytes: int = 4) -> int:
    """Shared memory that a configuration takes, about: the buffers, and the output on its way."""
    buffers = config.stages * (config.block_m + config.block_n) * config.block_k
    if config.kind == "tma":
        buffers += config.block_m * config.block_n // config.subtiles * out_bytes + 256
    return buffers


def _resident(config: Config, problem: Problem, device: Device) -> int:
    """Programs that share a multiprocessor."""
    shared = shared_bytes(config, problem.out.element_size()) + 1024
    return 2 if config.warps == 4 and 2 * shared <= device.shared + 1024 else 1


def _few_rows(problem: Problem, device: Device) -> list[Config]:
    block_m = max(16, next_power_of_2(problem.m))
    configs = []
    for block_n, block_k, warps, stages in _FEW_ROWS:
        tiles = triton.cdiv(problem.n, block_n)
        steps = triton.cdiv(problem.columns, block_k)
        fill = triton.cdiv(device.sms, tiles)
        for split in {1, fill, 2 * fill} if tiles < 2 * device.sms else {1}:
            # No share may be without a step.
            share = triton.cdiv(steps, min(split, _MOST_SPLIT))
            split = triton.cdiv(steps, share)
            configs.append(
                Config("pointer", block_m, block_n, block_k, warps, stages, split=split, group=1)
            )
    return configs


def _cost(config: Config, problem: Problem, device: Device) -> float:
    """About proportional to the time, to put candidates in order."""
    tiles: int = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    if problem.m <= 64:
        programs = tiles * config.split
        waves = max(1.0, programs / device.sms)
        share: int = triton.cdiv(problem.columns, config.split) * config.block_n
        start = 32768 + 8192 * (config.split > 1)  # what a launch costs, in bytes of weight
        return share * waves + start * (1 + (config.split > 1))
    resident = _resident(config, problem, device)
    rounds: int = triton.cdiv(tiles, device.sms * resident)
    area = config.block_m * config.block_n
    rate = {128 * 256: 1.0, 128 * 128: 0.9, 128 * 64: 0.7}.get(area, 0.5)
    rate *= 1.0 if config.kind == "tma" else 0.7
    rate *= 0.8 if config.warps == 8 and area == 128 * 128 else 1.0
    return rounds * resident * area / rate


def candidates(problem: Problem, device: Device | None = None) -> list[Config]:
    """Every configuration that can run the problem, the likely best first, without repetitions."""
    device = device or Device.of(problem.x.device)
    found: list[Config] = []
    if problem.m <= 64:
        found += _few_rows(problem, device)
    else:
        if device.capability[0] >= 9 and problem.loads_by_tma:
            found += _TMA
        found += _POINTER
    found = [c for c in found if shared_bytes(c, problem.out.element_size()) <= device.shared]
    found = found or [Config("pointer", 32, 32, 64, warps=4, stages=2)]
    return sorted(dict.fromkeys(found), key=lambda config: _cost(config, problem, device))


def default_config(problem: Problem) -> Config:
    """The configuration that runs without tuning."""
    return candidates(problem)[0]


_choose: Callable[[Problem], Config] = default_config


def set_chooser(choose: Callable[[Problem], Config] | None) -> None:
    """Who says which configuration runs a problem; None: :func:`default_config`."""
    global _choose
    _choose = default_config if choose is None else choose


# ---------------------------------------------------------------- running


def matmul(problem: Problem) -> Tensor:
    """Runs the problem as the chooser says; returns its ``out``."""
    run(problem, _choose(problem))
    return problem.out


def run(problem: Problem, config: Config) -> None:
    """Writes ``problem.out``, by one configuration of :func:`candidates`."""
    p, c = problem, config
    device, x = p.x.device, p.x.view(torch.int8)
    epilogue = (
        *(p.k, p.scale, p.zero_point, p.row_sums, p.weight_scale, p.weight_zero_point, p.sums),
        *(p.bias, p.output_scale, p.output_zero_point, p.output_qmin, p.output_qmax),
    )
    flags = {
        "SX": _stride(p.scale),
        "ZX": _stride(p.zero_point),
        "SW": _stride(p.weight_scale),
        "ZW": _stride(p.weight_zero_point),
        "UNSIGNED": p.unsigned,
        "ACTIVATION": p.activation,
    }
    blocks = {
        "GROUP": c.group,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.block_k,
        "SUBTILES": c.subtiles,
        "num_warps": c.warps,
        "num_stages": c.stages,
    }
    tiles = triton.cdiv(p.m, c.block_m) * triton.cdiv(p.n, c.block_n)
    shape = (p.m, p.n, p.columns)
    if c.kind == "tma":
        part = [c.block_m, c.block_n // c.subtiles]
        by_tma = p.stores_by_tma
        found = Device.of(device)
        programs = min(tiles, found.sms * _resident(c, p, found))
        launch(
            _tma_kernel,
            (programs,),
            device,
            TensorDescriptor.from_tensor(x, [c.block_m, c.block_k]),
            TensorDescriptor.from_tensor(p.weight, [c.block_n, c.block_k]),
            TensorDescriptor.from_tensor(p.out, part) if by_tma else p.out,
            p.out.stride(0),
            *shape,
            *epilogue,
            OUT_DESC=by_tma,
            PROGRAMS=programs,
            **flags,
            **blocks,
        )
        return
    target = p.out
    if c.split > 1:
        target = torch.empty((c.split, p.m, p.n), dtype=torch.int32, device=device)
    launch(
        _pointer_kernel,
        (tiles, c.split),
        device,
        x,
        x.stride(0),
        p.weight,
        p.weight.stride(0),
        target,
        target.stride(-2),
        *shape,
        *epilogue,
        EVEN_K=p.columns % c.block_k == 0,
        SPLIT=c.split,
        **flags,
        **blocks,
    )
    if c.split > 1:
        block_m, block_n = min(4, next_power_of_2(p.m)), 256
        launch(
            _add_kernel,
            (triton.cdiv(p.n, block_n), triton.cdiv(p.m, block_m)),
            device,
            target,
            p.out,
            p.out.stride(0),
            p.m,
            p.n,
            *epilogue,
            SPLIT=c.split,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            **flags,
        )


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 1 else 1


def reference(problem: Problem) -> Tensor:
    """The problem's result from the ATen fallback, for comparison."""
    p = problem
    n16 = p.weight.shape[0]
    x = p.x[:, : p.k]
    packed = p.weight.as_strided(
        (n16 + -(-4 * n16 // p.weight.shape[1]), p.weight.shape[1]), p.weight.stride()
    )
    result: Tensor
    if p.scale is None:
        result = torch.ops.torchquant_aten.int8_mm(x, packed, p.n)
        return result
    per_row = p.scale if p.scale.numel() == 1 else p.scale.reshape(-1, 1)
    zero = p.zero_point
    result = torch.ops.torchquant_aten.linear_static(
        x,
        per_row,
        zero if zero is None or zero.numel() == 1 else zero.reshape(-1, 1),
        packed,
        p.weight_scale,
        p.weight_zero_point,
        p.bias,
        p.n,
        p.activation,
        p.out.dtype,
        p.output_scale,
        p.output_zero_point,
        p.output_qmin,
        p.output_qmax,
    )
    return result
