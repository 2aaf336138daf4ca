"""One process per peer, which sleeps while another one is measured.

Benchmarks and examples measure libraries against each other. The idle threads of onnxruntime spin
for a while after a call, and so do torch's OpenMP threads: in one process with another peer, or
just before it, they would take its cores. Peak memory is a property of a whole process too. So the
parent starts one worker per peer, asks one worker at a time for a block of measurements, and
continues only when all threads of that worker sleep. No wait policy is set (OMP_WAIT_POLICY,
GOMP_SPINCOUNT, allow_spinning): every library runs with the defaults that its users get, which
helps short calls.

The protocol is one JSON object per line, over the worker's standard input and output. ``do`` names
a method of the object that the worker gave to :func:`serve`; the other fields are its arguments::

    {"do": "load", "n": 384, "k": 384}      -> {}
    {"do": "block", "seconds": 0.05}        -> {"seconds": 1e-5}

Any answer can be ``{"failed": "why"}`` instead.

This file imports the standard library only, and nothing of torchquant: ``examples/harness`` loads
it by its path, so that a process which measures onnxruntime does not hold torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Answer = dict[str, Any]

# glibc returns large blocks to the system when they are freed, and takes new pages for the next
# ones. The kernel fills those with zeros, and on a virtual machine their first use can wait for the
# host: a product with 45 MB of output took 21 ms on kept pages and 25 to 91 ms on new ones. Whoever
# serves a model on CPUs keeps the pages, with these settings or with another allocator, and so does
# every peer. Other systems ignore these settings.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
ANSWER_SECONDS = 300.0  # a peer without an answer after this time hangs


class WorkerError(RuntimeError):
    """A peer cannot run: its library is missing or raised an error, or the process ended."""


class Worker:
    """The parent's handle of one peer's process.

    Args:
        command: the arguments of Python that start the worker, which calls :func:`serve`.
        environment: variables to set in addition to the parent's.
        keep_freed_memory: whether to set ``KEEP_FREED_MEMORY`` too.
        answer_seconds: the longest time to wait for an answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        keep_freed_memory: bool = True,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.answer_seconds = answer_seconds
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        defaults = KEEP_FREED_MEMORY if keep_freed_memory else {}
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**defaults, **os.environ, **(environment or {})},
        )

    def send(self, do: str, **arguments: Any) -> None:
        """Request without waiting for the answer, so that several workers prepare in parallel."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() raises, with the reason

    def receive(self) -> Answer:
        """The answer to the oldest request that has none yet.

        Raises:
            WorkerError: the peer failed; the message is the peer's own.
        """
        assert self._process.stdout is not None
        # Nothing is buffered: an answer is one line, and no request follows before it is read.
        if not select.select([self._process.stdout], [], [], self.answer_seconds)[0]:
            self._process.kill()
            raise WorkerError(f"no answer within {self.answer_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"process ended with status {status}: {self._last_line_of_log()}")
        answer: Answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def ask(self, do: str, **arguments: Any) -> Answer:
        """`send` and `receive`."""
        self.send(do, **arguments)
        return self.receive()

    def wait_until_asleep(self, timeout: float = 1.0) -> bool:
        """Wait until no thread of the worker runs, in two checks one after the other.

        Returns:
            False if a thread still runs after `timeout` seconds.
        """
        tasks = Path(f"/proc/{self._process.pid}/task")
        if not tasks.exists():  # not Linux: spinning ends within a few ten milliseconds everywhere
            time.sleep(0.05)
            return True
        stop = time.perf_counter() + timeout
        quiet_checks = 0
        while quiet_checks < 2 and time.perf_counter() < stop:
            time.sleep(0.001)
            quiet_checks = 0 if _any_running(tasks) else quiet_checks + 1
        return quiet_checks == 2

    def cpu_seconds(self) -> float:
        """Processor time that the process has used; 0 on systems that do not report it."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process, which has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _last_line_of_log(self) -> str:
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


def in_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once per round, in every other round backwards.

    Clock speeds drift by a fifth within minutes. Peers that take turns share the drift, and none of
    them always follows the same other one.

    >>> list(in_turns(["a", "b"], 3))
    ['a', 'b', 'b', 'a', 'a', 'b']
    """
    for index in range(rounds):
        yield from names if index % 2 == 0 else reversed(names)


def measure_blocks(
    workers: Mapping[str, Worker], rounds: int, do: str, **arguments: Any
) -> dict[str, list[float]]:
    """Seconds of each block, by peer. The peers take turns, so that they share a drifting clock.

    Args:
        workers: by peer.
        rounds: blocks per peer.
        do, arguments: the request for one block; its answer has ``seconds``, a number or a list of
            numbers, whose median counts.
    """
    blocks: dict[str, list[float]] = {name: [] for name in workers}
    for name in in_turns(list(workers), rounds):
        seconds = workers[name].ask(do, **arguments)["seconds"]
        blocks[name].append(statistics.median(seconds) if isinstance(seconds, list) else seconds)
        workers[name].wait_until_asleep()
    return blocks


# ---------------------------------------------------------------- in the worker


def serve(create: Callable[[], object]) -> None:
    """Answer requests until standard input ends: they name methods of the object from ``create``.

    Whatever a method raises becomes the answer ``failed``; so does an error of ``create``.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    target: object | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            target = target if target is not None else create()
            answer = getattr(target, request.pop("do"))(**request)
        except Exception as error:  # of any kind: the error is the peer's result
            first_line = str(error).strip().partition("\n")[0]
            answer = {"failed": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def call_seconds(call: Callable[[], Any], seconds: float) -> list[float]:
    """Times of the calls that fill `seconds`, at least two, after one call that does not count."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def peak_megabytes() -> float | None:
    """The most memory that this process has held; None on systems that do not report it.

    Not `ru_maxrss`: after fork and exec that still includes the parent's memory.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def release_freed_memory() -> None:
    """Return freed memory to the system once, so that many large peers fit into memory together.

    Does nothing if the C library has no function for it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
