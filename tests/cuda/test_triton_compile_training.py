"""Training's Triton kernels compiled without a GPU: what the compiler made of them.

The interpreter says whether a kernel computes the right bits as it is written; here it is seen that
the compiler adds no rounding of its own, reads and writes 16 bytes at a time, and spills nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ahead import NewFolder, Processes, Run, Selection

pytest.importorskip("triton", reason="triton is not installed")

CAPABILITIES = (80, 90, pytest.param(100, marks=pytest.mark.slow))  # as in test_triton_compile
PARTS = 2  # of the kernels, each compiled in a process of its own
PER_THREAD = 16  # elements
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # accesses of 16 bytes that they take
TILES = {
    "one": {"LAYOUT": "one", "TAIL": False, "ROWS": 1, "COLUMNS": 4096, "count": 1, "channels": 1},
    "span": {"LAYOUT": "span", "TAIL": False, "ROWS": 16, "COLUMNS": 256},
    "tail": {"LAYOUT": "span", "TAIL": True, "ROWS": 32, "COLUMNS": 128},
    "column": {"LAYOUT": "column", "TAIL": False, "ROWS": 32, "COLUMNS": 128},
}
ALIGNED = (
    "length",
    "row",
    "count",
    "channels",
    "numel",
    "x_stride",
    "up_stride",
    "residual_stride",
)


# ---------------------------------------------------------------- in the other process


# What takes seconds to compile is chosen: each kernel, each layout, each type, not all of their
# products. "others" are what the other capabilities compile as well.
VALUES = {"ZERO": "none", "LEARNED": False, "WANT_OUT": True, "WANT_BITS": False}
LEARNED = {"ZERO": "offset", "LEARNED": True, "WANT_OUT": True, "WANT_BITS": False}
MASK = {"ZERO": "integer", "LEARNED": False, "WANT_OUT": True, "WANT_BITS": True}
CASES: dict[str, dict[str, Any]] = {
    "fake_quantize values fp32 one": VALUES,
    "fake_quantize values fp32 span": VALUES,
    "fake_quantize values fp32 tail": VALUES,
    "fake_quantize values bf16 column": VALUES,
    "fake_quantize mask fp32 one": MASK,
    "fake_quantize mask bf16 span": MASK,
    "fake_quantize learned fp16 column": LEARNED,
    "learned_backward fp32 one": {"ZERO": "integer", "turns": 1},
    "learned_backward fp32 span": {"ZERO": "none", "turns": 1},
    "learned_backward bf16 column": {"ZERO": "none"},
    "minmax fp16 one": {},
    "quantize fp32 span": {"ZERO": "integer"},
    "quantize bf16 column": {"ZERO": "real"},
    "dequantize fp32 one": {"ZERO": "real"},
    "dequantize bf16 span": {"ZERO": "integer"},
    "positive bf16": {"BYTES": 256},
    "mask_gradient fp32": {"BYTES": 256},
    "activation gelu bf16": {"ACTIVATION": "gelu"},
    "activation tanh fp32": {"ACTIVATION": "tanh"},
    "norm rms bf16": {"CENTERED": False, "RESIDUAL": False, "BIAS": False},
    "norm layer fp32": {"CENTERED": True, "RESIDUAL": True, "BIAS": True},
    "add_parts fp32": {"PARTS": 32, "CHANNELS": 32},
}
OTHERS = (
    "fake_quantize mask bf16 span",
    "learned_backward fp32 one",
    "dequantize fp32 one",
    "activation gelu bf16",
    "norm layer fp32",
)


def arguments_of(name: str) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    """Kernel, types of what its pointers point to, constants, warps."""
    from torchquant.triton.kernels import activations, affine, fake_quantize, norms

    family, constants, warps = name.split()[0], dict(CASES[name]), 8
    for module in (activations, affine, fake_quantize, norms):
        kernel = getattr(module, f"{family}_kernel", None)
        if kernel is not None:
            break
    kind = next(kind for kind in WIDTHS if kind in name)
    types = dict.fromkeys(("x", "out", "grad", "grad_x", "up", "residual", "weight", "bias"), kind)
    types |= dict.fromkeys(("scale", "scale_sums", "offset_sums", "least", "greatest"), "fp32")
    types |= {"bits": "u8", "q": "i8", "nonfinite": "i32"}
    if family == "quantize":
        types["out"] = "i8"
    if family == "add_parts":
        types |= {"grad_scale": "fp32", "grad_offset": "fp32"}
    types["zero"] = "fp32" if constants.get("ZERO") in ("real", "offset") else "i32"
    layout = name.split()[-1]
    if layout in TILES:
        constants |= {"run": 1, **({} if layout == "tail" else {"per_row": 1}), **TILES[layout]}
    elif family == "activation":
        constants |= {"GATED": True, "ROWS": 1, "COLUMNS": 4096, "count": 1}
    elif family == "norm":
        constants |= {"WEIGHT": True, "CAST": False, "STEPS": 16}
        constants |= {"ROWS": norms.ROWS, "COLUMNS": norms.COLUMNS}
        warps = 1
    pointers = {n: t for n, t in types.items() if n in kernel.arg_names}
    return kernel, pointers, constants, warps


def main(capability: int, part: int) -> None:
    """Compile every `PARTS`-th kernel."""
    from support.triton_compile import compile_kernel

    facts = {}
    numbers = dict.fromkeys(("qmin", "qmax", "size", "eps"), "fp32")
    for name in list(CASES if capability == 90 else OTHERS)[part::PARTS]:
        kernel, pointers, constants, warps = arguments_of(name)
        names = [n for n in kernel.arg_names if n not in constants]
        facts[name] = compile_kernel(
            kernel,
            capability,
            pointers,
            {n: t for n, t in numbers.items() if n in names},
            constants,
            tuple(n for n in ALIGNED if n in names),
            num_warps=warps,
        )
    print(json.dumps(facts))


# ---------------------------------------------------------------- here


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[tuple[int, int]]]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), *sys.path])
    keys = [(capability, part) for capability in tests.values("facts") for part in range(PARTS)]
    caches = {key: str(new_folder("triton")) for key in keys}

    def run(key: tuple[int, int]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, __file__, *map(str, key)],
            env={**environment, "TRITON_CACHE_DIR": caches[key]},
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )

    return run, keys


@pytest.fixture(scope="module")
def result_of(
    request: pytest.FixtureRequest, processes: Processes
) -> Callable[[tuple[int, int]], Any]:
    """The ended process that compiled one part of the kernels for a capability."""
    return lambda key: processes.result(request.module, key)


@pytest.fixture(scope="module", params=CAPABILITIES, ids=lambda c: f"sm_{c}")
def facts(request: Any, result_of: Callable[[tuple[int, int]], Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for part in range(PARTS):
        ran = result_of((request.param, part))
        assert ran.returncode == 0, ran.stderr[-4000:]
        found |= json.loads(ran.stdout)
    return found


def count(instructions: dict[str, int], *prefixes: str) -> int:
    return sum(n for name, n in instructions.items() if name.startswith(prefixes))


def width_of(name: str) -> int:
    return next(width for kind, width in WIDTHS.items() if kind in name)


def test_no_rounding_is_added_and_no_denormal_dropped(facts: dict[str, dict[str, Any]]) -> None:
    spelled = {"learned_backward": 2, "gelu": 20, "tanh": 9}
    for name, fact in facts.items():
        ptx = fact["ptx"]
        assert not [op for op in ptx if ".ftz" in op or ".approx" in op or ".full" in op], name
        assert not count(ptx, "rsqrt", "ex2", "lg2", "tanh"), name
        family = name.split()[1] if name.startswith("activation") else name.split()[0]
        if family != "norm":
            fused = count(ptx, "fma") + count(ptx, "fma.rn.f32x2")  # the latter are two
            assert fused == spelled.get(family, 0) * PER_THREAD, name


def test_the_assembler_fuses_nothing(facts: dict[str, dict[str, Any]]) -> None:
    """A product and a sum without a division, which is made of fused operations itself."""
    fact = facts["dequantize fp32 one"]
    assert not count(fact["ptx"], "div.rn.f32", "fma")
    assert not count(fact["sass"], "FFMA"), fact["sass"]
    assert count(fact["sass"], "FMUL") and count(fact["sass"], "FADD")


def test_sixteen_bytes_an_access(facts: dict[str, dict[str, Any]]) -> None:
    tensors = {  # read and written, in tiles of 16 elements a thread
        "fake_quantize": (1, 1),
        "learned_backward": (2, 1),
        "quantize": (1, 0),
        "dequantize": (0, 1),
        "minmax": (1, 0),
        "activation": (2, 1),
    }
    for name, fact in facts.items():
        ptx, family, width = fact["ptx"], name.split()[0], width_of(name)
        if family in tensors:
            read, written = tensors[family]
            assert count(ptx, "ld.global.v4.b32") >= read * width, name
            assert count(ptx, "st.global.v4.b32") == written * width, name
            assert not count(ptx, "ld.global.b16", "st.global.b16"), name
        elif family in ("positive", "mask_gradient"):  # 8 elements a thread
            assert count(ptx, "ld.global.v4.b32") == width // 2, name
        elif family == "norm":
            assert count(ptx, "st.global.v4.b32") == 2 * width, name


def test_data_stays_in_registers(facts: dict[str, dict[str, Any]]) -> None:
    """Nothing is spilled, and where nothing is summed or packed nothing is exchanged."""
    alone = ("quantize", "dequantize", "activation", "fake_quantize values")
    for name, fact in facts.items():
        assert fact["stack"] == 0, name
        assert not count(fact["ptx"], "ld.local", "st.local", "atom", "red."), name
        assert fact["registers"] <= 168, name
        assert fact["shared"] <= (
            0 if name.startswith((*alone, "fake_quantize learned")) else 16384
        )


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:]))
