"""Triton's kernels compiled without a GPU: what the compiler made of them.

Triton's interpreter says whether a kernel computes the right bits as it is written; here it is seen
that the compiler adds no rounding of its own, that tensor cores and the tensor memory accelerator
are used, and that registers and shared memory suffice. In a process of its own, because in this one
kernels may be the interpreter's.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.ahead import NewFolder, Processes, Run, Selection

triton = pytest.importorskip("triton", reason="triton is not installed")

PARTS = 2  # of the kernels, each compiled in a process of its own
# Shared memory that a program may have, by compute capability.
SHARED = {80: 166912, 90: 232448, 100: 232448}
NARROW = ("n", "columns", "k", "out_stride", "x_stride", "w_stride", "q_stride")


# ---------------------------------------------------------------- in the other process


def _compile(
    name: str, kernel: Any, capability: int, types: dict, constants: dict, **options: int
) -> dict:
    """Facts about one kernel. Every pointer and size counts as a multiple of 16.

    Args:
        types: name -> type. A NamedTuple has a type for each part, or a constant that is no string.
        constants: name -> value.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    aligned = [(names.index(n),) for n in NARROW if signature.get(n) == "i32"]
    for at, (argument, kind) in enumerate(signature.items()):
        if not isinstance(kind, str):
            parts = [part if isinstance(part, str) else "constexpr" for part in kind]
            constexprs |= {(at, i): kind[i] for i, part in enumerate(parts) if part == "constexpr"}
            aligned += [(at, i) for i, part in enumerate(parts) if part != "constexpr"]
            signature[argument] = type(kind)(*parts)
        elif kind.startswith("*"):
            aligned.append((at,))
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    lines = (re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in _body(compiled.asm["ptx"]))
    return {
        "name": name,
        "instructions": Counter(line.split()[0] for line in lines if line),
        "shared": compiled.metadata.shared,
        **_resources(compiled.asm["cubin"]),
    }


def _body(ptx: str) -> list[str]:
    skipped = ("//", ".", "$", "{", "}", ")")
    return [line for line in ptx.splitlines() if not line.strip().startswith(skipped)]


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and its stack: what was spilled."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        ran = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", ran.stdout + ran.stderr)
    assert found, ran
    return {"registers": int(found[1]), "stack": int(found[2])}


def _epilogue(
    activation: str = "none", zero_points: bool = False, to_int8: bool = False, k: Any = "i32"
) -> Any:
    """Types of a product's epilogue, with a scale for each row and channel, and a bias."""
    import triton.language as tl

    from torchquant.triton.gemm.kernels import Epilogue

    integers = "*i32" if zero_points else None
    one = tl.constexpr(1)
    return Epilogue(
        k=k,
        scale="*fp32",
        zero_point=integers,
        row_sums=integers,
        weight_scale="*fp32",
        weight_zero_point=integers,
        sums="*i32",
        bias="*fp32",
        output_scale="*fp32" if to_int8 else None,
        scale_stride=one,
        zero_point_stride=one,
        weight_scale_stride=one,
        weight_zero_point_stride=one,
        unsigned=tl.constexpr(False),
        activation=tl.constexpr(activation),
    )


