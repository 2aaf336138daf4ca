"""Fixtures of several files here: ruff takes a fixture that a test file imports for unused."""

from support.projections import gradients_off, shared

__all__ = ["gradients_off", "shared"]
