"""No arguments crash an operator: tests/fuzz/fuzz_ops.py, which .ci/run runs for longer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchquant.ops  # noqa: F401  (registers the operators)

FUZZ = Path(__file__).parents[1] / "fuzz" / "fuzz_ops.py"


@pytest.mark.parametrize(("namespace", "cases"), [("torchquant", 6000), ("torchquant_aten", 3000)])
def test_any_arguments(tmp_path: Path, namespace: str, cases: int) -> None:
    """A fixed sequence of calls, long enough that some calls of every operator fit together."""
    trace = tmp_path / "trace.txt"
    result = subprocess.run(
        [
            *(sys.executable, FUZZ, "--namespace", namespace, "--cases", str(cases)),
            *("--seconds", "300", "--trace", trace),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, f"{result.returncode}\n{result.stderr}\n{trace.read_text()}"
    assert result.stdout.startswith(f"fuzz_ops: {cases} calls of")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, operator = name.partition("::")
        if space == namespace:  # some calls get through, some do not
            assert f"{operator} computed" in result.stdout
            assert f"{operator} refused" in result.stdout
    print(result.stdout)
