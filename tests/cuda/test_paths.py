"""Layers and training over the kernels of a GPU: existing tests, in a process of their own.

The fallback runs all tests of `FILES`, except those with the marker ``cpu_only``. Triton runs the
tests with the marker ``triton_path``.
"""

import pytest
from support.paths import run_tests

FAKE_QUANTIZE = (
    "ops/test_fake_quantize_calls.py",
    "ops/test_fake_quantize_gradients.py",
    "ops/test_fake_quantize_values.py",
)
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


@pytest.mark.parametrize("files", FILES.values(), ids=FILES.keys())
def test_existing_tests_over_the_fallback(files: tuple[str, ...]) -> None:
    result = run_tests("aten", files)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_existing_tests_over_triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = run_tests("triton", FAKE_QUANTIZE, "triton_path")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
