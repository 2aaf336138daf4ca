"""Shapes by class, tensors in every layout and bitwise comparison, for all tests."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchquant import cpu, functional

NAN, INF = math.nan, math.inf
FLT_MAX = float(torch.finfo(torch.float32).max)
DENORMAL = 2.0**-149
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(functional.ACTIVATIONS)
REFERENCE = Path(__file__).parents[1] / "reference"  # numbers of the source systems
# Both zeros, ties, the ends of each float type and values beyond them.
SPECIAL = (0.0, -0.0, 0.5, 1.5, -2.5, 126.5, 1.0, -1.0, 65504.0, -65520.0, 2.0**-126, -(2.0**-140))
EXTREME = (FLT_MAX, -FLT_MAX, DENORMAL, -DENORMAL, 2.0**31, -(2.0**63))
NOT_FINITE = (NAN, INF, -INF)
SPICES: dict[str, tuple[float, ...]] = {
    "plain": (),
    "special": SPECIAL,
    "extreme": SPECIAL + EXTREME,
    "not_finite": SPECIAL + NOT_FINITE,
}


# ---------------------------------------------------------------- comparison


def bits(tensor: Tensor) -> Tensor:
    """A float tensor's bits as integers, every NaN the same one; an integer tensor as it is."""
    if not tensor.is_floating_point():
        return tensor
    canonical = torch.where(tensor.isnan(), torch.full_like(tensor, NAN), tensor)
    return canonical.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def assert_same_bits(got: Tensor, expected: Tensor, what: object = "") -> None:
    """Equal dtype, shape and bits: signs of zeros count, NaN equals NaN."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {got.shape} instead of {expected.shape}"
    if torch.equal(bits(got), bits(expected)):
        return
    wrong = (bits(got) != bits(expected)).nonzero()
    first = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: {len(wrong)} of {got.numel()} elements differ, the first at {first}: "
        f"{got[first].item()!r} instead of {expected[first].item()!r}"
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_everywhere(
    call: Callable[[], Tensor | tuple[Tensor, ...]],
    expected: Tensor | tuple[Tensor, ...],
    counts: Iterable[int] = (1,),
    what: object = "",
) -> None:
    """``call()`` gives ``expected``'s bits under every instruction set and number of threads."""
    wanted = expected if isinstance(expected, tuple) else (expected,)
    ran = []
    for count in counts:
        with threads(count):
            for isa in cpu.available_isas():
                with cpu.use_isa(isa):
                    ran.append(cpu.active_isa())
                    result = call()
                results = result if isinstance(result, tuple) else (result,)
                assert len(results) == len(wanted)
                for got, want in zip(results, wanted, strict=True):
                    assert_same_bits(got, want, f"{isa}, {count} threads, {what}")
    assert set(ran) == set(cpu.available_isas())


# ---------------------------------------------------------------- instruction sets


def supported_isas() -> set[str]:
    """The instruction sets of this CPU and system, from Linux instead of our cpuid code."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    isas = {"scalar"}
    if {"avx2", "fma", "f16c"} <= flags:
        isas.add("avx2")
        if "avx_vnni" in flags:
            isas.add("avx_vnni")
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"} <= flags:
            isas.add("avx512_vnni")
            if {"amx_tile", "amx_int8"} <= flags and _amx_permitted():
                isas.add("amx_int8")
    return isas


def _amx_permitted() -> bool:
    """Whether Linux lets this process have the tile registers (ARCH_GET_XCOMP_PERM)."""
    import ctypes

    permissions = ctypes.c_uint64(0)
    libc = ctypes.CDLL(None, use_errno=True)
    arch_prctl, get_permission, tile_data = 158, 0x1022, 18
    failed = libc.syscall(arch_prctl, get_permission, ctypes.byref(permissions))
    return not failed and bool(permissions.value >> tile_data & 1)


# ---------------------------------------------------------------- shapes


class Shape(NamedTuple):
    """Of a linear layer's call: M, N, K."""

    rows: int
    outputs: int
    inputs: int


def _around_powers_of_two() -> tuple[Shape, ...]:
    sizes = [2**power + step for power in range(1, 9) for step in (-1, 0, 1)]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(sizes), generator=generator).tolist() for _ in range(3)]
    return tuple(Shape(*(sizes[i] for i in picks)) for picks in zip(*orders, strict=True))


