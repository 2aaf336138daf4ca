"""A process that imports torch once and runs every script that it is sent in a fork of itself.

`support/scripts.py` starts it. A fork begins as a fresh process does after ``import torch``: this
process calls no function of torch, so that no thread of OpenMP runs and nothing else is imported.
"""

import contextlib
import json
import os
import select
import socket
import sys
import warnings

import torch  # noqa: F401  (the second that each script saves)


def next_script(listening: socket.socket) -> dict:
    """Wait for scripts; return in a fork only, with the script that it is to run.

    The answers to a request are the number of the process and, when it has ended, its exit code.
    This process ends with its standard input.
    """
    stdin = sys.stdin.fileno()
    running: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor of the process
    poll = select.poll()
    poll.register(stdin)
    poll.register(listening, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == stdin:
                os._exit(0)
            if descriptor != listening.fileno():
                number, client = running.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
                _answer(client, code)
                client.close()
                continue
            client, _ = listening.accept()
            with client.makefile() as lines:
                request = json.loads(lines.readline())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy has threads; they survive a fork
                number = os.fork()
            if number == 0:
                for end in running:
                    os.close(end)
                for connection in (listening, client, *(other for _, other in running.values())):
                    connection.close()
                return request
            _answer(client, number)
            descriptor = os.pidfd_open(number)
            running[descriptor] = number, client
            poll.register(descriptor, select.POLLIN)


def _answer(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits any more: the time limit is over
        client.sendall(f"{number}\n".encode())


def become(request: dict) -> None:
    """Take over the environment, the folder and the streams that a script is to have."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["-c", *request["arguments"]]
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = ["", *(path for path in paths if path and path not in sys.path)]
    if request["warnings"]:
        warnings.simplefilter(request["warnings"])


if __name__ == "__main__":
    request = next_script(socket.socket(fileno=int(sys.argv[1])))
    become(request)
    # Here and not in a function: the script's names are those of the module __main__.
    exec(compile(request["code"], "<string>", "exec"))
