"""A Triton kernel compiled without a GPU, and facts about the result.

For a process where ``TRITON_INTERPRET`` is not set: elsewhere kernels may be the interpreter's.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def compile_kernel(
    kernel: Any,
    capability: int,
    pointers: dict[str, str],
    numbers: dict[str, str],
    constants: dict[str, Any],
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    """Instructions of the PTX and of the machine code, registers, stack, shared memory.

    Args:
        kernel: a ``triton.jit`` function.
        capability: 80, 90, ...
        pointers: name -> type of what it points to ("fp32", "bf16", "i8"); 16-byte aligned.
        numbers: name -> type of numbers that are not int32.
        constants: name -> value, of constexpr parameters and of integers that are 1.
        aligned: integers that are multiples of 16.
        options: num_warps and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    kinds = {name: f"*{kind}" for name, kind in pointers.items()}
    kinds |= numbers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    return {
        "ptx": dict(_instructions(compiled.asm["ptx"])),
        "shared": compiled.metadata.shared,
        **_machine_code(compiled.asm["cubin"]),
    }


def _instructions(ptx: str) -> Counter[str]:
    lines = (re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in ptx.splitlines())
    skipped = ("//", ".", "$", "{", "}", ")", "@")
    return Counter(
        line.split()[0].rstrip(";") for line in lines if not line.startswith(skipped) and line
    )


def _machine_code(cubin: bytes) -> dict[str, Any]:
    """Instructions with their modifiers, registers and stack of a thread (what was spilled)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        used, code = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used)
    assert found, used
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    registers, stack, local = (int(number) for number in found.groups())
    return {
        "sass": dict(Counter(operations)),
        "registers": registers,
        "stack": stack + local,
    }
