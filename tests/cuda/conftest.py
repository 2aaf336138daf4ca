"""Fixtures of several files here: ruff takes a fixture that a test file imports for unused."""

from support.dispatch import dispatcher, host
from support.gpu import fresh
from support.gpu_modules import no_waiting

__all__ = ["dispatcher", "fresh", "host", "no_waiting"]
