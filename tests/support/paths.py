"""Runs existing tests on the CPU over the kernels of a GPU.

In a process of its own, the kernels of a path replace the CPU's kernels of ``torchquant::X``: the
fallback in ATen (``torchquant_aten::X``) or, on top of it, the Triton kernels. Layers, quantization
aware training and the verbs then run on that path without changes.

The module is a pytest plugin: ``TORCHQUANT_TEST_PATH=aten pytest -p support.paths tests``. A test
with the marker ``cpu_only`` does not run on a path.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch.library import Library

from torchquant import cpu
from torchquant.cuda.host import FAMILY_OF
from torchquant.ops import _arguments

VARIABLE = "TORCHQUANT_TEST_PATH"
PATHS = ("aten", "triton")
ROOT = Path(__file__).resolve().parents[2]
_LIBRARY = pytest.StashKey[Library]()


def aten_operators() -> dict[str, Callable]:
    """The operators of the fallback by name."""
    prefix, key = "torchquant_aten::", "CompositeExplicitAutograd"
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): getattr(torch.ops.torchquant_aten, name.removeprefix(prefix))
        for name in sorted(names)
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    }


def triton_operators() -> dict[str, Callable]:
    """The Triton kernels' functions; a call that they do not cover goes to the fallback."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("support.triton")  # repairs the interpreter
    fallback = aten_operators()
    operators = {}
    for name, family in FAMILY_OF.items():
        function = getattr(importlib.import_module(f"torchquant.triton.ops.{family}"), name)
        operators[name] = _with_fallback(function, fallback[name])
    return operators


def _with_fallback(function: Callable, fallback: Callable) -> Callable:
    def call(*args: object) -> object:
        result = function(*args)
        return fallback(*args) if result is NotImplemented else result

    return call


def replace_cpu_kernels(path: str) -> Library:
    """Let ``torchquant::X`` on CPU tensors run ``path``'s kernels, as long as the result lives."""
    if path not in PATHS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(PATHS)}, got {path!r}")
    operators = aten_operators()
    if path == "triton":
        operators |= triton_operators()
    library = Library("torchquant", "IMPL")
    for name, function in operators.items():
        library.impl(name, function, "CPU", allow_override=True)
    return library


def run_tests(
    path: str,
    files: Iterable[str],
    marker: str = "",
    *,
    environment: Mapping[str, str],
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """pytest over ``path`` in a fresh process: files below tests, or their tests of a marker."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "support.paths", "--no-header"]
    command += ["-m", " and ".join(filter(None, (marker, "not slow", "not cpu_only")))]
    folder = str(ROOT / "tests")
    search = os.pathsep.join(filter(None, (str(ROOT), folder, environment.get("PYTHONPATH"))))
    return subprocess.run(
        [*command, *(str(ROOT / "tests" / name) for name in files)],
        # The path has no threads of its own, and several processes share the cores.
        env={**environment, "OMP_NUM_THREADS": "1", VARIABLE: path, "PYTHONPATH": search},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before conftest.py asks for the instruction sets."""
    if path := os.environ.get(VARIABLE):
        early_config.stash[_LIBRARY] = replace_cpu_kernels(path)
        _arguments.layout_of = lambda device: "rows"  # for fake tensors: of an accelerator
        only = (cpu.active_isa(),)  # no use in taking turns
        cpu.available_isas = lambda: only


__all__ = ["PATHS", "VARIABLE", "replace_cpu_kernels", "run_tests"]
