"""No step on images reads or writes a byte outside them.

The tests of the steps run once more, each in a process of its own, with images and parameters that
end at an unmapped page or begin behind one: one byte too far is a segmentation fault.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ahead import NewFolder, Processes, Run, Selection
from support.scripts import run_python

HERE = Path(__file__).parent
TESTS = (
    "test_image_steps.py::test_quantize_and_dequantize[contiguous-dtype0]",
    "test_image_steps.py::test_quantize_and_dequantize[channels_last-dtype1]",
    "test_image_steps.py::test_add_and_mul[add-none]",
    "test_image_steps.py::test_map_and_copy",
    "test_image_steps.py::test_max_pool[True]",
    "test_image_steps.py::test_adaptive_avg_pool[size1]",
    "test_image_steps.py::test_upsample_nearest[factors1]",
    "test_image_steps.py::test_flatten",
    "test_depthwise.py::test_bits[int8]",
    "test_depthwise.py::test_bits[few levels]",
    "test_depthwise.py::test_bits[float residual]",
    "test_conv_images.py::test_bits",
)


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    environment = dict(os.environ)

    def run(hole: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
            + [str(HERE / test) for test in TESTS],
            env={**environment, "TORCHQUANT_TEST_HOLE": hole},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run, tests.values("hole")


@pytest.mark.parametrize("hole", ["behind", pytest.param("before", marks=pytest.mark.slow)])
def test_memory(hole: str, request: pytest.FixtureRequest, processes: Processes) -> None:
    result = processes.result(request.module, hole)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_the_hole_is_there() -> None:
    """A read behind an image ends the process."""
    script = (
        "import ctypes, torch; from support.core import empty\n"
        "x = empty((1, 5, 3, 3)); ctypes.string_at(x.data_ptr(), 46)"
    )
    folder = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": folder, "TORCHQUANT_TEST_HOLE": "behind"}
    result = run_python(script, environment=environment)
    assert result.returncode == -11  # SIGSEGV
