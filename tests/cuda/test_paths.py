"""Layers and training over the kernels of a GPU: existing tests, in a process of their own.

The fallback runs all tests of `FILES`, except those with the marker ``cpu_only``. Triton runs the
tests with the marker ``triton_path``.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from support.ahead import NewFolder, Processes, Run, Selection
from support.paths import run_tests

FAKE_QUANTIZE = (
    "ops/test_fake_quantize_calls.py",
    "ops/test_fake_quantize_gradients.py",
    "ops/test_fake_quantize_values.py",
)
TRITON = "Triton"
FILES = {
    "exactness": (
        "ops/test_affine_exactness.py",
        "ops/test_linear_batches.py",
        "ops/test_linear_exactness.py",
        "ops/test_linear_sums.py",
    ),
    "fake quantization": (
        *FAKE_QUANTIZE,
        "training/test_observed_quantizer.py",
        "training/test_lsq.py",
        "training/test_learned_errors.py",
        "training/test_learned_steps.py",
        "training/test_pact.py",
    ),
    "quantization aware training": (
        "ops/test_qat_backward.py",
        "ops/test_qat_linear.py",
        "ops/test_qat_quantize.py",
        "nn/test_qat_linear.py",
        "nn/test_qat_linear_state.py",
        "nn/test_qat_linear_training.py",
        "convert/test_convert.py",
        "convert/test_first_and_last_layer.py",
        "convert/test_prepare_qat.py",
        "convert/test_qat_relu.py",
        "convert/test_qat_stages.py",
    ),
    "layers": (
        "nn/test_nn_linear.py",
        "nn/test_nn_linear_arguments.py",
        "nn/test_nn_linear_gradients.py",
        "convert/test_quantize.py",
        "convert/test_quantize_arguments.py",
        "convert/test_quantize_skipped.py",
        "convert/test_torch_transformers.py",
        "convert/test_fuse.py",
        "convert/test_rejected_fusions.py",
        "graph/test_recognized_activations.py",
    ),
}


# What runs, by the name of the test.
RUNS: dict[str, tuple[str, tuple[str, ...], str]] = {
    **{name: ("aten", files, "") for name, files in FILES.items()},
    TRITON: ("triton", FAKE_QUANTIZE, "triton_path"),
}


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[str]]:
    names = tests.values("name")
    if tests.has(test_existing_tests_over_triton):
        names.append(TRITON)
    environment = dict(os.environ)
    return lambda name: run_tests(*RUNS[name], environment=environment), names


@pytest.fixture(scope="module")
def result_of(request: pytest.FixtureRequest, processes: Processes) -> Callable[[str], Any]:
    """The ended process of a run."""
    return lambda key: processes.result(request.module, key)


@pytest.mark.parametrize("name", FILES)
def test_existing_tests_over_the_fallback(name: str, result_of: Callable[[str], Any]) -> None:
    result = result_of(name)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_existing_tests_over_triton(result_of: Callable[[str], Any]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = result_of(TRITON)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
