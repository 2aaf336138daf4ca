"""The same bits in torch's inter-op pool, in parallel regions and with OpenMP's settings."""

import textwrap
from concurrent.futures import ThreadPoolExecutor

from support.thread_scripts import needs_linux, run_script


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
    environments = (  # each takes seconds: a new process that imports torch
        {"OMP_NUM_THREADS": "3", "OMP_DYNAMIC": "true"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "passive", "OMP_MAX_ACTIVE_LEVELS": "3"},
    )
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda environment: run_script(code, **environment), environments)
        assert list(outputs) == ["same"] * 3
