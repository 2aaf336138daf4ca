"""Python code in a process of its own: `run_python`.

Most of such a process's time is the import of torch. Where the system can, the code runs in a fork
of a process that has imported torch and nothing else (`support/script_server.py`). Code for which
the import of torch itself matters, or whose environment torch reads, needs a fresh process:
``fresh=True``.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SERVER = Path(__file__).parent / "script_server.py"
CAN_FORK = hasattr(os, "pidfd_open") and hasattr(os, "fork")


def run_python(
    code: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    warnings: str = "",
    timeout: float = 120,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The ended process of ``code`` with these command line arguments.

    `warnings` is what happens at every warning, as for ``-W``.
    """
    code = textwrap.dedent(code)
    environment = dict(os.environ if environment is None else environment)
    if fresh or not CAN_FORK:
        flags = ["-W", warnings] if warnings else []
        return subprocess.run(
            [sys.executable, *flags, "-c", code, *arguments],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with tempfile.TemporaryDirectory() as streams:
        out, err = (Path(streams) / name for name in ("stdout", "stderr"))
        out.touch()
        err.touch()
        request = {
            "code": code,
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder or Path.cwd()),
            "warnings": warnings,
            "stdout": str(out),
            "stderr": str(err),
        }
        status = _run(request, timeout)
        return subprocess.CompletedProcess([code], status, out.read_text(), err.read_text())


def _run(request: dict[str, object], timeout: float) -> int:
    """The exit code of a request's process; after `timeout` seconds it is killed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(_address())
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as lines:
            number = int(lines.readline())
            connection.settimeout(timeout)
            try:
                return int(lines.readline())
            except TimeoutError:
                os.kill(number, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(request["code"]), timeout) from None


@cache
def _address() -> str:
    """Where the server listens; it starts at the first call and ends with this process."""
    folder = tempfile.TemporaryDirectory()
    address = os.path.join(folder.name, "scripts")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        descriptor = listening.fileno()
        server = subprocess.Popen(
            [sys.executable, str(SERVER), str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:  # a process that we forked holds the stream open
            server.kill()
        folder.cleanup()

    atexit.register(end)
    return address
