"""Fixtures and settings of all tests."""

import gc
import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from torchquant import cpu

# The tests are not a package (an __init__.py would make pytest import the source tree). The search
# path is how they find the folder support.
sys.path.insert(0, str(Path(__file__).parent))

from support.ahead import Processes, processes_of
from support.skips import SkipCounter

# torchvision is imported with a CPU build of torch, in this process and in those that tests start.
if find_spec("torchvision") is not None:
    importlib.import_module("support.site.sitecustomize")
    folder = str(Path(__file__).parent / "support" / "site")
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in search:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, search)])

# Without a GPU Triton's kernels run in its interpreter (support/triton.py). Triton reads this
# variable at its import, and torch.compile may import Triton before a test of the kernels does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Compiled graphs in Inductor's cache call our operators with the schemas of their time. A cache of
# its own for each build of the library keeps a changed schema from meeting old graphs.
library = Path(importlib.import_module("torchquant._C").__file__ or "").read_bytes()
digest = hashlib.sha256(library).hexdigest()[:16]
cache = Path(tempfile.gettempdir()) / f"torchquant-inductor-{digest}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

# The same examples on every run: a failure in CI is a failure here. No deadline: machines differ.
settings.register_profile("torchquant", derandomize=True, deadline=None)
settings.load_profile("torchquant")


def pytest_configure(config: pytest.Config) -> None:
    """Skipped tests are counted by reason; in CI a missing package is a failure."""
    config.pluginmanager.register(SkipCounter(strict=os.environ.get("CI") == "true"))


def pytest_collection_finish() -> None:
    """The tests and what they import stay to the end: the garbage collector passes them by."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Python's end frees them: libraries in C++ look whether it frees all that is theirs."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    """Long processes of later tests run beside the earlier tests (support/ahead.py)."""
    with processes_of(request.session, tmp_path_factory.mktemp) as found:
        yield found


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, active while the test runs; by name."""
    with cpu.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _groups_of_few_rows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Small tensors suffice to test layers that are computed together."""
    if "few_rows" not in request.keywords:
        monkeypatch.setattr("torchquant.nn.projections._MIN_ROWS", 0)


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """No test sees settings of the process that another test changed."""
    isa, threads = cpu.active_isa(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    # torch 2.11 keeps a hook of torch.export after an export that raised; torch.compile then fails.
    torch.nn.modules.module._global_buffer_registration_hooks.clear()
    assert cpu.active_isa() == isa, "the test left another instruction set active"
