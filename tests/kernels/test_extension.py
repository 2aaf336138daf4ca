"""The C++ library: one clear message where it does not fit, one OpenMP runtime where it does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.scripts import run_python as in_process

import torchquant
from torchquant import _build_info, _extension

LOADER = Path(_extension.__file__)
BUILD_INFO = "TORCH_VERSION = {version!r}\nCXX11_ABI = True\nCOMPILER = 'g++ 12'\nFLAGS = '-O3'\n"


def run_python(code: str, *path: Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a process that looks for modules in `path` first."""
    setup = f"import sys; sys.path[:0] = {[str(entry) for entry in path]}\n"
    return in_process(setup + code, fresh=fresh)


@pytest.fixture
def fake_package(tmp_path: Path) -> Path:
    """A package `torchquant` that consists of the real loader only."""
    package = tmp_path / "torchquant"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_extension.py").write_text(LOADER.read_text())
    return package


def load_error(package: Path) -> str:
    """Load the fake package's library in another process; return the ImportError's message."""
    code = (
        "from torchquant import _extension\n"
        "try:\n    _extension.load()\n"
        "except ImportError as error:\n    print('ImportError:', error)\n"
    )
    result = run_python(code, package.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ImportError: "), result.stdout
    return result.stdout.strip().removeprefix("ImportError: ")


@pytest.mark.parametrize(
    ("built_for", "found", "fits"),
    [
        ("2.13.0", "2.13.0", True),
        ("2.13.0+cpu", "2.13.0", True),
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.1", False),
        ("2.12.0", "2.13.0", False),
        ("2.13.0", "2.13.0a0+git1", False),
        ("2.13.0a0+git1", "2.13.0a0+git1", True),
        ("2.13.0a0+git1", "2.13.0a0+git2", False),
    ],
)
def test_only_the_same_release_fits(built_for: str, found: str, fits: bool) -> None:
    assert _extension.same_torch(built_for, found) is fits


def test_message_says_built_for_found_and_remedy() -> None:
    with pytest.raises(ImportError) as caught:
        _extension.check_torch("2.12.1+cpu", "2.13.0+cu130")
    message = str(caught.value)
    assert (
        "torchquant was built for torch 2.12.1+cpu, but torch 2.13.0+cu130 is installed" in message
    )
    assert "pip install --force-reinstall --no-deps --no-cache-dir torchquant" in message
    assert "pip install torch==2.12.1" in message


def test_another_torch_is_noticed_before_the_library_is_loaded(fake_package: Path) -> None:
    (fake_package / "_build_info.py").write_text(BUILD_INFO.format(version="2.12.0"))
    (fake_package / "_C.py").write_text("raise SystemExit('the library was loaded')\n")
    assert load_error(fake_package).startswith(
        f"torchquant was built for torch 2.12.0, but torch {torch.__version__} is installed."
    )


def test_missing_library_says_how_to_build_it(fake_package: Path) -> None:
    message = load_error(fake_package)
    assert f"is missing in {fake_package}" in message
    assert "In a checkout, build it with: pip install -e . " in message
    assert "pip install --force-reinstall --no-deps --no-cache-dir torchquant" in message


def test_library_for_another_python_is_named(fake_package: Path) -> None:
    (fake_package / "_C.cpython-38-x86_64-linux-gnu.so").touch()
    message = load_error(fake_package)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"(torchquant._C) for Python {version} is only for another Python" in message
    assert "_C.cpython-38-x86_64-linux-gnu.so" in message


def test_missing_build_record_says_how_to_build(fake_package: Path) -> None:
    (fake_package / "_C.py").touch()
    message = load_error(fake_package)
    assert "build record (_build_info.py) is missing" in message
    assert "(in a checkout: pip install -e .)" in message


def test_library_that_does_not_load_says_for_what_it_was_built(fake_package: Path) -> None:
    (fake_package / "_build_info.py").write_text(BUILD_INFO.format(version=torch.__version__))
    (fake_package / "_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    message = load_error(fake_package)
    assert message.startswith(
        "torchquant's C++ library does not load: undefined symbol: _ZN3c10. "
        f"It was built for torch {torch.__version__} with g++ 12"
    )
    assert "(in a checkout: pip install -e .)" in message


def test_build_record_describes_the_installed_torch() -> None:
    assert _extension.same_torch(_build_info.TORCH_VERSION, torch.__version__)
    assert torch.compiled_with_cxx11_abi() == _build_info.CXX11_ABI
    assert _build_info.COMPILER


def test_flags_keep_arithmetic_exact_and_the_library_portable() -> None:
    flags = _build_info.FLAGS.split()
    assert "-ffp-contract=off" in flags
    assert "-fno-fast-math" in flags
    assert not [flag for flag in flags if re.match(r"-m|-std|-ffast-math|-Ofast", flag)]


def test_installed_version_is_the_package_version() -> None:
    from importlib.metadata import version

    assert torchquant.__version__ == version("torchquant")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.skipif("clang" in _build_info.COMPILER, reason="clang brings its own beside torch's")
@pytest.mark.parametrize("first", ["torch", "torchquant"])
def test_one_openmp_runtime_in_the_process(first: str) -> None:
    """Two would mean two thread pools, and a `torch.set_num_threads` that reaches only one."""
    code = f"import {first}\n" + (
        "import torch, torchquant\n"
        "torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "paths = {line.split(maxsplit=5)[5] for line in lines if line.count(' ') and '/' in line}\n"
        "names = ('libgomp', 'libomp', 'libiomp')\n"
        "print(*(path for path in paths if any(name in path for name in names)), sep='\\n')\n"
    )
    result = run_python(code, fresh=first == "torchquant")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, result.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="built without OpenMP elsewhere")
def test_library_was_compiled_with_openmp() -> None:
    """Without -fopenmp `at::parallel_for` compiles to a plain loop, and nothing says so."""
    library = Path(sys.modules["torchquant._C"].__file__ or "").read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library
