"""No kernel reads or writes a byte outside its tensors.

Every argument's memory ends exactly at an unmapped page (or begins right behind one), and the
result's ends so too: one byte too far is a segmentation fault. So each run is a process of its own,
and this file is also the script that it runs: ``python test_memory_safety.py <instruction set>``.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support import ACTIVATIONS, integers, positive
from support.ahead import NewFolder, Processes, Run, Selection
from support.holes import LIBC, beside_a_hole
from torch import Tensor

from torchquant import cpu, ops

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="uses Linux's mmap, mprotect and LD_PRELOAD"
)

# The results' memory comes from torch's allocator, which calls posix_memalign and free: while the
# guard is up, these give and take blocks that end at an unmapped page.
ALLOCATOR = r"""
#include <stddef.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

enum { kPage = 4096, kBlocks = 1024 };
static struct { char *user, *base; size_t bytes; } blocks[kBlocks];
static int up = 0;

void guard_results(int on) { up = on; }

int posix_memalign(void** result, size_t alignment, size_t n) {
  for (int i = 0; up && n > 0 && i < kBlocks; ++i) {
    if (blocks[i].user) continue;
    size_t bytes = (n + kPage - 1) / kPage * kPage + kPage;
    char* base = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return 12;
    mprotect(base + bytes - kPage, kPage, PROT_NONE);
    blocks[i].base = base, blocks[i].bytes = bytes;
    *result = blocks[i].user = base + bytes - kPage - n;
    return 0;
  }
  *result = __libc_memalign(alignment, n);
  return *result ? 0 : 12;
}