def compile_part(capability: int, part: int) -> list[dict]:
    """Facts about every `PARTS`-th kernel."""
    import torch

    from torchquant.triton.gemm import configs as gemm_configs
    from torchquant.triton.gemm import kernels as gemm_kernels
    from torchquant.triton.gemm.problem import Problem
    from torchquant.triton.kernels import rows

    device = gemm_configs.Device((capability // 10, 0), 132, SHARED[capability])
    floats = ("scale_ptr", "given_scale_ptr")
    integers = ("sums_ptr", "partial_ptr", "zero_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "*i32")
    types |= {"x_ptr": "*i8", "w_ptr": "*i8", "q_ptr": "*i8", "given_zero_ptr": "*i32"}

    def shapes(config: Any) -> dict[str, int]:
        return {
            "BAND": config.band,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "SUBTILES": config.subtiles,
        }

    def product(config: Any, out: str, what: str, **given: Any) -> dict:
        epilogue = _epilogue(**given)
        constants = shapes(config)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        name = f"{what} {out} {given} {dataclasses.asdict(config)}"
        if config.kind == "tma":
            constants |= {"OUT_DESC": True}
            part = config.block_n // config.subtiles
            blocks = {
                "x_desc": f"tensordesc<i8[{config.block_m},{config.block_k}]>",
                "w_desc": f"tensordesc<i8[{config.block_n},{config.block_k}]>",
                "out": f"tensordesc<{out}[{config.block_m},{part}]>",
                "epilogue": epilogue,
            }
            kernel = gemm_kernels.tma_kernel
            return _compile(name, kernel, capability, types | blocks, constants, **options)
        constants |= {"EVEN_K": True, "SPLIT": config.split}
        pointers = {"out_ptr": "*i32" if config.split > 1 else f"*{out}", "epilogue": epilogue}
        kernel = gemm_kernels.pointer_kernel
        return _compile(name, kernel, capability, types | pointers, constants, **options)

    def problem(m: int, n: int, k: int) -> Any:
        x = torch.empty(m, k, dtype=torch.int8, device="meta")
        w = torch.empty(n, k, dtype=torch.int8, device="meta")
        out = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
        return Problem(x, w, torch.empty(n, device="meta"), out, k)

    jobs: list[Callable[[], dict]] = []
    for m in (8, 64, 8192):
        config = gemm_configs.candidates(problem(m, 8192, 8192), device)[0]
        jobs.append(partial(product, config, "bf16", "rows" if m == 8192 else "few rows"))
    everything = {"activation": "gelu", "zero_points": True}
    # Hopper: the large tiles with the longest epilogue and the widest output.
    for tile in (*gemm_configs._TMA, *gemm_configs._POINTER[:2]) if capability == 90 else (config,):
        jobs.append(partial(product, tile, "fp32", "rows", **everything))
    jobs.append(partial(product, config, "i8", "rows", activation="silu", to_int8=True))
    small = dataclasses.replace(gemm_configs._POINTER[-1])
    for activation in ("relu", "gelu_tanh", "tanh", "sigmoid"):
        jobs.append(partial(product, small, "fp16", "other", activation=activation, to_int8=False))
    # A size of 1 is a constant to Triton, without what only its tensors have.
    one = dict.fromkeys(("n", "columns", "x_stride", "out_stride"), 1)
    out = types | {"out_ptr": "*u8", "epilogue": _epilogue(**everything, k=1)}
    constants = {**shapes(small), "EVEN_K": False, "SPLIT": 1, **one}
    kernel = gemm_kernels.pointer_kernel
    jobs.append(partial(_compile, "ones", kernel, capability, out, constants, num_warps=4))
    out = types | {"out_ptr": "*bf16", "epilogue": _epilogue()}
    constants = {"SPLIT": 4, "BLOCK_M": 4, "BLOCK_N": 256}
    kernel = gemm_kernels.add_kernel
    jobs.append(partial(_compile, "add", kernel, capability, out, constants, num_warps=4))

    for mode, pack, k in (
        ("symmetric", False, 4096),
        ("asymmetric", False, 16384),
        ("static", False, 1 << 17),
        ("symmetric", True, 64),
    ):
        blocks = rows.blocks_for(k)
        constants = {
            "MODE": mode,
            "QMIN": -127,
            "QMAX": 127,
            "HAS_SUMS": False,
            "PACK": pack,
            "ONE_PASS": blocks.one_pass,
            "ROWS": blocks.rows,
            "BLOCK": blocks.block,
        }
        if mode != "static":
            constants |= {"given_scale_ptr": None, "given_zero_ptr": None}
        if not pack:
            constants |= {"sums_ptr": None}
        jobs.append(
            partial(
                _compile,
                f"quantize {mode} {pack} {blocks}",
                rows._quantize_rows_kernel,
                capability,
                types | {"x_ptr": "*bf16"},
                constants,
                num_warps=blocks.warps,
            )
        )
    return [job() for job in jobs[part::PARTS]]


# ---------------------------------------------------------------- in this one


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[tuple[int, int]]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    keys = [(capability, part) for capability in tests.values("compiled") for part in range(PARTS)]
    caches = {key: str(new_folder("triton")) for key in keys}

    def run(key: tuple[int, int]) -> "subprocess.CompletedProcess[str]":
        code = f"import json, test_triton_compile as t; print(json.dumps(t.compile_part{key}))"
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**env, "TRITON_CACHE_DIR": caches[key]},
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


# 10.0 takes as long as both others, and no GPU of that capability has run the kernels.
@pytest.fixture(scope="module", params=[80, 90, pytest.param(100, marks=pytest.mark.slow)])
def compiled(
    request: pytest.FixtureRequest, result_of: Callable[[tuple[int, int]], Any]
) -> tuple[int, list[dict]]:
    facts = []
    for part in range(PARTS):
        ran = result_of((request.param, part))
        assert ran.returncode == 0, ran.stderr[-4000:]
        facts += json.loads(ran.stdout.splitlines()[-1])
    return request.param, facts


def test_no_rounding_but_the_written_ones(compiled: tuple[int, list[dict]]) -> None:
    """Neither flushed denormals nor approximations; fused only in the kernels that spell it."""
    for fact in compiled[1]:
        for instruction in fact["instructions"]:
            is_float = ".f32" in instruction and not instruction.startswith(("ld", "st", "mov"))
            assert not (is_float and (".ftz" in instruction or ".approx" in instruction)), fact
            assert not instruction.startswith(("ex2", "div.full", "mad.f", "mad.rn", "tanh"))
            if instruction.startswith("fma"):
                assert instruction.startswith("fma.rn.f32")
        if fact["name"].startswith("quantize"):
            assert not any(name.startswith("fma") for name in fact["instructions"]), fact


def test_tensor_cores_and_accelerator_are_used(compiled: tuple[int, list[dict]]) -> None:
    capability, facts = compiled
    for fact in facts:
        found = " ".join(fact["instructions"])
        if fact["name"].startswith(("rows", "few rows")):
            product = "tcgen05.mma|mma.sync" if capability == 100 else "mma.sync|wgmma"
            assert re.search(f"({product})", found), fact
        if "'tma'" in fact["name"]:
            assert "cp.async.bulk.tensor.2d.shared" in found, fact
            assert "cp.async.bulk.tensor.2d.global" in found, fact
            if capability == 90:
                width = 64 if "'block_n': 64" in fact["name"] else 128
                assert f"wgmma.mma_async.sync.aligned.m64n{width}k32.s32.s8.s8" in found, fact
        elif fact["name"].startswith(("rows", "few rows")):
            assert "cp.async.cg.shared.global" in found, fact  # 16 bytes at a time, under way
    assert any("'tma'" in fact["name"] for fact in facts) == (capability >= 90)


def most_spilled(name: str) -> int:
    """Bytes of a thread's registers that a kernel may leave on its stack."""
    if "gelu'" not in name:
        return 0
    # gelu with every zero point is the longest epilogue: a few registers of some tiles leave, and
    # with Triton 3.6 more of the widest tile that does not come by TMA (208 bytes on Hopper).
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 6)
    return 208 if old and "'pointer', 'block_m': 128, 'block_n': 256" in name else 128


def test_registers_and_shared_memory_suffice(compiled: tuple[int, list[dict]]) -> None:
    capability, facts = compiled
    for fact in facts:
        assert fact["stack"] <= most_spilled(fact["name"]), f"spilled: {fact}"
        assert fact["registers"] <= 255 and fact["shared"] <= SHARED[capability], fact
