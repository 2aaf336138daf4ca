"""Fixtures and settings of all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from torchquant import cpu

# The tests are no package (an __init__.py would make pytest import the source tree): this is how
# they find support.
sys.path.insert(0, str(Path(__file__).parent))

# Without a GPU Triton's kernels run in its interpreter (support/triton.py). Triton reads this where
# it is imported, which torch.compile may do before a test of the kernels does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every run: a failure in CI is a failure here. No deadline: machines differ.
settings.register_profile("torchquant", derandomize=True, deadline=None)
settings.load_profile("torchquant")


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, active while the test runs; by name."""
    with cpu.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """What a test changes for the whole process does not reach the next one."""
    isa, threads = cpu.active_isa(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert cpu.active_isa() == isa, "the test left another instruction set active"
