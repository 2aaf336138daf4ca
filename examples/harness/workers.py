"""One process per engine, which sleeps while another one is measured.

Idle threads of onnxruntime and OpenMP spin for a while after a call and take the cores of whatever
runs next, and peak memory is a figure of a whole process. So the script starts itself once per
engine (`--worker NAME`) and talks to it in lines of JSON:

    {"do": "block", "batch": 8, "seconds": 1.0}  ->  {"seconds": [0.068, 0.067, ...]}

`do` names a method of the object that the script hands to `serve`, the rest are its arguments. Any
answer may be `{"failed": "why"}` instead.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

Answer = dict[str, Any]

# glibc gives large blocks back to the system when they are freed and takes new pages for the next
# ones, which the kernel fills with zeros; with activations of 25 MB that takes as long as the
# arithmetic. Who serves a model on CPUs keeps the pages, with these settings or with another
# allocator, and so does every engine here. Other systems ignore them.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


class WorkerError(RuntimeError):
    """The engine could not do it; the message holds its own words."""


class Worker:
    """The script's handle on one engine's process.

    Args:
        script: starts the engine when called with `--worker` and its name.
        engine: the name.
        threads: for its computation.
        arguments: more of the script's arguments.
        keep_freed_memory: with `KEEP_FREED_MEMORY` in its environment.
    """

    def __init__(
        self,
        script: str,
        engine: str,
        threads: int,
        *arguments: str,
        keep_freed_memory: bool = True,
    ) -> None:
        self.engine = engine
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        command = [sys.executable, script, "--worker", engine, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads)}
            | (KEEP_FREED_MEMORY if keep_freed_memory else {}),
        )

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Call a method of the worker's object.

        Raises:
            WorkerError: it failed there, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"ended with status {self._process.wait()}: {self._last_words()}")
        answer: Answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def wait_until_asleep(self, timeout: float = 2.0) -> None:
        """Return when no thread of the process has run for two looks in a row."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        if not tasks.exists():  # not Linux
            time.sleep(0.1)
            return
        stop = time.perf_counter() + timeout
        quiet_looks = 0
        while quiet_looks < 2 and time.perf_counter() < stop:
            time.sleep(0.002)
            quiet_looks = 0 if _any_running(tasks) else quiet_looks + 1

    def close(self) -> None:
        """End the process. It has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def _any_running(tasks: Path) -> bool:
    for stat in tasks.glob("*/stat"):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except OSError:  # the thread has just ended
            continue
        if state == "R":
            return True
    return False


def interleaved(
    workers: Iterable[Worker], rounds: int, do: str, **arguments: Any
) -> dict[str, float]:
    """Median seconds per engine, measured in alternating blocks.

    Clock speeds drift by a fifth within minutes; engines that take turns share the drift.

    Args:
        workers: the engines.
        rounds: blocks per engine.
        do, arguments: the request for one block, answered with `{"seconds": [...]}`.
    """
    workers = list(workers)
    blocks: dict[str, list[float]] = {worker.engine: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            seconds = worker.ask(do, **arguments)["seconds"]
            blocks[worker.engine].append(statistics.median(seconds))
            worker.wait_until_asleep()
    return {engine: statistics.median(medians) for engine, medians in blocks.items()}


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Times of calls that fill `seconds`, at least two, after one that does not count."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def peak_megabytes() -> float | None:
    """The most memory this process has held; None where the system does not tell.

    Not `ru_maxrss`: after a fork and exec that still counts the parent.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def release_freed_memory() -> None:
    """Give freed memory back to the system once, so that many engines fit beside each other.

    Nothing happens where the C library has no way of doing it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def serve(create: Callable[[], object]) -> None:
    """Answer requests until standard input ends; they name methods of what `create` makes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not talk into the protocol
    target: object | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            target = target if target is not None else create()
            do = request.pop("do")
            answer = getattr(target, do)(**request)
            if do == "load":
                release_freed_memory()
        except Exception as error:  # whatever an engine raises belongs into the table
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
