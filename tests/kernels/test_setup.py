"""setup.py: its requirements and sources, and one clear line for each missing prerequisite."""

import re
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines, and under "call" its arguments to setuptools."""
    return run_setup(monkeypatch, "bdist_wheel")


def run_setup(monkeypatch: pytest.MonkeyPatch, command: str) -> dict[str, Any]:
    """The fixture's value for one command of setuptools."""
    call: dict[str, Any] = {}
    monkeypatch.syspath_prepend(str(ROOT))  # for build_backend
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: call.update(arguments))
    return {**runpy.run_path(str(ROOT / "setup.py")), "call": call}


def test_requires_exactly_the_release_it_builds_against(setup_file: dict[str, Any]) -> None:
    requirements = setup_file["call"]["install_requires"]
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements


def test_an_archive_of_the_sources_requires_every_supported_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is made where no torch can be imported."""
    monkeypatch.setitem(sys.modules, "torch", None)
    setup = run_setup(monkeypatch, "sdist")
    assert setup["TORCH"] in setup["call"]["install_requires"]
    (extension,) = setup["call"]["ext_modules"]
    assert {path.name for path in ROOT.glob("csrc/kernels/*.cpp")} <= {
        Path(source).name for source in extension.sources
    }


def test_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as caught:
        run_setup(monkeypatch, "bdist_wheel")
    message = str(caught.value)
    assert message.startswith("torchquant is built against torch, which cannot be imported here (")
    assert message.endswith(
        "Either leave out --no-build-isolation, or first install 'torch>=2.11,<2.16', setuptools "
        "and ninja."
    )


def test_compiles_every_source_and_watches_every_header(setup_file: dict[str, Any]) -> None:
    (extension,) = setup_file["call"]["ext_modules"]
    files = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*") if p.is_file()}
    compiled = {name for name in files if name.endswith(".cpp")}
    assert set(extension.sources) == compiled
    assert set(extension.depends) == files  # sources too: a translation unit includes several


def test_prerequisites_are_there(setup_file: dict[str, Any]) -> None:
    setup_file["check_prerequisites"](setup_file["shlex"].split(setup_file["get_cxx_compiler"]()))


def test_missing_compiler_is_named(setup_file: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match=r"'no-such-g\+\+' is not on the PATH.*apt-get install"):
        setup_file["check_prerequisites"](["no-such-g++"])


def test_missing_python_headers_are_named(
    setup_file: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(CompileError, match=r"C headers are missing.*python3-dev"):
        setup_file["check_prerequisites"](["c++"])


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0+cpu"])
def test_torch_outside_the_range_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check = run_setup(monkeypatch, "build_ext")["check_prerequisites"]
    with pytest.raises(
        CompileError,
        match=r"must be built against torch>=2\.11,<2\.16, got torch " + re.escape(version),
    ):
        check(["c++"])


def test_windows_is_pointed_to_wsl(
    setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CompileError, match="WSL"):
        setup_file["check_prerequisites"](["cl"])
