"""The command line: ``torchquant demo``, ``torchquant info``, ``torchquant bench``."""

from torchquant.cli.main import app  # noqa: F401  (the entry point)
