"""The build backend of torchquant: setuptools, and the choice of the torch to build against.

A C++ extension works with exactly one release of torch, and the package requires that release. pip
builds in an environment of its own, in which the installed packages cannot be imported. A fixed
build requirement ``torch`` would therefore fetch the newest torch, build against that one, and make
pip replace the torch that is installed. This backend prevents that. Where the package is to be
installed there is

* a supported torch: the build imports that one, and nothing is downloaded;
* an unsupported torch: the build stops with one line that names the remedy;
* no torch: the newest supported release is a requirement of the build.

`TORCH` is the only place that states the supported releases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from setuptools import build_meta

TORCH = "torch>=2.11,<2.16"

# Prints the version of the torch that an interpreter imports (null: none), and its search path.
_LOOK_FOR_TORCH = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
path = [entry for entry in sys.path if entry]
sys.path[:] = path
try:
    found = version("torch")
except PackageNotFoundError:
    found = None
print(json.dumps([found, path]))
"""


def is_supported(torch_version: str) -> bool:
    """Whether `TORCH` admits this version, variants such as ``2.13.0+cpu`` included."""
    least, below = (
        tuple(int(part) for part in bound.strip("torch<>=").split("."))
        for bound in TORCH.split(",")
    )
    return least <= tuple(int(part) for part in torch_version.split(".")[:2]) < below


def unsupported(torch_version: str) -> str:
    """The one line for a torch that torchquant cannot be built against."""
    return (
        f"torchquant must be built against {TORCH}, got torch {torch_version}, which is installed "
        f"for {sys.executable}. First install a supported release (pip install '{TORCH}'), or "
        "install torchquant into a new virtual environment."
    )


def importable_torch() -> str | None:
    """The version of the torch that this process can import."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def installed_torch() -> tuple[str | None, list[str]]:
    """The version of the torch where pip installs to, and the search path there.

    pip's isolation is a matter of two environment variables: without them the same interpreter
    finds what is installed.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")
    }
    output = subprocess.run(
        [sys.executable, "-c", _LOOK_FOR_TORCH],
        cwd=tempfile.gettempdir(),  # python -c searches the current folder: not the source tree
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    found, path = json.loads(output.stdout.splitlines()[-1])
    return found, path


def uv_builds() -> bool:
    """Whether uv builds in an environment that it made for the build alone.

    That environment has its own interpreter, and nothing in it names the environment to install
    into. pip does not work like that, also where ``uv run`` started it.
    """
    return "UV" in os.environ and "PIP_BUILD_TRACKER" not in os.environ


def required_torch() -> list[str]:
    """The torch that a build needs and cannot find: [] or [`TORCH`]."""
    found = importable_torch() or installed_torch()[0]
    if found is None and uv_builds():
        raise SystemExit(
            "torchquant must be built against the torch that is installed, which uv hides from an "
            f"isolated build. Run: uv pip install '{TORCH}' setuptools ninja, then: "
            "uv pip install --no-build-isolation torchquant (in a checkout: .)"
        )
    if found is None:
        return [TORCH]
    if not is_supported(found):
        raise SystemExit(unsupported(found))
    return []


def find_torch() -> None:
    """Let this process import the torch to build against; stop with one line if it is unsupported.

    The installed packages come last on the search path: those of the build environment stay first.
    """
    found = importable_torch()
    if found is None:
        found, path = installed_torch()
        sys.path += [entry for entry in path if entry not in sys.path]
    if found is not None and not is_supported(found):
        raise SystemExit(unsupported(found))


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return required_torch()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return required_torch()


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return []  # an archive of the sources is the same for every torch


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    find_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    find_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    find_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)
