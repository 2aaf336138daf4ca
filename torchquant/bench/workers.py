"""Every peer in a process of its own, which sleeps while another one is measured.

onnxruntime's idle threads spin for a while after a call, and so do the OpenMP threads of torch; in
one process with, or just before, another peer they take its cores. So the parent starts one worker
per peer, asks one at a time to measure a block, and goes on only when all threads of that worker
are asleep. No wait policy is set (OMP_WAIT_POLICY, GOMP_SPINCOUNT, allow_spinning): every library
runs with the defaults that its users get, which helps short calls.

The protocol is one JSON object per line, over the worker's standard input and output:

    {"do": "load", "n": 384, "k": 384}      -> {}
    {"do": "input", "m": 16}                -> {"error": 0.008, "seconds": {"run": 2e-5, ...}}
    {"do": "block", "seconds": 0.05}        -> {"seconds": {"run": 1e-5, "io_binding": 8e-6}}
    {"do": "about"}                         -> {"torch": "2.13.0", ...}

and any answer may be `{"failed": "why"}` instead.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torchquant.bench.timing import seconds_per_call

if TYPE_CHECKING:
    import torch

    from torchquant.bench.peers.base import LinearPeer

Answer = dict[str, Any]
# glibc gives large blocks back to the system when they are freed and takes new pages for the next
# ones. On a virtual machine the first touch of a page may have to wait for the host too: a product
# with 45 MB of output was seen to take 21 ms on kept pages and 25 to 91 ms on new ones. Every peer
# keeps its freed memory. Other systems ignore these settings.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
CHECKED_ROWS = 4
ANSWER_SECONDS = 300.0  # a peer that takes longer has hung
SLOWER_WAY = 1.3  # a way of calling that is so many times slower than the best is dropped


class WorkerError(RuntimeError):
    """A peer that cannot run: its library is missing, refused the layer, or the process ended."""


class Worker:
    """The parent's handle on one peer's process."""

    def __init__(
        self, suite: str, peer: str, threads: int, environment: dict[str, str] | None = None
    ) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchquant.bench.workers", suite, peer, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=KEEP_FREED_MEMORY | os.environ | (environment or {}),
        )

    def send(self, **request: Any) -> None:
        """Ask without waiting for the answer, so that several workers can prepare at once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() tells why

    def receive(self) -> Answer:
        """The answer to the oldest request that has none yet.

        Raises:
            WorkerError: the peer failed; the message holds its own words.
        """
        assert self._process.stdout is not None
        # Nothing is buffered: an answer is one line, and no request follows before it is read.
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            self._process.kill()
            raise WorkerError(f"no answer within {ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"process ended with status {status}: {self._last_words()}")
        answer: Answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def ask(self, **request: Any) -> Answer:
        """`send` and `receive`."""
        self.send(**request)
        return self.receive()

    def wait_until_asleep(self, timeout: float = 1.0) -> bool:
        """Wait until no thread of the worker runs, two looks in a row.

        Returns:
            False if one still does after `timeout` seconds.
        """
        tasks = Path(f"/proc/{self._process.pid}/task")
        if not tasks.exists():  # not Linux: spinning ends within some ten milliseconds everywhere
            time.sleep(0.05)
            return True
        stop = time.perf_counter() + timeout
        quiet_looks = 0
        while quiet_looks < 2 and time.perf_counter() < stop:
            time.sleep(0.001)
            quiet_looks = 0 if _any_running(tasks) else quiet_looks + 1
        return quiet_looks == 2

    def cpu_seconds(self) -> float:
        """Processor time that the process has used; 0 where it cannot be told."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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


class _Server:
    """The worker's side: one peer, one layer, one input at a time."""

    def __init__(self, peer: LinearPeer) -> None:
        self.peer = peer

    def load(self, n: int, k: int) -> Answer:
        import torch

        generator = torch.Generator().manual_seed(n * 100_003 + k)
        self.weight = torch.randn(n, k, generator=generator) / k**0.5
        self.bias = torch.randn(n, generator=generator)
        self.peer.load(self.weight, self.bias)
        return {}

    def input(self, m: int) -> Answer:
        import torch

        x = torch.randn(m, self.weight.shape[1], generator=torch.Generator().manual_seed(m))
        with torch.inference_mode():
            self.calls = self.peer.calls(x)
            error = max(self._error(x, call()) for call in self.calls.values())
            seconds = {name: _seconds_once(call) for name, call in self.calls.items()}
        return {"error": error, "seconds": seconds}

    def block(self, seconds: float) -> Answer:
        import torch

        with torch.inference_mode():
            found = {name: seconds_per_call(call, seconds) for name, call in self.calls.items()}
        limit = SLOWER_WAY * min(found.values())
        self.calls = {name: call for name, call in self.calls.items() if found[name] <= limit}
        return {"seconds": found}

    def about(self) -> Answer:
        return self.peer.about()

    def _error(self, x: torch.Tensor, result: Any) -> float:
        """Relative error of the first rows against the float layer.

        No peer may be fast by computing something else.
        """
        import torch

        if not isinstance(result, torch.Tensor):
            result = torch.as_tensor(result.numpy() if hasattr(result, "numpy") else result)
        if result.shape != (len(x), len(self.weight)):
            raise ValueError(
                f"the result must be {[len(x), len(self.weight)]}, got {list(result.shape)}"
            )
        if result.is_quantized:
            result = result.dequantize()
        expected = torch.nn.functional.linear(x[:CHECKED_ROWS], self.weight, self.bias)
        return float((result[:CHECKED_ROWS].float() - expected).norm() / expected.norm())


def _seconds_once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def serve(suite: str, peer_name: str, threads: int) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not talk into the protocol
    server: _Server | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if server is None:
                import torch

                from torchquant.bench.peers import make_linear_peer

                torch.set_num_threads(threads)
                server = _Server(make_linear_peer(suite, peer_name, threads))
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # whatever a peer raises is that peer's result
            answer = {
                "failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
