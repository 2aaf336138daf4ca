"""Python code in a process of its own (tests/support/scripts.py): forked, and fresh."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.scripts import CAN_FORK, run_python

needs_fork = pytest.mark.skipif(not CAN_FORK, reason="no fork on this system")
BOTH = pytest.mark.parametrize(
    "fresh", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "fresh"]
)


@BOTH
def test_streams_exit_code_arguments_environment_and_folder(fresh: bool, tmp_path: Path) -> None:
    code = """
        import os, sys
        def name(x):
            return sys.modules["__main__"].name is name
        print(sys.argv, os.environ["COLOUR"], os.getcwd(), name(1), __name__)
        print("\\u00e4", sys.stdin.read() == "", file=sys.stderr)
        import beside
        sys.exit(7)
    """
    (tmp_path / "beside.py").write_text("import atexit; atexit.register(print, 'at the end')")
    environment = {**os.environ, "COLOUR": "red"}
    done = run_python(code, "a", "-b", environment=environment, folder=tmp_path, fresh=fresh)
    assert done.returncode == 7
    assert done.stdout == f"['-c', 'a', '-b'] red {tmp_path} True __main__\nat the end\n"
    assert done.stderr == "\u00e4 True\n"
    assert "COLOUR" not in os.environ


@BOTH
def test_failures(fresh: bool) -> None:
    done = run_python("import torchquant\nraise KeyError('missing')", fresh=fresh)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'missing'"
    killed = run_python("import os; os.kill(os.getpid(), 11)", fresh=fresh)
    assert killed.returncode == -signal.SIGSEGV
    warned = run_python("import warnings; warnings.warn('careful')", warnings="error", fresh=fresh)
    assert warned.returncode == 1
    assert warned.stderr.splitlines()[-1] == "UserWarning: careful"


@BOTH
def test_the_time_limit_ends_the_process(fresh: bool, tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "number")!r}).write_text(str(os.getpid()))
        time.sleep(60)
    """
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(code, timeout=5 if fresh else 1, fresh=fresh)
    number = int((tmp_path / "number").read_text())
    assert run_python("pass").returncode == 0, "the next one runs"
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(number, 0)  # nothing but the question whether it is there
            time.sleep(0.01)


@needs_fork
def test_a_fork_begins_with_torch_and_nothing_else() -> None:
    """No module of ours or of another library, and no thread that OpenMP started."""
    code = """
        import sys
        assert "torch" in sys.modules
        found = {name.partition(".")[0] for name in sys.modules}
        assert not found & {"torchquant", "pytest", "triton", "transformers", "torchvision"}, found
        assert "torch._dynamo" not in sys.modules
        libraries = [line.split()[-1] for line in open("/proc/self/maps") if "/" in line]
        assert not [name for name in libraries if "torchquant" in name]
        print("fresh")
    """
    for _ in range(2):
        done = run_python(code + "\n        import torchquant, torch._dynamo\n")
        assert done.stdout == "fresh\n", done.stderr


@needs_fork
def test_several_at_once() -> None:
    code = "import sys, time; time.sleep(float(sys.argv[1])); print(sys.argv[1]); sys.exit(3)"
    times = ["0.4", "0.1", "0.3", "0.2"]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda seconds: run_python(code, seconds), times))
    assert [(one.stdout.strip(), one.returncode) for one in done] == [(t, 3) for t in times]
