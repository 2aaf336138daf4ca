"""Triton's linear operators against the CPU's kernels, bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACTIVATIONS,
    FLOATS,
    NOT_FINITE,
    SPECIAL,
    assert_same_bits,
    floats,
    integers,
    positive,
    sprinkle,
)
from support import triton as support_triton
from support.triton_operators import CPU, call, check_rows, in_rows
from torch import Tensor

gemm, gemm_configs, gemm_problem, layout = (
    support_triton.module(name) for name in ("gemm.run", "gemm.configs", "gemm.problem", "layout")
)

# numpy, with which the interpreter computes, warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EXAMPLES = settings(max_examples=30)
SIZES = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 70])
DEPTHS = st.sampled_from([1, 2, 7, 16, 63, 64, 65, 100, 128, 200])


# ---------------------------------------------------------------- products


def _optional(data: st.DataObject, tensor: Tensor) -> Tensor | None:
    return tensor if data.draw(st.booleans()) else None


def _zeros(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    return integers(count, seed=seed, dtype=dtype).to(torch.int32)


@EXAMPLES
@given(data=st.data())
def test_int8_mm(data: st.DataObject) -> None:
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(DEPTHS)
    q = integers(m, k, seed=m, dtype=data.draw(st.sampled_from([torch.int8, torch.uint8])))
    w = integers(n, k, seed=n)
    check_rows("int8_mm", [q, CPU.pack_weight(w), n], [q, in_rows(w), n], (m, n, k))


@EXAMPLES
@given(data=st.data())
def test_linear_dynamic(data: st.DataObject) -> None:
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(DEPTHS)
    x = sprinkle(floats(m, k, seed=k), SPECIAL + NOT_FINITE, m, share=0.03)
    x = x.to(data.draw(st.sampled_from(FLOATS)))
    w = integers(n, k, seed=n)
    channels = data.draw(st.sampled_from([1, n]))
    args = [
        positive(channels, seed=1),
        _optional(data, _zeros(channels, torch.int8, 2)),
        _optional(data, floats(n, seed=3)),
        n,
        data.draw(st.booleans()),
        data.draw(st.sampled_from(ACTIVATIONS)),
        data.draw(st.sampled_from([None, *FLOATS])),
        data.draw(st.integers(2, 8)),
    ]
    check_rows("linear_dynamic", [x, CPU.pack_weight(w), *args], [x, in_rows(w), *args], (m, n, k))


@EXAMPLES
@given(data=st.data())
def test_linear_static(data: st.DataObject) -> None:
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(DEPTHS)
    dtype = data.draw(st.sampled_from([torch.int8, torch.uint8, *FLOATS]))
    w = integers(n, k, seed=n)
    if dtype.is_floating_point:
        x = sprinkle(floats(m, k, seed=k), SPECIAL + NOT_FINITE, m, share=0.03).to(dtype)
        rows, integer = 1, torch.int8
    else:
        x, integer = integers(m, k, seed=k, dtype=dtype), dtype
        rows = data.draw(st.sampled_from([1, m]))
    shape = (1,) if rows == 1 else data.draw(st.sampled_from([(m,), (m, 1)]))
    bias = data.draw(
        st.sampled_from([None, floats(n, seed=3), integers(n, seed=4, dtype=torch.int32) // 2])
    )
    output = data.draw(st.sampled_from([*FLOATS, torch.int8, torch.uint8]))
    ends = {torch.int8: (-128, 127), torch.uint8: (0, 255)}.get(output, (-128, 127))
    zero = data.draw(st.integers(*ends))
    channels = data.draw(st.sampled_from([1, n]))
    before = [
        positive(rows, seed=5).reshape(shape),
        _optional(data, _zeros(rows, integer, 6).reshape(shape)),
    ]
    after = [
        positive(channels, seed=1),
        _optional(data, _zeros(channels, torch.int8, 2)),
        bias,
        n,
        data.draw(st.sampled_from(ACTIVATIONS)),
        output,
        None if output.is_floating_point else torch.tensor([0.7]),
        zero,
        *ends,
    ]
    check_rows(
        "linear_static",
        [x, *before, CPU.pack_weight(w), *after],
        [x, *before, in_rows(w), *after],
        (m, n, k, dtype, output),
    )


def test_integer_output_of_a_row_with_nan_is_its_zero_point() -> None:
    x = floats(3, 20)
    x[1, 4] = float("nan")
    w = integers(17, 20)
    rest = [torch.tensor([0.01]), None, None, 17, "gelu", torch.uint8, torch.tensor([0.1]), 9]
    args = [x, torch.tensor([0.05]), None, in_rows(w), *rest, 0, 255]
    out = call("linear_static", *args)
    assert out[1].eq(9).all() and not out[0].eq(9).all()


@pytest.mark.parametrize("scale_and_zero", [True, False], ids=["asymmetric", "symmetric"])
def test_linear_dynamic_split(scale_and_zero: bool) -> None:
    members, k = (5, 16, 33), 70
    x = sprinkle(floats(2, 4, k), NOT_FINITE, 0, share=0.2)
    weights = [integers(n, k, seed=n) for n in members]
    args = [
        positive(sum(members)),
        _zeros(sum(members), torch.int8, 1) if scale_and_zero else None,
        floats(sum(members)) if scale_and_zero else None,
        members,
        not scale_and_zero,
        ["none", "relu", "silu"] if scale_and_zero else [],
        torch.bfloat16,
    ]
    tiles = torch.cat([CPU.pack_weight(w) for w in weights])
    rows = torch.cat([in_rows(w) for w in weights])
    check_rows("linear_dynamic_split", [x, tiles, *args], [x, rows, *args])


# ---------------------------------------------------------------- configurations

SMALL = {
    "pointer": gemm_configs.Config("pointer", 16, 32, 32, warps=4, stages=2, band=2, subtiles=2),
    "split": gemm_configs.Config("pointer", 32, 16, 64, warps=4, stages=2, split=3),
    "tma": gemm_configs.Config("tma", 32, 32, 64, warps=4, stages=2, band=2),
    "tma_in_two_parts": gemm_configs.Config("tma", 32, 64, 32, warps=4, stages=2, subtiles=2),
    "tma_in_four_parts": gemm_configs.Config("tma", 16, 64, 32, warps=4, stages=2, subtiles=4),
}


@pytest.fixture
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that persistent programs take several tiles each."""
    few = gemm_configs.Device((9, 0), 1, 232448)
    monkeypatch.setattr(gemm_configs.Device, "of", staticmethod(lambda device: few))
    yield


