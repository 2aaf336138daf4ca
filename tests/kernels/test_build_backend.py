"""The build backend: which torch a build takes, and the one line where it cannot take any."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ("get_requires_for_build_wheel", "get_requires_for_build_editable")


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment to install torchquant into; nothing is installed there yet."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    return folder


def install_torch(environment: Path, version: str) -> None:
    """A package torch that has a version and nothing else."""
    (packages,) = environment.glob("lib/python*/site-packages")
    information = packages / f"torch-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}")
    (packages / "torch.py").write_text(f"__version__ = {version!r}\n")


def run_isolated(
    environment: Path, code: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code as pip runs a backend: the environment's interpreter, but not its packages.

    pip puts a file ``sitecustomize.py`` on PYTHONPATH, which replaces the installed packages on the
    search path by those of the build. The build's packages are setuptools alone here.
    """
    site, overlay = environment.parent / "site", environment.parent / "overlay"
    site.mkdir()
    overlay.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack"):
        (overlay / name).symlink_to(installed / name)
    (site / "sitecustomize.py").write_text(
        "import site, sys\n"
        "installed = set(site.getsitepackages())\n"
        "sys.path[:] = [entry for entry in sys.path if entry not in installed]\n"
        f"sys.path.append({str(overlay)!r})\n"
    )
    names = ("UV", "PIP_BUILD_TRACKER", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    isolation = {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import build_backend\n"
    return subprocess.run(
        [environment / "bin" / "python", "-c", start + code],
        cwd=environment.parent,
        env={**inherited, **isolation, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_torch_the_newest_supported_one_is_required(environment: Path) -> None:
    result = run_isolated(environment, "".join(f"print(build_backend.{h}())\n" for h in HOOKS))
    assert result.stdout == "['torch>=2.11,<2.16']\n" * len(HOOKS), result.stderr


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.3"])
def test_an_installed_torch_is_taken_and_none_is_fetched(environment: Path, version: str) -> None:
    install_torch(environment, version)
    result = run_isolated(
        environment,
        "print([hook() for hook in (\n"
        "    build_backend.get_requires_for_build_wheel,\n"
        "    build_backend.get_requires_for_build_editable,\n"
        ")])\n"
        "build_backend.find_torch()\n"
        "import torch, setuptools\n"
        "print(torch.__version__, setuptools.__file__)\n",
    )
    required, found = result.stdout.splitlines()
    assert required == "[[], []]"
    overlay = (
        environment.parent / "overlay"
    )  # what the build brought comes before what is installed
    assert found == f"{version} {overlay / 'setuptools' / '__init__.py'}"


@pytest.mark.parametrize(
    ("version", "hook"),
    [
        ("2.10.1", "get_requires_for_build_wheel"),
        ("2.16.0a0+git1", "get_requires_for_build_editable"),
        ("3.0.0+cpu", "find_torch"),
    ],
)
def test_an_unsupported_torch_stops_the_build_with_one_line(
    environment: Path, version: str, hook: str
) -> None:
    install_torch(environment, version)
    result = run_isolated(environment, f"build_backend.{hook}()")
    assert result.returncode == 1
    assert result.stderr == (
        f"torchquant must be built against torch>=2.11,<2.16, got torch {version}, which is "
        f"installed for {environment / 'bin' / 'python'}. First install a supported release "
        "(pip install 'torch>=2.11,<2.16'), or install torchquant into a new virtual environment.\n"
    )


def test_uv_is_told_to_build_without_isolation(environment: Path) -> None:
    """The environment of uv's build does not lead to the one that uv installs into."""
    code = "print(build_backend.required_torch())"
    result = run_isolated(environment, code, {"UV": "/usr/bin/uv"})
    assert result.returncode == 1
    assert result.stderr == (
        "torchquant must be built against the torch that is installed, which uv hides from an "
        "isolated build. Run: uv pip install 'torch>=2.11,<2.16' setuptools ninja, then: "
        "uv pip install --no-build-isolation torchquant (in a checkout: .)\n"
    )


def test_pip_under_uv_is_pip(environment: Path) -> None:
    variables = {"UV": "/usr/bin/uv", "PIP_BUILD_TRACKER": "/tmp/tracker"}
    result = run_isolated(environment, "print(build_backend.required_torch())", variables)
    assert result.stdout == "['torch>=2.11,<2.16']\n", result.stderr


def test_an_archive_of_the_sources_needs_no_torch(environment: Path) -> None:
    result = run_isolated(environment, "print(build_backend.get_requires_for_build_sdist())")
    assert result.stdout == "[]\n", result.stderr


def test_without_isolation_the_imported_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import build_backend

    monkeypatch.setattr(build_backend, "installed_torch", lambda: pytest.fail("not needed"))
    before = list(sys.path)
    assert build_backend.required_torch() == []
    build_backend.find_torch()
    assert sys.path == before


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("2.10.9", False),
        ("2.11.0", True),
        ("2.15.1+cu132", True),
        ("2.16.0", False),
        ("1.13.1", False),
    ],
)
def test_supported_releases(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import build_backend

    assert build_backend.is_supported(version) is supported


def test_the_supported_releases_are_stated_once() -> None:
    """pyproject.toml and setup.py take them from the backend; the README's words agree."""
    assert "torch>=" not in (ROOT / "setup.py").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert "torch>=" not in project.partition("[project.optional-dependencies]")[0]
    assert "PyTorch 2.11 to 2.15" in (ROOT / "README.md").read_text()
