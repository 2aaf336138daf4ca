"""The file of the choices of :mod:`torchquant.triton.tuning.choose`.

``TORCHQUANT_CACHE_DIR`` names its folder; the default is ``torchquant`` in ``XDG_CACHE_HOME`` or in
``~/.cache``. There is one file per GPU model, version of Triton and state of the kernels' source.
Any of them can be deleted at any time. A file that cannot be read is ignored, with a warning, and
replaced at the next choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "TORCHQUANT_CACHE_DIR"
FORMAT = "torchquant tuning 1"

_LOCK_SECONDS = 2.0  # how long to wait for another process that writes the file


def cache_folder() -> Path | None:
    """The folder of the files; None if the user has no home folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "torchquant"
    except RuntimeError:  # no home folder
        return None


class TuningFile:
    """The choices of one environment, on disk.

    ``{"format": ..., "environment": {...}, "choices": {problem: {"config": {...}, ...}}}``. Writers
    read, merge and replace the whole file, so a reader never sees a part of it.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        text = json.dumps([FORMAT, self.environment], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        label = re.sub(r"[^a-z0-9]+", "-", self.environment.get("device", "").lower()).strip("-")
        self.path = folder / f"{label or 'device'}-{digest}.json"
        self._said: set[str] = set()

    def read(self) -> dict[str, dict[str, Any]]:
        """The choices; empty if the file is missing or was not written by this class."""
        try:
            data = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            return self._ignored(f"it cannot be read ({one_line(error)})")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return self._ignored("it was not written by torchquant")
        if data.get("environment") != self.environment:
            return self._ignored("it was written on another machine")
        choices = data.get("choices")
        if not isinstance(choices, dict) or not all(isinstance(c, dict) for c in choices.values()):
            return self._ignored("its contents are invalid")
        return choices

    def write(self, problem: str, choice: Mapping[str, Any]) -> None:
        """Add a choice. If the file cannot be written, warn once and continue."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._other_writers_out():
                choices = {**self.read(), problem: dict(choice)}
                self._replace({"environment": self.environment, "choices": choices})
        except OSError as error:
            self._say(
                f"torchquant cannot write to {self.path} ({one_line(error)}): every process will "
                f"measure again. Set {FOLDER_VARIABLE} to a folder that can be written."
            )

    def _replace(self, content: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **content}, indent=1, sort_keys=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".tuning-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    @contextlib.contextmanager
    def _other_writers_out(self) -> Iterator[None]:
        """A block without other writers. If the lock is not available, a choice can get lost."""
        try:
            import fcntl
        except ImportError:  # not on this system
            yield
            return
        with open(self.path.with_suffix(".lock"), "w") as file:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        break
                    time.sleep(0.01)
            yield  # closing the file releases the lock

    def _ignored(self, reason: str) -> dict[str, dict[str, Any]]:
        self._say(f"torchquant ignores {self.path} and will replace it: {reason}.")
        return {}

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")