void free(void* p) {
  for (int i = 0; p && i < kBlocks; ++i) {
    if (blocks[i].user != p) continue;
    munmap(blocks[i].base, blocks[i].bytes);
    blocks[i].user = 0;
    return;
  }
  __libc_free(p);
}
"""


# ---------------------------------------------------------------- in the process of its own


def rows_beside_a_hole(tensor: Tensor, before: bool) -> Tensor:
    """The same with room between the rows, none of it behind the last one."""
    rows, inputs = tensor.shape
    wide = torch.zeros(rows * (inputs + 3) - 3, dtype=tensor.dtype)
    wide.as_strided((rows, inputs), (inputs + 3, 1)).copy_(tensor)
    return beside_a_hole(wide, before).as_strided((rows, inputs), (inputs + 3, 1))


def check_layer(rows: int, outputs: int, inputs: int, before: bool) -> None:
    def place(tensor: Tensor) -> Tensor:
        return beside_a_hole(tensor, before)

    weight = integers(outputs, inputs)
    if (rows + outputs) % 2:
        weight = weight.clamp(min=-127)  # the other path of AVX2
    packed = place(ops.pack_weight(place(weight)))
    assert torch.equal(ops.unpack_weight(packed, outputs, inputs), weight)
    scale, bias = place(positive(outputs)), place(torch.randn(outputs))
    zero = place(integers(outputs).to(torch.int32))
    n = {"out_features": outputs}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(rows, inputs).to(dtype)
        for placed in (place(x), rows_beside_a_hole(x, before)):
            ops.linear_dynamic(placed, packed, scale, zero, bias, **n, symmetric=False)
            ops.linear_dynamic(placed, packed, scale, **n)
            ops.linear_dynamic_split(
                placed,
                place(torch.cat([packed, packed])),
                place(torch.cat([scale, scale])),
                place(torch.cat([zero, zero])),
                out_features=[outputs, outputs],
                symmetric=False,
                activations=["none", "silu"],
            )
            ops.linear_static(placed, place(torch.ones(1)), None, packed, scale, None, bias, **n)
            ops.quantize_per_token(placed, symmetric=False)
    int_bias = place(integers(outputs, dtype=torch.int32))
    row_scale = place(positive(rows, 1))
    row_zero = place(torch.full((rows, 1), 5, dtype=torch.int32))
    for dtype in (torch.int8, torch.uint8):
        q = integers(rows, inputs, dtype=dtype)
        for placed in (place(q), rows_beside_a_hole(q, before)):
            ops.int8_mm(placed, packed, outputs)
            args = (placed, row_scale, row_zero, packed, scale, zero)
            for output in (torch.float32, torch.bfloat16, torch.float16):
                ops.linear_static(*args, int_bias, **n, output_dtype=output)
            for output, limits in ((torch.int8, (-128, 127)), (torch.uint8, (0, 255))):
                ops.linear_static(
                    *args,
                    bias,
                    **n,
                    activation="gelu",
                    output_dtype=output,
                    output_scale=place(torch.ones(1)),
                    output_qmin=limits[0],
                    output_qmax=limits[1],
                )


def check_few_bits(rows: int, outputs: int, inputs: int, before: bool) -> None:
    """Weights of 2 to 8 bits, per channel and in groups; the number of bits follows the sizes."""

    def place(tensor: Tensor) -> Tensor:
        return beside_a_hole(tensor, before)

    bits = 2 + (rows + outputs + inputs) % 7
    weight = place(integers(outputs, inputs) >> (8 - bits))
    for group_size in (None, min(32, inputs), min(20, inputs)):
        shape = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
        scale, zero = place(positive(*shape)), place(integers(*shape) >> (8 - bits))
        bias, how = place(torch.randn(outputs)), {"bits": bits, "group_size": group_size}
        for points in (None, zero):
            packed = place(ops.pack_intx_weight(weight, scale, points, **how))
            sizes = {**how, "has_zero_point": points is not None}
            found = ops.unpack_intx_weight(packed, outputs, inputs, **sizes)
            assert torch.equal(found[0], weight) and torch.equal(found[1], scale)
            layer = {**sizes, "out_features": outputs}
            x = torch.randn(rows, inputs).to((torch.float32, torch.float16)[rows % 2])
            for placed in (place(x), rows_beside_a_hole(x, before)):
                ops.linear_dynamic_intx(placed, packed, bias, **layer, symmetric=False)
                ops.linear_static_intx(placed, place(torch.ones(1)), None, packed, **layer)


def check_elements(rows: int, inputs: int, before: bool) -> None:
    def place(tensor: Tensor) -> Tensor:
        return beside_a_hole(tensor, before)

    operators = torch.ops.torchquant
    groups = -(-inputs // 5)
    layouts = (
        ((1,), {}),
        ((rows,), {"axis": 0}),
        ((inputs,), {"axis": 1}),
        ((rows, groups), {"group_size": 5}),
        ((rows, 1), {"group_size": inputs}),
    )
    for shape, layout in layouts:
        scale = place(positive(*shape))
        for zero in (place(torch.full(shape, 3, dtype=torch.int32)), place(torch.randn(shape))):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = place(torch.randn(rows, inputs).to(dtype))
                for integer, limits in ((torch.int8, (-128, 127)), (torch.uint8, (0, 255))):
                    q = operators.quantize(x, scale, zero, *limits, **layout, dtype=integer)
                    operators.dequantize(place(q), scale, zero, **layout, dtype=dtype)


def check_functions(rows: int, inputs: int, before: bool) -> None:
    """Activations and norms, also from rows with room between them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(rows, inputs).to(dtype)
        weight, bias = (beside_a_hole(torch.randn(inputs).to(dtype), before) for _ in range(2))
        for placed in (beside_a_hole(x, before), rows_beside_a_hole(x, before)):
            for name in ACTIVATIONS:
                ops.activation(placed, name, dtype=torch.float32)
                ops.gated_activation(placed, placed, name)
            ops.rms_norm(placed, weight, 1e-6, cast_before_weight=True)
            ops.layer_norm(placed, weight, bias, 1e-5, placed)
            ops.layer_norm(placed, None, None, 1e-5)


def check_attention(queries: int, size: int, before: bool) -> None:
    """Every row of queries, keys and values at an edge, masks of both kinds."""
    keys = queries + 3
    shapes = ((1, 2, queries, size), (1, 2, keys, size), (1, 2, keys, size + 1))
    masks = (None, torch.rand(queries, keys) < 0.5, torch.randn(2, 1, keys))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = [beside_a_hole(torch.randn(*shape).to(dtype), before) for shape in shapes]
        for mask in masks:
            placed = None if mask is None else beside_a_hole(mask, before)
            for causal in (False, True):
                ops.attention(*tensors, placed, causal=causal)


