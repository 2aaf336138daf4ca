"""The kernels and the core without torch: tests/native/build.py builds and runs the native tests.

Building them takes minutes, so only ``-m slow`` and .ci/run do that. Always tested: the interface
of the core is C, the core includes nothing of torch, and the sanitizers with these flags find
mistakes.
"""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

NATIVE = Path(__file__).parents[1] / "native"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(build: ModuleType, variant: str) -> str:
    try:
        return str(build.run_test(variant, 1))
    except build.Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
def test_kernels(build: ModuleType, variant: str) -> None:
    print(run(build, variant))  # fails where a program ran no case


@pytest.mark.slow
def test_fuzzer(build: ModuleType) -> None:
    print(build.run_fuzzer(20, 1))


@pytest.mark.parametrize("output", ["0 core cases: none", "0 calls from 4 threads", "", "cases"])
def test_no_case_is_a_failure(build: ModuleType, output: str) -> None:
    with pytest.raises(AssertionError, match="no case ran"):
        build.require_cases(output, r"(\d+) (core cases|calls from)")


def test_the_core_has_a_c_interface(build: ModuleType) -> None:
    try:
        build.check_interface()
    except build.Skipped as reason:
        pytest.skip(str(reason))


def files_below_the_core(build: ModuleType) -> list[Path]:
    """The core, and every file of csrc that it includes, directly or through another file."""
    csrc = build.ROOT / "csrc"
    waiting, found = [*build.CORE, *build.INTERFACES], set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'#include\s+"([^"]+)"', path.read_text()):
            near = path.parent / name
            waiting.append(near if near.is_file() else csrc / name)
    return sorted(found)


def test_the_core_includes_nothing_above_it(build: ModuleType) -> None:
    """No header of torch, ATen, c10, Python or pybind11; no file of the operators' folders."""
    allowed = {*build.CORE_FOLDERS}
    files = files_below_the_core(build)
    assert len(files) > 40
    for path in files:
        place = path.relative_to(build.ROOT / "csrc").parts
        assert len(place) == 1 or place[0] in allowed, path
        for header in re.findall(r"#include\s+<([^>]+)>", path.read_text()):
            library = header.partition("/")[0]
            assert library not in {"torch", "ATen", "c10", "pybind11", "Python.h"}, (path, header)


MISTAKES = {
    "reads behind the end": ("address", "int* a = new int[4]; got = a[argc + 3];"),
    "overflows": ("address", "int big = 2147483647; got = big + argc;"),
    "races": ("thread", "int x = 0; std::thread t([&] { ++x; }); ++x; t.join(); got = x;"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_sanitizers_see(build: ModuleType, mistake: str, tmp_path: Path) -> None:
    """Flags and environment of build.py turn a mistake into a failure."""
    variant, body = MISTAKES[mistake]
    try:
        cxx = build.compiler()
        build.require(cxx, build.FLAGS[variant])
    except build.Skipped as reason:
        pytest.skip(str(reason))
    source, program = tmp_path / "mistake.cpp", tmp_path / "mistake"
    source.write_text(
        f"#include <thread>\nvolatile int got;\nint main(int argc, char**) {{ {body} }}\n"
    )
    flags = [*build.COMMON, *build.FLAGS[variant]]
    subprocess.run([*cxx, *flags, source, "-o", program], check=True)
    with pytest.raises(AssertionError, match=r"Sanitizer|runtime error"):
        build.run(program)
