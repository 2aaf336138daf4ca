"""The same bits from every kind of thread and process, at once or in turn, and nothing hangs.

Scripts whose failure would be a hang or a crash run in a process of their own, under a time limit.
Each script starts with SETUP: a few layers, each with the output that it must always give.
"""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import Shape, assert_same_bits, floats, generator, integers, positive, threads
from torch import Tensor

from torchquant import cpu, ops
from torchquant.scheme import PerAxis

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses libgomp")


class Call(NamedTuple):
    """Something to compute, and what must come out: computed on one thread by the scalar path."""

    run: Callable[[], Tensor]
    expected: Tensor


def dynamic_call(shape: Shape, dtype: torch.dtype, activation: str, seed: int) -> Call:
    x = floats(shape.rows, shape.inputs, seed=seed, dtype=dtype)
    packed = ops.pack_weight(integers(shape.outputs, shape.inputs, seed=seed))
    scale, bias = positive(shape.outputs, seed=seed), floats(shape.outputs, seed=seed)
    zero = integers(shape.outputs, seed=seed).int() if seed % 3 == 0 else None

    def run() -> Tensor:
        return ops.linear_dynamic(
            x,
            packed,
            scale,
            zero,
            bias,
            out_features=shape.outputs,
            symmetric=seed % 2 == 0,
            activation=activation,
        )

    return expecting(run)


def integer_call(shape: Shape, seed: int) -> Call:
    x, weight = integers(shape.rows, shape.inputs, seed=seed), integers(shape.outputs, shape.inputs)
    packed = ops.pack_weight(weight)
    return expecting(lambda: ops.int8_mm(x, packed, shape.outputs))


def element_call(shape: Shape, seed: int) -> Call:
    x, scale = floats(shape.rows, shape.inputs, seed=seed), positive(shape.inputs, seed=seed)

    def run() -> Tensor:
        q = ops.quantize(x, scale, granularity=PerAxis(1))
        return ops.dequantize(q, scale, granularity=PerAxis(1))

    return expecting(run)


def expecting(run: Callable[[], Tensor]) -> Call:
    with threads(1), cpu.use_isa("scalar"):
        return Call(run, run())


def calls() -> list[Call]:
    """Small and large, so that threads meet in every way of sharing the work."""
    shapes = (
        Shape(1, 17, 33),
        Shape(1, 3000, 256),  # one row, the columns shared
        Shape(5, 1000, 300),
        Shape(40, 512, 384),
        Shape(300, 128, 96),  # rows shared
        Shape(1025, 64, 64),
        Shape(130, 600, 700),
    )
    made = []
    for seed, shape in enumerate(shapes):
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        made.append(dynamic_call(shape, dtype, ("none", "gelu", "silu")[seed % 3], seed))
        made.append(integer_call(shape, seed))
    made.append(element_call(Shape(300, 257, 900), 1))
    return made


CALLS = calls()


def check_in_turn(start: int = 0, step: int = 1) -> None:
    for i in range(len(CALLS)):
        call = CALLS[(start + i * step) % len(CALLS)]
        assert_same_bits(call.run(), call.expected)


# ---------------------------------------------------------------- threads of one process


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_number_of_threads(count: int) -> None:
    with threads(count):
        check_in_turn()


def test_number_of_threads_changes_between_calls() -> None:
    for i in range(3 * len(CALLS)):
        with threads(1 + i % 4):
            call = CALLS[i % len(CALLS)]
            assert_same_bits(call.run(), call.expected)


def soak(seconds: float, workers: int) -> int:
    """Many threads call at once, each with its own number of threads; some end and are replaced."""
    until, finished, errors = time.monotonic() + seconds, [0] * workers, []

    def work(number: int) -> None:
        picks = torch.randint(len(CALLS), (1 << 12,), generator=generator(number)).tolist()
        try:
            torch.set_num_threads(1 + number % 3)
            while time.monotonic() < until and not errors:
                call = CALLS[picks[finished[number] % len(picks)]]
                assert_same_bits(call.run(), call.expected)
                finished[number] += 1
                if finished[number] % 50 == 0:
                    young = threading.Thread(target=check_in_turn, args=(number, 3))
                    young.start()
                    young.join()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]
    assert all(finished)
    return sum(finished)


def test_many_threads_at_once() -> None:
    print(f"{soak(5.0, 6)} calls")


