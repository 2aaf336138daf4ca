"""Write a file under a temporary name and rename it when it is complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path``; it replaces ``path`` if the block succeeds."""
    if path.is_dir():
        raise IsADirectoryError(f"save: path must name a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: path must be in an existing folder, got {str(path)!r}")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # safetensors creates files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
