"""A GPU where something fails, tuning, and a whole model in a fresh process."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    assert_same_bits,
    floats,
)
from support.aten import ATEN, KERNELS
from support.gpu import (
    CUDA,
    layer,
    no_tuning,  # noqa: F401  (a fixture)
    on_gpu,
)
from torch import Tensor, nn

import torchquant
from torchquant import cuda

# A kernel that fails leaves its operator to ATen with a message: here that is a failure.
pytestmark = pytest.mark.filterwarnings("error:torchquant:RuntimeWarning")


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fresh tuners that measure, and the folder of their files."""
    from torchquant.triton.tuning import choose as tuning

    monkeypatch.setenv("TORCHQUANT_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_tuners", {})
    return tmp_path


# ---------------------------------------------------------------- errors


@on_gpu
@pytest.mark.filterwarnings("error")
def test_no_memory_for_the_result(fresh: None) -> None:
    """torch's error as it is, no message, and the path stays."""
    x = torch.zeros(1, 1, device=CUDA)
    KERNELS.activation(x, "relu")
    huge = x.expand(1 << 22, 1 << 22)
    with pytest.raises(torch.OutOfMemoryError):
        KERNELS.activation(huge, "relu")
    assert cuda.gpus()[0].left_to_aten == {}
    KERNELS.activation(x, "relu")


@on_gpu
def test_a_gpu_that_triton_does_not_serve(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, expected = layer()
    monkeypatch.setattr("torchquant.cuda.dispatch.LEAST_CAPABILITY", (99, 0))
    cuda.paths._dispatcher.set_path("auto")
    with pytest.warns(RuntimeWarning, match=r"ATen's kernels .* need compute capability 99\.0"):
        assert_same_bits(call(x).cpu(), expected)
    assert cuda.active_path() == "aten"
    assert cuda.available_paths() == ("aten",)


@on_gpu
def test_a_kernel_that_computes_wrong_numbers(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.triton.ops import affine

    def wrong(input: Tensor, *rest: Any) -> Any:
        return ATEN.quantize_per_token(input * 1.01, *rest)

    monkeypatch.setattr(affine, "quantize_per_token", wrong)
    x = floats(5, 64)
    with pytest.warns(RuntimeWarning, match="quantize_per_token gave other bits"):
        q = KERNELS.quantize_per_token(x.cuda())
    for a, b in zip(q, KERNELS.quantize_per_token(x), strict=True):
        assert_same_bits(a.cpu(), b)


# ---------------------------------------------------------------- tuning


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 1024])
def test_tuned(rows: int, tuners: Path) -> None:
    """Every candidate computes the right numbers (else a warning), and the choice is kept."""
    from torchquant.triton.tuning import choose as tuning

    with warnings.catch_warnings(), cuda.use_path("auto"):
        warnings.simplefilter("error")
        call, x, expected = layer(rows, 512, 1024, torch.bfloat16)
        assert_same_bits(call(x).cpu(), expected)
    (path,) = tuners.glob("*.json")
    choices = json.loads(path.read_text())["choices"]
    ((problem, choice),) = choices.items()
    assert problem.startswith(f"gemm {tuning.rounded_rows(rows)}x512x1024 int8 bfloat16")
    assert 0 < choice["microseconds"] < 1e5

    tuning._tuners.clear()  # as in a later process
    measured = []
    tuner = tuning.tuner(torch.device("cuda", 0))
    tuner.timer = measured.append  # type: ignore[assignment]
    assert_same_bits(call(x).cpu(), expected)
    assert measured == []


@on_gpu
def test_no_memory_for_measuring(tuners: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchquant.triton.gemm import tuning as gemm_tuning

    call, x, expected = layer(48, 256, 512)
    with monkeypatch.context() as patch:
        patch.setattr(gemm_tuning, "trial_of", lambda problem: torch.empty(1 << 50, device=CUDA))
        with pytest.warns(RuntimeWarning, match="out of GPU memory while measuring") as caught:
            assert_same_bits(call(x).cpu(), expected)
            assert_same_bits(call(x).cpu(), expected)
        assert len(caught) == 1
    assert not list(tuners.glob("*.json"))


@on_gpu
def test_measuring_leaves_no_memory_behind_and_no_random_numbers(tuners: Path) -> None:
    call, x, expected = layer(64, 1024, 1024)
    with cuda.use_path("aten"):  # cuBLAS keeps a workspace from its first call on
        call(x)
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    result = call(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * max(512, result.nbytes)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_same_bits(result.cpu(), expected)


# ---------------------------------------------------------------- info, a fresh process


@on_gpu
@pytest.mark.parametrize("path", ["auto", "aten"])
def test_info_names_the_gpu_and_the_path(path: str) -> None:
    code = "from torchquant.cli.main import app; app(prog_name='torchquant')"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHQUANT_CUDA_PATH": path},
        timeout=300,
        check=True,
    )
    data = json.loads(done.stdout)
    gpu = data["gpus"][0]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert re.fullmatch(r"\d+\.\d+", gpu["capability"])
    assert gpu["path"] == ("aten" if path == "aten" else cuda.active_path(0))
    assert data["cuda_version"] == torch.version.cuda


@on_gpu
def test_a_model_from_end_to_end() -> None:
    """quantize_, .to("cuda") and back, in one piece; test_cuda_modules.py takes it apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    torchquant.quantize_(model)
    x = floats(7, 128)
    with torch.inference_mode():
        expected = model(x)
        assert_same_bits(model.cuda()(x.cuda()).cpu(), expected)
        assert_same_bits(model.cpu()(x), expected)
