"""A dispatcher whose host pretends to have GPUs, for tests."""

import contextlib
import warnings

import pytest
import torch

from torchquant.cuda.dispatch import PROBE, Dispatcher
from torchquant.cuda.host import (
    Device,
)

NAMES = ("linear_dynamic", "positive", PROBE)


class OnDevice:
    """Replaces a tensor: has only what the dispatcher uses."""

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index


class Aten:
    """Replaces an operator of the fallback; counts its calls."""

    def __init__(self, name):
        self._schema = getattr(torch.ops.torchquant, name).default._schema
        self.calls, self.error = 0, None

    def __call__(self, *arguments):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return "aten"


class Host:
    """Made-up devices, kernels and faults."""

    def __init__(self, capability=(9, 0), count=2):
        self.capabilities = [capability] * count
        self.no_triton, self.is_capturing, self.import_error = None, False, None
        self.wrong, self.check_error = {}, {}
        self.checks, self.error, self.result = [], None, "triton"

    def device(self, index):
        return Device(index, f"Made-up {index}", self.capabilities[index], 80 << 30)

    def missing(self):
        return self.no_triton

    def kernel(self, name):
        if self.import_error is not None:
            raise self.import_error
        return self.run

    def run(self, *arguments):
        if self.error is not None:
            raise self.error
        return self.result

    def capturing(self):
        return self.is_capturing

    def aside(self, index):
        return contextlib.nullcontext()

    def check(self, name, kernel, aten, index):
        self.checks.append((name, index))
        if name in self.check_error:
            raise self.check_error[name]
        return self.wrong.get(name)


class FakeDispatcher(Dispatcher):
    """Over :class:`Host` and :class:`Aten`; never registered."""

    def __init__(self, host, **settings):
        super().__init__(host, operators=NAMES, **settings)
        self.fallbacks = {name: Aten(name) for name in NAMES}
        self.entries = {name: self._entry(name) for name in NAMES}

    def _aten(self, name):
        return self.fallbacks[name]

    def call(self, name="positive", index=0, *rest):
        return self.entries[name](OnDevice(index), *rest)


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def dispatcher(host):
    return FakeDispatcher(host)


@pytest.fixture(autouse=True)
def every_warning_is_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
