"""No arguments crash an operator: tests/fuzz/fuzz_ops.py, which .ci/run runs for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ahead import NewFolder, Processes, Run, Selection

import torchquant.ops  # noqa: F401  (registers the operators)

FUZZ = Path(__file__).parents[1] / "fuzz" / "fuzz_ops.py"


CASES = {"torchquant": 6000, "torchquant_aten": 3000}


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = dict(os.environ)
    traces = {namespace: new_folder("fuzz") / "trace.txt" for namespace in CASES}

    def run(namespace: str) -> "subprocess.CompletedProcess[str]":
        result = subprocess.run(
            [
                *(sys.executable, FUZZ, "--namespace", namespace, "--seconds", "300"),
                *("--cases", str(CASES[namespace]), "--trace", traces[namespace]),
            ],
            env=environment,
            cwd=FUZZ.parent,
            capture_output=True,
            text=True,
            timeout=400,
        )
        if result.returncode != 0:
            result.stderr += "\n" + traces[namespace].read_text()
        return result

    return run, tests.values("namespace")


@pytest.mark.parametrize("namespace", CASES)
def test_any_arguments(
    namespace: str, request: pytest.FixtureRequest, processes: Processes
) -> None:
    """A fixed sequence of calls, long enough that some calls of every operator fit together."""
    cases, result = CASES[namespace], processes.result(request.module, namespace)
    assert result.returncode == 0, f"{result.returncode}\n{result.stderr}"
    assert result.stdout.startswith(f"fuzz_ops: {cases} calls of")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, operator = name.partition("::")
        if space == namespace:  # some calls get through, some do not
            assert f"{operator} computed" in result.stdout
            assert f"{operator} refused" in result.stdout
    print(result.stdout)
