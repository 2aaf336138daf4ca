"""The data files in the package."""

from __future__ import annotations

from pathlib import Path


def packaged(name: str, script: str) -> Path:
    """Path of the package's data file ``name``, which ``examples/script`` makes.

    Raises:
        FileNotFoundError: the file is missing from the installed package.

    Example:
        >>> packaged("digits.npz", "train_digits.py").name
        'digits.npz'
    """
    path = Path(__file__).resolve().parent / name
    if not path.is_file():
        raise FileNotFoundError(
            f"torchquant: the package's file data/{name} is missing; reinstall torchquant, or "
            f"make it with examples/{script}"
        )
    return path
