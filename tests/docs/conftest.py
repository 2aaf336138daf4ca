"""Fixtures of several files here."""

import pytest
from support.demo import run_small_demo


@pytest.fixture(scope="session")
def small_demo():
    """The demo's result on few images, and its steps: run once, because it takes seconds."""
    return run_small_demo()