@pytest.mark.slow
def test_many_threads_at_once_for_long() -> None:
    print(f"{soak(180.0, 12)} calls")


def test_errors_in_many_threads() -> None:
    """A refused call leaves nothing behind that the next one stumbles over."""
    packed, wrong = ops.pack_weight(integers(40, 30)), integers(3, 31)

    def work() -> None:
        for _ in range(20):
            with pytest.raises(ValueError, match="int8_mm: packed was made for"):
                ops.int8_mm(wrong, packed, 40)
            check = CALLS[1]
            assert_same_bits(check.run(), check.expected)

    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not errors


# ---------------------------------------------------------------- processes of their own

SETUP = """
    import os, sys, threading
    import torch
    from torchquant import cpu, ops

    generator = torch.Generator().manual_seed(0)

    def make(rows, outputs, inputs):
        x = torch.randn(rows, inputs, generator=generator)
        w = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
        return x, ops.pack_weight(w), torch.full((outputs,), 0.01)

    made = [make(300, 200, 300), make(1, 3000, 256), make(40, 512, 384), make(2, 20, 30)]

    def layer(i):
        x, packed, scale = made[i]
        return ops.linear_dynamic(x, packed, scale, out_features=len(scale), activation="gelu")

    def wrong():
        return sum(not torch.equal(layer(i), expected[i]) for i in range(len(made)))

    torch.set_num_threads(1)
    expected = [layer(i) for i in range(len(made))]
    torch.set_num_threads(2)
    assert wrong() == 0  # threads are running from here on

    def in_child(work):
        child = os.fork()
        if child == 0:
            try:
                os._exit(work())
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(100)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_script(code: str, timeout: float = 120, **environment: str) -> str:
    script = textwrap.dedent(SETUP) + textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


FORKS = {
    "one_thread": """
        def work():
            torch.set_num_threads(1)
            return wrong()
        assert in_child(work) == 0
    """,
    "two_threads": """
        def work():
            torch.set_num_threads(2)
            return wrong()
        assert in_child(work) == 0
    """,
    "as_it_was": """
        assert in_child(wrong) == 0
        assert in_child(wrong) == 0
    """,
    "torch_s_own_operators": """
        x = torch.randn(500, 500)
        product, total = x @ x, torch.nn.functional.gelu(x).sum()
        def work():
            same = torch.equal(x @ x, product)
            return int(not same or not torch.allclose(torch.nn.functional.gelu(x).sum(), total))
        assert in_child(work) == 0
    """,
    "a_child_of_a_child": """
        assert in_child(lambda: wrong() + in_child(lambda: wrong() + in_child(wrong))) == 0
    """,
    "threads_in_the_child": """
        def work():
            failures = []
            pool = [threading.Thread(target=lambda: failures.append(wrong())) for _ in range(4)]
            for thread in pool: thread.start()
            for thread in pool: thread.join()
            return sum(failures) + len(pool) - len(failures)
        assert in_child(work) == 0
    """,
    "from_another_thread": """
        codes = []
        thread = threading.Thread(target=lambda: codes.append((wrong(), in_child(wrong))))
        thread.start()
        thread.join()
        assert codes == [(0, 0)]
    """,
    "many": """
        for _ in range(20):
            assert in_child(wrong) == 0
            assert wrong() == 0
    """,
    "before_any_call_of_a_thread": """
        codes = []
        thread = threading.Thread(target=lambda: codes.append(in_child(wrong)))
        thread.start()
        thread.join()
        assert codes == [0]
    """,
    "scalar": """
        with cpu.use_isa("scalar"):
            assert in_child(lambda: wrong() + (cpu.active_isa() != "scalar")) == 0
    """,
    "multiprocessing": """
        import multiprocessing
        def work(i):
            torch.set_num_threads(1 + i % 3)
            return wrong()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert sum(pool.map(work, range(12))) == 0
    """,
}


@needs_fork
@needs_linux
@pytest.mark.parametrize("code", FORKS.values(), ids=FORKS)
def test_fork(code: str) -> None:
    """A child may use as many threads as it likes, although its parent did (csrc/cpu/fork.cpp)."""
    after = """
        assert wrong() == 0
        assert torch.get_num_threads() == 2
        print("same")
    """
    assert run_script(textwrap.dedent(code) + textwrap.dedent(after)) == "same"


@needs_linux
def test_threads_come_back_after_a_fork() -> None:
    """The parent is as parallel as before."""
    code = """
        def running():
            return set(os.listdir("/proc/self/task"))

        for _ in range(3):
            before = running()
            assert in_child(lambda: 0) == 0
            assert wrong() == 0
            assert running() - before  # new ones; the old ones may take a moment to end
        print("parallel")
    """
    assert run_script(code) == "parallel"


DATASET = """
import torch
from torchquant import ops

generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(24, 300, generator=generator)
PACKED = ops.pack_weight(torch.randint(-128, 128, (2000, 300), generator=generator).to(torch.int8))
SCALE = torch.full((2000,), 0.01)

def outputs(x):
    return ops.linear_dynamic(x, PACKED, SCALE, out_features=2000, activation="silu")

class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        if self.count:
            torch.set_num_threads(self.count)
        return outputs(ROWS[i])
"""


@needs_fork
@pytest.mark.parametrize(
    ("method", "count"),
    [("fork", 0), ("fork", 2), ("spawn", 0), ("forkserver", 2)],
    ids=["fork", "fork_two_threads", "spawn", "forkserver_two_threads"],
)
def test_workers_of_a_data_loader(method: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "dataset.py").write_text(DATASET)
    (tmp_path / "main.py").write_text(
        textwrap.dedent(f"""
            import torch
            from dataset import ROWS, Rows, outputs

            if __name__ == "__main__":
                torch.set_num_threads(2)
                expected = outputs(ROWS)
                loader = torch.utils.data.DataLoader(
                    Rows({count}),
                    batch_size=4,
                    num_workers=2,
                    multiprocessing_context={method!r},
                    persistent_workers=True,
                    timeout=60,
                )
                for _ in range(2):
                    assert torch.equal(torch.cat(list(loader)), expected)
                    assert torch.equal(outputs(ROWS), expected)
                print("same")
        """)
    )
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "same", result.stderr


# ---------------------------------------------------------------- torch's other threads


def test_the_pool_between_operators() -> None:
    """torch.jit.fork runs calls side by side in torch's inter-op pool."""
    code = """
        import warnings
        warnings.simplefilter("ignore")

        many = torch.jit.CompilationUnit('''
            def one(x: Tensor, packed: Tensor, scale: Tensor, n: int):
                return torch.ops.torchquant.linear_dynamic(
                    x, packed, scale, None, None, n, True, "gelu", None)

            def many(x: Tensor, packed: Tensor, scale: Tensor, n: int, times: int):
                waiting = [torch.jit.fork(one, x, packed, scale, n) for _ in range(times)]
                return [torch.jit.wait(future) for future in waiting]
        ''').many
        assert torch.get_num_interop_threads() == 4
        for repetition in range(5):
            for i, (x, packed, scale) in enumerate(made):
                results = many(x, packed, scale, len(scale), 16)
                assert len(results) == 16
                assert all(torch.equal(result, expected[i]) for result in results)
        print("same")
    """
    assert run_script("torch.set_num_interop_threads(4)\n" + textwrap.dedent(code)) == "same"


@needs_linux
def test_inside_a_parallel_region() -> None:
    """Calls from all threads of a team at once, as from the body of somebody's parallel loop."""
    code = """
        import ctypes

        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
        gomp = ctypes.CDLL(libraries.pop())
        results, lock = [], threading.Lock()

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def body(_):
            nested = gomp.omp_in_parallel(), gomp.omp_get_thread_num()
            failures = sum(wrong() for _ in range(3))
            with lock:
                results.append((nested, failures))

        for team in (2, 4):
            results.clear()
            gomp.GOMP_parallel(body, None, ctypes.c_uint(team), ctypes.c_uint(0))
            assert sorted(results) == [((1, number), 0) for number in range(team)], results
        assert wrong() == 0
        print("same")
    """
    assert run_script(code) == "same"


def test_openmp_s_environment() -> None:
    code = """
        assert torch.get_num_threads() == 2
        assert wrong() == 0
        print("same")
    """
    for environment in (  # each seconds: a new process that imports torch
        {"OMP_NUM_THREADS": "3", "OMP_DYNAMIC": "true"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "passive", "OMP_MAX_ACTIVE_LEVELS": "3"},
    ):
        assert run_script(code, **environment) == "same", environment
