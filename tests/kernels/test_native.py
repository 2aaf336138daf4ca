"""The kernels without torch: tests/native/build.py builds and runs what this file asks for.

Building them takes minutes, so that is left to ``-m slow`` and to .ci/run, which runs all variants;
what always runs is the proof that the sanitizers, as they are set up, see a mistake.
"""

import importlib.util
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
    output = run(build, variant)
    assert "cases" in output or "calls from" in output
    print(output)


@pytest.mark.slow
def test_fuzzer(build: ModuleType) -> None:
    print(build.run_fuzzer(20, 1))


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