SHAPES: dict[str, tuple[Shape, ...]] = {
    "one_to_ten": tuple(
        Shape(1 + i % 10, 1 + (3 * i + i // 10) % 10, 1 + (7 * i + i // 10) % 10) for i in range(40)
    ),
    "around_powers_of_two": _around_powers_of_two(),
    # One more and one less than every register tile's rows and columns (4, 6, 12, 16 and 32 rows).
    "around_register_tiles": tuple(
        Shape(rows, outputs, 65)
        for rows, outputs in zip(
            (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 65),
            (127, 129, 97, 33, 113, 81, 31, 49, 63, 17, 65, 128, 15, 79, 47, 111, 95, 1, 80, 9) * 2,
            strict=False,
        )
    ),
    "deep": (Shape(3, 5, 4097), Shape(17, 18, 8191), Shape(2, 33, 2048), Shape(300, 9, 4096)),
    "flat": (Shape(1000, 20, 10), Shape(777, 48, 64), Shape(1025, 33, 130)),
    "narrow": (Shape(9, 1, 500), Shape(65, 2, 129), Shape(40, 3, 1), Shape(7, 1, 1)),
    "wide": (Shape(5, 2049, 40), Shape(2, 4096, 3), Shape(33, 1537, 96)),
    "one_row": (Shape(1, 384, 384), Shape(1, 1000, 777), Shape(1, 1, 1), Shape(1, 5000, 320)),
    "layers": (Shape(64, 384, 384), Shape(16, 768, 512), Shape(130, 300, 200)),
}


# ---------------------------------------------------------------- tensors


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose rows differ in magnitude by powers of two; a tenth of them zero."""
    g = generator(seed)
    x = torch.randn(shape, generator=g)
    rows = (*shape[:-1], 1) if len(shape) > 1 else (1,)
    x = x * torch.exp2(torch.randint(-6, 7, rows, generator=g).float())
    return torch.where(torch.rand(shape, generator=g) < 0.1, 0.0, x).to(dtype)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    """Over the whole range of ``dtype``, its ends more often than the rest."""
    g, limits = generator(seed), torch.iinfo(dtype)
    values = torch.randint(limits.min, limits.max + 1, shape, generator=g)
    pick = torch.randint(0, 8, shape, generator=g)
    values[pick == 0] = limits.min
    values[pick == 1] = limits.max
    return values.to(dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Scales."""
    return torch.rand(shape, generator=generator(seed)) * 0.1 + 1e-3


def leaf(tensor: Tensor) -> Tensor:
    """A copy that takes a gradient."""
    return tensor.detach().clone().requires_grad_()


def sprinkle(x: Tensor, values: Iterable[float], seed: int, share: float = 0.2) -> Tensor:
    """``x`` with each of ``values`` in about ``share`` of the rows, somewhere."""
    g = generator(seed)
    if x.numel() == 0:
        return x
    flat = x.clone().reshape(-1, x.shape[-1])
    rows, columns = flat.shape
    for value in values:
        chosen = torch.rand(rows, generator=g) < share
        places = torch.randint(columns, (rows,), generator=g)
        flat[chosen, places[chosen]] = value
    return flat.reshape(x.shape)


LAYOUTS = ("contiguous", "sliced", "transposed", "strided", "offset", "every_second_row")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values in memory of another shape."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # rows further apart than they are long
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 77, dtype=x.dtype)
        wide[..., 2:-3] = x
        return wide[..., 2:-3]
    if layout == "strided":  # not even contiguous within a row
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":  # contiguous, but at an odd multiple of the element's size
        flat = torch.full((x.numel() + 3,), 77, dtype=x.dtype)
        flat[3:] = x.reshape(-1)
        result = flat[3:].view(x.shape)
        assert result.storage_offset() % 2 == 1
        return result
    assert layout == "every_second_row"  # rows of a larger batch, every second one
    wide = torch.full((2 * x.shape[0], *x.shape[1:]), 77, dtype=x.dtype)
    wide[::2] = x
    return wide[::2]