SHAPES = [(1, 1, 1), (33, 80, 130), (70, 32, 64), (64, 96, 256)]
OUTPUTS = [*FLOATS, torch.int8, torch.int32]
# Each pair of a configuration, a shape and an output; every combination of the three is slow.
KINDS = [
    pytest.param(
        *(name, *shape, output),
        marks=() if (i + j) % len(SHAPES) == s else pytest.mark.slow,
        id=f"{name}-{'x'.join(map(str, shape))}-{output}",
    )
    for i, name in enumerate(SMALL)
    for j, output in enumerate(OUTPUTS)
    for s, shape in enumerate(SHAPES)
]


def test_the_kinds_that_run_have_each_pair() -> None:
    parts = [
        (name, shape, output)
        for name, *shape, output in (kind.values for kind in KINDS if not kind.marks)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = {(str(part[a]), str(part[b])) for part in parts}
        assert len(pairs) == len({first for first, _ in pairs}) * len({last for _, last in pairs})
    assert len(parts) == len(SMALL) * len(OUTPUTS)


@pytest.mark.usefixtures("few_multiprocessors")
@pytest.mark.parametrize("name, m, n, k, output", KINDS)
def test_every_kind_of_configuration(
    name: str, m: int, n: int, k: int, output: torch.dtype
) -> None:
    check_config(SMALL[name], m, n, k, output, unsigned=k == 64)


@pytest.mark.cuda
@pytest.mark.skipif(support_triton.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("m, n, k", [(1, 256, 512), (16, 500, 1000), (64, 4096, 4096)])
def test_candidates_for_few_rows(m: int, n: int, k: int) -> None:
    check_candidates(m, n, k)


@pytest.mark.cuda
@pytest.mark.skipif(support_triton.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("m, n, k", [(65, 256, 512), (300, 500, 1000), (1000, 4096, 4096)])
def test_candidates_for_many_rows(m: int, n: int, k: int) -> None:
    check_candidates(m, n, k)


def check_candidates(m: int, n: int, k: int) -> None:
    for output in (torch.bfloat16, torch.float32, torch.int8):
        for config in gemm_configs.candidates(problem(m, n, k, output)[0]):
            check_config(config, m, n, k, output)


def check_config(
    config: object, m: int, n: int, k: int, output: torch.dtype, unsigned: bool = False
) -> None:
    ours, expected = problem(m, n, k, output, unsigned)
    if config.kind == "tma" and not ours.loads_by_tma:
        return
    gemm.run(ours, config)
    assert_same_bits(ours.out.cpu(), expected, f"{config}")


def problem(
    m: int, n: int, k: int, output: torch.dtype, unsigned: bool = False
) -> tuple[object, Tensor]:
    """A product with everything in its epilogue, and the CPU's result."""
    x = integers(m, k, seed=m, dtype=torch.uint8 if unsigned else torch.int8)
    w = integers(n, k, seed=n)
    wide = support_triton.poisoned(m, layout.padded_k(k), dtype=x.dtype)
    wide[:, :k] = x
    rows = in_rows(w).to(support_triton.DEVICE)
    parts = (wide, rows[: layout.padded_n(n)], layout.packed_sums(rows, n))
    out = support_triton.poisoned(m, n, dtype=output)
    if output == torch.int32:
        return gemm_problem.Problem(*parts, out, k), CPU.int8_mm(x, CPU.pack_weight(w), n)
    sx, zx = positive(m, 1), _zeros(m, x.dtype, 1).reshape(m, 1)
    sw, zw, bias = positive(n, seed=1), _zeros(n, torch.int8, 2), floats(n)
    so = None if output.is_floating_point else torch.tensor([3.0])
    after = [sw, zw, bias, n, "gelu", output, so, 5, -100, 100]
    expected = CPU.linear_static(x, sx, zx, CPU.pack_weight(w), *after)
    sums = x.sum(1, dtype=torch.int32)
    sx, zx, sums, sw, zw, bias, so = support_triton.to_device(sx, zx, sums, sw, zw, bias, so)
    return gemm_problem.Problem(
        *(*parts, out, k),
        *(sx.reshape(-1), zx.reshape(-1), sums, sw, zw, bias),
        *("gelu", so, 5, -100, 100),
    ), expected


@pytest.mark.parametrize("output", [torch.float16, torch.int8, torch.int32], ids=str)
def test_reference_is_the_fallback(output: torch.dtype) -> None:
    """What the tuner compares with; also where no configuration has its bits."""
    ours, expected = problem(5, 20, 70, output, unsigned=True)
    assert_same_bits(gemm.reference(ours).cpu(), expected)
    gemm.set_chooser(lambda problem: None)
    try:
        assert_same_bits(gemm.matmul(ours).cpu(), expected)
    finally:
        gemm.set_chooser(None)


def test_default_configurations_fit_what_they_are_for() -> None:
    """Legal on each kind of GPU, the split never without work, and covering its multiprocessors."""
    a100, rtx3090, h200 = ((8, 0), 108, 166912), ((8, 6), 82, 101376), ((9, 0), 132, 232448)
    for capability, sms, shared in (a100, rtx3090, h200):
        device = gemm_configs.Device(capability, sms, shared)
        for m in (1, 16, 33, 64, 65, 300, 8192):
            for n, k in (1024, 1024), (4096, 4096), (1024, 16384), (16384, 1024), (37, 64):
                ours = _shapes_only(m, n, k)
                for config in gemm_configs.candidates(ours, device):
                    assert gemm_configs.shared_bytes(config, 2) <= shared
                    assert config.kind == "pointer" or (capability[0] >= 9 and m > 64)
                    steps = -(-k // config.block_k)
                    share = -(-steps // config.split)
                    assert (config.split - 1) * share < steps, "a share without work"
    big = gemm_configs.candidates(_shapes_only(8192, 8192, 8192), gemm_configs.Device(*h200))[0]
    assert (big.kind, big.block_m * big.block_n) == ("tma", 128 * 256)
    for n, k in (4096, 4096), (1024, 16384), (16384, 16384):
        small = gemm_configs.candidates(_shapes_only(8, n, k), gemm_configs.Device(*h200))[0]
        assert -(-n // small.block_n) * small.split >= 100, "most multiprocessors have work"


def _shapes_only(m: int, n: int, k: int) -> object:
    x = torch.empty(m, k, dtype=torch.int8, device="meta")
    w = torch.empty(n, k, dtype=torch.int8, device="meta")
    out = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    return gemm_problem.Problem(x, w, torch.empty(n, device="meta"), out, k)


# ---------------------------------------------------------------- what is left to the fallback


def test_what_is_not_covered_is_left_to_the_fallback() -> None:
    w = in_rows(integers(20, 40))
    scale = torch.full((20,), 0.02)
    zeros = torch.zeros(20, dtype=torch.int32)
    x, q = floats(6, 40), integers(6, 40)
    wide = torch.zeros(1, 40000)
    assert call("linear_dynamic", x.double(), w, scale, None, None, 20) is NotImplemented
    assert call("linear_dynamic", x[:0], w, scale, None, None, 20) is NotImplemented
    assert call("linear_dynamic", x, w, scale, None, None, 37) is NotImplemented
    assert call("linear_dynamic", x, w, scale[:3], None, None, 20) is NotImplemented
    assert call("linear_dynamic", x, w, scale, None, None, 20, True, "swish") is NotImplemented
    assert call("linear_static", q, scale, None, w, scale, None, None, 20) is NotImplemented
    assert call("int8_mm", q.repeat(1, 2), w, 20) is NotImplemented
    assert call("quantize_rows", x, None, zeros[:1], -128, 127, True) is NotImplemented
    assert call("quantize_rows", x, None, None, 1, 127, True) is NotImplemented
    assert call("quantize_pack", x, scale, -128, 127, True) is NotImplemented
    deep = torch.zeros(layout.layout_shape(20, 40000), dtype=torch.int8)
    args = [wide, deep, scale, zeros, None, 20, False]
    assert call("linear_dynamic", *args) is NotImplemented  # beyond 32-bit sums
