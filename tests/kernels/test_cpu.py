"""torchquant.cpu: which instruction sets there are, which one runs, and how to choose another."""

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import (
    assert_same_bits,
    check_everywhere,
    floats,
    integers,
    positive,
    supported_isas,
    threads,
)
from support.scripts import run_python as in_process

from torchquant import cpu, ops
from torchquant._extension import load

_C = load()
ORDER = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "scalar")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WEIGHT = integers(200, 300)
PACKED, SCALE = ops.pack_weight(WEIGHT), positive(200)
X = floats(70, 300)


def layer(x: torch.Tensor = X) -> torch.Tensor:
    return ops.linear_dynamic(x, PACKED, SCALE, out_features=200, activation="gelu")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the caller's choice of an instruction set."""
    names = {k: v for k, v in os.environ.items() if k != cpu.ENVIRONMENT_VARIABLE}
    folder = Path(__file__).parent  # not the checkout, whose package may hold no library
    return in_process(code, environment={**names, **environment}, folder=folder)


# ---------------------------------------------------------------- which there are


@linux
def test_everything_this_cpu_supports_is_available():
    """By /proc/cpuinfo, not by our own cpuid code: what is missing would silently never run."""
    assert set(cpu.available_isas()) == supported_isas() & set(cpu.built_isas())


@linux
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other CPUs build the scalar path only")
def test_everything_is_built_on_x86():
    assert cpu.built_isas() == ORDER


def test_available_isas_are_ordered_best_first():
    available = cpu.available_isas()
    assert list(available) == [name for name in ORDER if name in available]
    assert available[-1] == "scalar"
    assert set(available) <= set(cpu.built_isas())


def test_every_available_isa_really_runs(isa):
    """As far as the library says; the next test asks the clock."""
    assert cpu.active_isa() == isa
    assert _C.active_isa() == isa
    result = layer()
    with cpu.use_isa("scalar"):
        assert_same_bits(result, layer())


def test_vector_kernels_outrun_the_scalar_one():
    """The bits are the same, so only time tells that another instruction set really ran."""
    x, weight = floats(256, 512), ops.pack_weight(integers(512, 512))
    scale = positive(512)

    def seconds() -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            ops.linear_dynamic(x, weight, scale, out_features=512)
            times.append(time.perf_counter() - start)
        return min(times)

    elapsed = {}
    with threads(1):
        for isa in cpu.available_isas():
            with cpu.use_isa(isa):
                elapsed[isa] = seconds()
    for isa in elapsed.keys() - {"scalar"}:
        assert elapsed[isa] < 0.75 * elapsed["scalar"], elapsed


@linux
def test_cpu_name_is_the_processors():
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert cpu.cpu_name()
    if names:
        assert " ".join(cpu.cpu_name().split()) == " ".join(names[0].split())


# ---------------------------------------------------------------- choosing


def test_the_best_one_is_active_in_a_fresh_process():
    result = run_python("from torchquant import cpu; print(cpu.active_isa())")
    assert result.stdout.strip() == cpu.available_isas()[0], result.stderr


def test_use_isa_nests_and_restores():
    before = cpu.active_isa()
    names = [*cpu.available_isas(), *reversed(cpu.available_isas())]
    with cpu.use_isa("scalar"):
        for name in names:
            with cpu.use_isa(name):
                assert cpu.active_isa() == name
            assert cpu.active_isa() == "scalar"
    assert cpu.active_isa() == before


def test_use_isa_restores_after_exceptions():
    before = cpu.active_isa()
    with pytest.raises(KeyError), cpu.use_isa("scalar"):
        raise KeyError
    assert cpu.active_isa() == before
    with (
        cpu.use_isa("scalar"),
        pytest.raises(ValueError, match="must be one of"),
        cpu.use_isa("sse2"),
    ):
        pytest.fail("the block must not run")
    assert cpu.active_isa() == before


def test_use_isa_as_decorator():
    @cpu.use_isa("scalar")
    def inside() -> str:
        return cpu.active_isa()

    before = cpu.active_isa()
    assert (inside(), inside(), cpu.active_isa()) == ("scalar", "scalar", before)


@pytest.mark.parametrize("name", ["sse2", "", "AVX2", "avx512", None, 2])
def test_unknown_names_raise_and_list_the_valid_ones(name):
    before = cpu.active_isa()
    valid = ", ".join(cpu.available_isas())
    message = f"use_isa: name must be one of {valid}, got {name!r} (unknown)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), cpu.use_isa(name):
        pytest.fail("the block must not run")
    assert cpu.active_isa() == before


