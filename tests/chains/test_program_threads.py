"""Programs in several threads, under other numbers of threads, and after a fork."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, floats, threads
from support.programs import block
from support.thread_scripts import needs_fork, needs_linux, run_script

from torchquant.chains.program import Program

TESTS = str(Path(__file__).parents[1])


def test_two_threads_call_one_program_at_once() -> None:
    """Each call has memory of its own, whether it uses a team or not."""
    program = Program(block().steps)
    inputs = [floats(n, 3, 24, 24, seed=n) for n in (1, 2, 3, 5)]
    with threads(1):
        wanted = [program.run([x]) for x in inputs]
    errors: list[BaseException] = []
    until = time.monotonic() + 2.0

    def work(number: int) -> None:
        torch.set_num_threads(1 + number % 3)
        count = number
        try:
            while time.monotonic() < until and not errors:
                at = count % len(inputs)
                for got, want in zip(program.run([inputs[at]]), wanted[at], strict=True):
                    assert_same_bits(got, want)
                count += 1
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not errors


def test_number_of_threads_changes_between_calls() -> None:
    program = Program(block().steps)
    x = floats(3, 3, 24, 24)
    with threads(1):
        wanted = program.run([x])
    for i in range(40):
        with threads(1 + i % 5):
            for got, want in zip(program.run([x]), wanted, strict=True):
                assert_same_bits(got, want)


SETUP = """
    from support.programs import block
    from torchquant.chains.program import Program

    program = Program(block().steps)
    images = [torch.randn(n, 3, 32, 32, generator=generator) for n in (1, 3, 8)]
    torch.set_num_threads(1)
    results = [program.run([x]) for x in images]

    def different():
        return sum(
            not all(map(torch.equal, program.run([x]), wanted))
            for x, wanted in zip(images, results)
        )
"""
SCRIPTS = {
    "fork": """
        torch.set_num_threads(2)
        assert different() == 0
        for _ in range(5):
            assert in_child(different) == 0
            assert different() == 0
    """,
    "fork while another thread runs": """
        import threading
        torch.set_num_threads(2)
        assert different() == 0
        stop, wrong = threading.Event(), []
        def work():
            torch.set_num_threads(2)
            while not stop.is_set():
                wrong.append(different())
        def alone():
            import signal
            signal.alarm(60)  # instead of waiting for ever
            return different()
        others = [threading.Thread(target=work) for _ in range(2)]
        for other in others:
            other.start()
        for _ in range(15):
            assert in_child(alone) == 0
        stop.set()
        for other in others:
            other.join()
        assert not any(wrong)
    """,
    "other threads in a child": """
        torch.set_num_threads(2)
        assert different() == 0
        def work():
            torch.set_num_threads(3)
            return different()
        assert in_child(work) == 0
    """,
    "more threads than the runtime gives": """
        torch.set_num_threads(6)  # OMP_THREAD_LIMIT is 2
        for _ in range(20):
            assert different() == 0
    """,
    "inside a parallel region": """
        torch.set_num_threads(2)
        class Call(torch.autograd.Function):  # backward runs on a thread of its own
            @staticmethod
            def forward(ctx, x):
                return x
            @staticmethod
            def backward(ctx, grad):
                assert different() == 0
                return grad
        for _ in range(3):
            Call.apply(torch.ones(2, requires_grad=True)).sum().backward()
    """,
}
ENVIRONMENT = {"more threads than the runtime gives": {"OMP_THREAD_LIMIT": "2"}}


@needs_fork
@needs_linux
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    code = SETUP + SCRIPTS[name] + '\n    print("same")\n'
    dedented = "\n".join(line[4:] if line.startswith("    ") else line for line in code.split("\n"))
    environment = ENVIRONMENT.get(name, {})
    assert run_script(dedented, PYTHONPATH=path, **environment) == "same"
