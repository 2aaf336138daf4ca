"""Fuzzer of ``torchquant.load``: any broken file is refused with a clear error.

    python tests/fuzz/fuzz_load.py [--seconds 30] [--cases 0] [--engine auto|atheris|random]

With atheris (``pip install atheris``) mutations are guided by the coverage of torchquant's own
code; without it they are drawn at random. The last line names the engine and the number of cases.
Each case must end in one of two ways: the model is loaded and can be called, or ``load`` raises a
ValueError that begins with ``load:`` (or an OSError) and leaves the model unchanged. A crash,
another exception, a time above ten seconds, or memory far beyond the file's size is a finding.

A case with a finding is written to ``--artifacts``; ``--replay FILE`` runs it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

MEMORY = 64 * 2**20  # bytes by which the process may grow during a case
SECONDS = 10
# The modules that check a file are instrumented. Instrumenting torch or json would only be slower.
FILES = ("load", "format", "entries", "places", "fit", "ties", "undo")
OURS = [*(f"torchquant.files.{name}" for name in FILES), "torchquant.configs", "torchquant.nn.base"]


def import_with_coverage() -> bool:
    """Import torchquant so that atheris sees its branches. Returns False without atheris."""
    if importlib.util.find_spec("atheris") is None:
        return False
    import atheris
    import torch  # first, without instrumentation  # noqa: F401

    with atheris.instrument_imports(include=OURS):
        import torchquant  # noqa: F401
    return True


def resident_now() -> int:
    """Bytes of memory in use, on Linux (0 elsewhere); resets the peak."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def resident_peak() -> int:
    if not Path("/proc/self/clear_refs").exists():
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Finding(Exception):
    """A case ended in a way that it must not."""


def fail_on_alarm(_signal: int, _frame: FrameType | None) -> None:
    raise Finding(f"more than {SECONDS} seconds")


class Harness:
    """Runs cases and counts their outcomes."""

    def __init__(self) -> None:
        from load_cases import file_of

        self.file_of = file_of
        self.ends: collections.Counter[str] = collections.Counter()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "case.safetensors"
        signal.signal(signal.SIGPROF, fail_on_alarm)  # counts the process's own CPU time

    @property
    def cases(self) -> int:
        return sum(self.ends.values())

    def run(self, data: bytes) -> None:
        content, model = self.file_of(data)
        self.path.write_bytes(content)
        before = resident_now()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self.ends[self.outcome(model)] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = resident_peak() - before
        if grown > MEMORY and self.cases > 20:  # the first cases load code
            raise Finding(f"{grown} bytes of memory for a file of {len(content)}")

    def outcome(self, model: object) -> str:
        import torch
        from torch import nn

        from torchquant.files import load as io

        assert isinstance(model, nn.Module)
        before = [(key, value.clone()) for key, value in model.state_dict().items()]
        modules = list(model.modules())
        try:
            loaded = io.load(self.path, model)
        except (ValueError, OSError) as error:
            text = str(error)
            if not text.startswith("load: "):
                raise Finding(f"the message must begin with 'load: ', got {text!r}") from error
            after = model.state_dict()
            same = [key for key, _ in before] == list(after)
            same = same and all(torch.equal(value, after[key]) for key, value in before)
            same_modules = all(a is b for a, b in zip(modules, model.modules(), strict=True))
            if not (same and same_modules):
                raise Finding(f"the model is changed after {text!r}") from error
            return "refused: " + self.kind_of(text)
        if loaded is not model:
            raise Finding("load must return the model")
        width = next(p.shape[-1] for p in loaded.parameters() if p.dim() == 1)
        dtype = next((p.dtype for p in loaded.parameters() if p.is_floating_point()), torch.float32)
        with contextlib.suppress(ValueError, TypeError, RuntimeError), torch.no_grad():
            loaded(torch.ones(2, min(width, 16), dtype=dtype))
            return "loaded and called"
        return "loaded, call refused"

    @staticmethod
    def kind_of(text: str) -> str:
        kinds = {
            "must be a complete safetensors file": "not a safetensors file",
            "must be a file that torchquant.save wrote": "foreign",
            "damaged torchquant metadata": "metadata",
            "has format": "format",
            "was changed after": "checksum",
            "does not fit the model": "does not fit",
        }
        return next((kind for part, kind in kinds.items() if part in text), text[:60])

    def summary(self, engine: str) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in self.ends.most_common())
        return f"fuzz_load: {self.cases} cases ({engine}): {ends}"


def random_cases(seed: int) -> Iterator[bytes]:
    generator = random.Random(seed)
    while True:
        yield generator.randbytes(generator.choice((4, 16, 16, 48, 48, 200, 2000)))


def run_random(harness: Harness, arguments: argparse.Namespace) -> int:
    until = time.monotonic() + arguments.seconds
    for data in random_cases(arguments.seed):
        if time.monotonic() > until or harness.cases == (arguments.cases or -1):
            break
        try:
            harness.run(data)
        except Exception as error:
            traceback.print_exc()
            arguments.artifacts.mkdir(parents=True, exist_ok=True)
            path = arguments.artifacts / f"load-{harness.cases}"
            path.write_bytes(data)
            print(f"finding ({type(error).__name__}): replay with --replay {path}", file=sys.stderr)
            return 1
    print(harness.summary(f"drawn at random, seed {arguments.seed}"))
    return 0


def run_atheris(harness: Harness, arguments: argparse.Namespace) -> None:
    import atheris

    arguments.corpus.mkdir(parents=True, exist_ok=True)
    arguments.artifacts.mkdir(parents=True, exist_ok=True)
    for number, data in zip(range(200), random_cases(arguments.seed), strict=False):
        (arguments.corpus / f"seed-{number}").write_bytes(data)
    options = [f"-seed={arguments.seed + 1}", "-max_len=2000", "-rss_limit_mb=4096"]
    options += [f"-artifact_prefix={arguments.artifacts}/load-", "-verbosity=0"]
    until = time.monotonic() + arguments.seconds

    def run(data: bytes) -> None:
        harness.run(data)
        if time.monotonic() > until or harness.cases == arguments.cases:
            print(harness.summary("atheris, guided by coverage"), flush=True)
            harness.folder.cleanup()
            os._exit(0)  # libFuzzer ends in the same way, after a summary of its own

    atheris.Setup([sys.argv[0], *options, str(arguments.corpus)], run)
    atheris.Fuzz()


def arguments_from(command: list[str] | None) -> argparse.Namespace:
    scratch = Path(tempfile.gettempdir()) / "torchquant-fuzz"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--cases", type=int, default=0, help="most cases; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--corpus", type=Path, default=scratch / "corpus-load")
    parser.add_argument("--artifacts", type=Path, default=scratch / "findings")
    parser.add_argument("--replay", type=Path, help="run the case in this file")
    return parser.parse_args(command)


def main(command: list[str] | None = None) -> int:
    arguments = arguments_from(command)
    guided = arguments.engine != "random" and arguments.replay is None and import_with_coverage()
    if arguments.engine == "atheris" and not guided:
        print("fuzz_load: atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    harness = Harness()
    if arguments.replay is not None:
        harness.run(arguments.replay.read_bytes())
        print(harness.summary("replayed"))
        return 0
    if guided:
        run_atheris(harness, arguments)
        return 0
    return run_random(harness, arguments)


if __name__ == "__main__":
    sys.exit(main())