def test_unsupported_names_raise(monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(cpu, "built_isas", lambda: ORDER)
    message = "use_isa: name must be one of scalar, got 'avx2' (this CPU does not support it)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), cpu.use_isa("avx2"):
        pytest.fail("the block must not run")


def test_the_library_itself_refuses_unknown_names():
    before = cpu.active_isa()
    with pytest.raises(ValueError, match=r"^unknown instruction set: sse2$"):
        _C.set_active_isa("sse2")
    assert cpu.active_isa() == before


@pytest.mark.parametrize("name", cpu.available_isas())
def test_environment_variable_chooses(name):
    code = "from torchquant import cpu; print(cpu.active_isa())"
    result = run_python(code, TORCHQUANT_ISA=name)
    assert result.stdout.strip() == name, result.stderr


def test_an_empty_environment_variable_is_none():
    code = "from torchquant import cpu; print(cpu.active_isa())"
    assert run_python(code, TORCHQUANT_ISA="").stdout.strip() == cpu.available_isas()[0]


def test_environment_variable_with_an_unknown_name():
    result = run_python("import torchquant", TORCHQUANT_ISA="sse9")
    valid = ", ".join(cpu.available_isas())
    message = (
        "ValueError: the environment variable TORCHQUANT_ISA must be one of "
        f"{valid}, got 'sse9' (unknown)"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == message


def test_environment_variable_and_use_isa():
    code = """
        from torchquant import cpu
        best = cpu.available_isas()[0]
        with cpu.use_isa(best):
            assert cpu.active_isa() == best
        print(cpu.active_isa())
    """
    assert run_python(code, TORCHQUANT_ISA="scalar").stdout.strip() == "scalar"


# ---------------------------------------------------------------- threads and processes


def test_number_of_threads_does_not_matter():
    with threads(1), cpu.use_isa("scalar"):
        expected = layer()
    check_everywhere(layer, expected, (1, 2, 4))


@contextmanager
def changing_isas() -> Iterator[None]:
    """Another thread switches through all instruction sets meanwhile."""
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for name in cpu.available_isas():
                with cpu.use_isa(name):
                    time.sleep(0.0005)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("changing", [False, True], ids=["one_isa", "changing_isas"])
def test_calls_from_several_python_threads(changing):
    """Each thread has its own scratch memory; a call keeps the instruction set it began with."""
    inputs = [floats(rows, 300, seed=rows) for rows in (1, 3, 17, 40, 70, 100)]
    q = integers(33, 300)
    expected = [layer(x) for x in inputs] + [ops.int8_mm(q, PACKED, 200)]

    def work(repetition: int) -> None:
        for i in range(len(inputs)):
            at = (i + repetition) % len(inputs)
            assert_same_bits(layer(inputs[at]), expected[at])
        assert_same_bits(ops.int8_mm(q, PACKED, 200), expected[-1])

    def many() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(24)))

    if not changing:
        many()
        return
    with changing_isas():
        many()


def test_a_thread_that_ends_leaves_nothing_behind():
    """Scratch memory belongs to a thread and goes with it."""
    expected = layer()
    for _ in range(20):
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(layer()))  # noqa: B023
        thread.start()
        thread.join()
        assert_same_bits(results[0], expected)


FORK = """
    import os, sys
    import torch
    from torchquant import cpu, ops

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=generator)
    w = torch.randint(-128, 128, (200, 300), generator=generator).to(torch.int8)
    packed, scale = ops.pack_weight(w), torch.full((200,), 0.01)

    def layer():
        return ops.linear_dynamic(x, packed, scale, out_features=200, activation="gelu")

    def everywhere():
        results = []
        for name in cpu.available_isas():
            with cpu.use_isa(name):
                results.append(layer())
        return results

    expected = everywhere()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    """A child inherits the choice, the scratch memory and the permission for AMX tiles.

    One thread in the child: OpenMP's threads do not survive a fork, torch's own operators need the
    same (DataLoader's workers do it by themselves).
    """
    code = textwrap.dedent(FORK) + textwrap.dedent("""
        with cpu.use_isa("scalar"):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                same = cpu.active_isa() == "scalar"
                same &= all(torch.equal(a, b) for a, b in zip(everywhere(), expected))
                os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert all(torch.equal(a, b) for a, b in zip(everywhere(), expected))
        print("same")
    """)
    result = run_python(code)
    assert result.stdout.strip() == "same", result.stderr


def test_in_workers_of_a_data_loader():
    code = textwrap.dedent(FORK) + textwrap.dedent("""
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return len(x)

            def __getitem__(self, i):
                return ops.linear_dynamic(x[i], packed, scale, out_features=200, activation="gelu")

        loader = torch.utils.data.DataLoader(Rows(), batch_size=16, num_workers=2)
        assert torch.equal(torch.cat(list(loader)), expected[0])
        print("same")
    """)
    result = run_python(code)
    assert result.stdout.strip() == "same", result.stderr