def check_training(rows: int, inputs: int, before: bool) -> None:
    """Fake quantization, its masks and gradients at every granularity."""

    def place(tensor: Tensor) -> Tensor:
        return beside_a_hole(tensor, before)

    operators = torch.ops.torchquant
    groups = -(-inputs // 5)
    layouts = (
        ((1,), {}),
        ((rows,), {"axis": 0}),
        ((inputs,), {"axis": 1}),
        ((rows, groups), {"group_size": 5}),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = place(torch.randn(rows, inputs).to(dtype))
        for shape, layout in layouts:
            scale, zero = place(positive(*shape)), place(torch.full(shape, 3, dtype=torch.int32))
            operators.fake_quantize(x, scale, zero, -8, 7, **layout)
            _, bits = operators.fake_quantize_mask(x, scale, zero, -8, 7, **layout)
            operators.in_range(x, scale, place(torch.randn(shape)), -8, 7, **layout)
            operators.fake_quantize_learned_backward(x, x, scale, zero, -8, 7, **layout)
            operators.minmax(x, **layout)
            operators.mask_gradient(x, place(bits))
        operators.positive(x)


TAILS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 127, 130)


def main(isa: str) -> None:
    if isa == "reads too far":
        x = beside_a_hole(torch.ones(3))
        ctypes.string_at(x.data_ptr(), 13)
        return
    if isa == "reads before":
        x = beside_a_hole(torch.ones(3), before=True)
        ctypes.string_at(x.data_ptr() - 1, 1)
        return
    guard: Callable[[int], None] = LIBC.guard_results
    guard(1)
    if isa == "writes too far":
        x = torch.empty(3)
        ctypes.memset(x.data_ptr(), 0, 13)
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with cpu.use_isa(isa):
        for before in (False, True):
            for number, inputs in enumerate(TAILS):
                for rows in (1, 3, (4, 6, 13, 17, 33)[number % 5]):
                    for outputs in (1, 17, (8, 15, 16, 31, 33, 40, 64)[number % 7]):
                        check_layer(rows, outputs, inputs, before)
                    check_few_bits(rows, (1, 17, 31, 33)[number % 4], inputs, before)
                    check_elements(rows, inputs, before)
                    check_functions(rows, inputs, before)
                    check_training(rows, inputs, before)
                check_attention(inputs, (3, 8, 17, 32, 33)[number % 5], before)
            check_layer(40, 100, 1030, before)
            check_few_bits(40, 100, 1030, before)
            check_layer(2, 3, 33_026, before)
            check_layer(1, 2, 65_790, before)
    guard(0)
    print("untouched")


# ---------------------------------------------------------------- the tests


COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    """The process of a fault, or of an instruction set."""
    whats = [*tests.values("what"), *tests.values("name")]
    if not whats or COMPILER is None or not hasattr(LIBC, "__libc_memalign"):
        return run_guarded, []
    folder = new_folder("allocator")
    source, library = folder / "guard.c", folder / "guard.so"
    source.write_text(ALLOCATOR)
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return partial(run_guarded, library, dict(os.environ)), whats


def run_guarded(
    allocator: Path, environment: dict[str, str], what: str
) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])  # where the process finds the folder support
    search = os.pathsep.join(filter(None, [tests, environment.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, __file__, what],
        env={**environment, "PYTHONPATH": search, "LD_PRELOAD": str(allocator)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def result_of(
    request: pytest.FixtureRequest, processes: Processes
) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """The ended process of a fault, or of an instruction set."""
    if not processes.keys(request.module):
        pytest.skip("needs a C compiler and glibc")
    return lambda what: processes.result(request.module, what)


@pytest.mark.parametrize("what", ["reads too far", "reads before", "writes too far"])
def test_the_guard_guards(what, result_of):
    assert result_of(what).returncode == -11  # SIGSEGV


@pytest.mark.parametrize("name", cpu.available_isas())
def test_nothing_outside_the_tensors_is_touched(name, result_of):
    result = result_of(name)
    assert result.stdout.strip() == "untouched", f"{result.returncode}\n{result.stderr}"
    assert result.returncode == 0


if __name__ == "__main__":
    main(sys.argv[1])
