"""Loads ``torchquant._C`` after checking that it fits the installed torch.

A C++ extension works only with the torch release that it was compiled against. With another release
the dynamic linker reports a missing symbol or, worse, nothing does. ``setup.py`` therefore records
the release in ``torchquant/_build_info.py``, and `load` compares it before it opens the library.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch  # before the library, so that the process uses torch's OpenMP runtime

# pip caches the wheels that it built, whatever the torch version; without the cache it rebuilds.
REBUILD = (
    "pip install --force-reinstall --no-deps --no-cache-dir torchquant "
    "(in a checkout: pip install -e .)"
)


def same_torch(built_for: str, found: str) -> bool:
    """True if a library built for one torch version can be loaded into the other.

    Local parts (``+cpu``, ``+cu130``) name variants of one release and are ignored. In
    pre-releases and builds from source they name the commit and are compared.

    >>> same_torch("2.13.0+cpu", "2.13.0"), same_torch("2.13.0", "2.13.1")
    (True, False)
    >>> same_torch("2.13.0a0+git1234567", "2.13.0a0+git89abcde")
    False
    """
    release = built_for.partition("+")[0]
    if not release.replace(".", "").isdigit():
        return built_for == found
    return release == found.partition("+")[0]


def check_torch(built_for: str, found: str) -> None:
    """Raise ImportError if the library was built for a torch version other than the one found.

    >>> check_torch("2.13.0+cpu", "2.13.0+cu130")
    >>> check_torch("2.12.0", "2.13.0")
    Traceback (most recent call last):
    ImportError: torchquant was built for torch 2.12.0, but torch 2.13.0 is installed...
    """
    if not same_torch(built_for, found):
        release = built_for.partition("+")[0]
        raise ImportError(
            f"torchquant was built for torch {built_for}, but torch {found} is installed. "
            f"Build it again for this one: {REBUILD}; or go back: pip install torch=={release}"
        )


def load() -> ModuleType:
    """Check the versions, load the library (which registers the operators) and return it.

    Raises:
        ImportError: the library is missing, was built for another torch or another Python, or does
            not load; the message says how to build it.
    """
    folder = Path(__file__).resolve().parent
    if PathFinder.find_spec("torchquant._C", [str(folder)]) is None:
        raise ImportError(missing_library_message(folder))
    if not (folder / "_build_info.py").is_file():
        raise ImportError(
            f"torchquant's build record (_build_info.py) is missing in {folder}: the library "
            f"in it may not fit this torch. Build it again: {REBUILD}"
        )
    info = importlib.import_module("torchquant._build_info")
    check_torch(info.TORCH_VERSION, torch.__version__)
    try:
        return importlib.import_module("torchquant._C")
    except ImportError as error:
        raise ImportError(
            f"torchquant's C++ library does not load: {error}. It was built for torch "
            f"{info.TORCH_VERSION} with {info.COMPILER}; build it again: {REBUILD}"
        ) from error


def missing_library_message(folder: Path) -> str:
    """The error message for a folder without a library that this Python can load."""
    others = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    found = f"only for another Python ({', '.join(others)})" if others else "missing"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"torchquant's C++ library (torchquant._C) for Python {version} is {found} in {folder}. "
        "In a checkout, build it with: pip install -e . Otherwise install the package again: "
        "pip install --force-reinstall --no-deps --no-cache-dir torchquant"
    )
