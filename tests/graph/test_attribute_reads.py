"""The reads of an attribute in bytecode, with each version of Python that this machine has."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from torchquant.graph import attribute_reads as tested
from torchquant.graph.attribute_reads import attribute_reads

# Source of a method with the arguments self, x -> (path, values are read, it is changed).
CASES: dict[str, set[tuple[str, bool, bool]]] = {
    "return linear(x, self.qkv.weight, self.qkv.bias)": {("qkv", True, False)},
    "return linear(x, self.qkv.weight, None)": {("qkv", True, False)},
    "return linear(input=x, weight=self.qkv.weight)": {("qkv", True, False)},
    "return x @ self.mlp.fc.weight.T": {("mlp.fc", True, False)},
    "return self.fc.weight": {("fc", True, False)},
    "return cat([self.a.weight.t(), self.b.weight], dim=0)": {
        ("a", True, False),
        ("b", True, False),
    },
    "w = self.fc.weight\n    return x @ w": {("fc", True, False)},
    "layer = self.fc\n    return layer.weight @ x": {("fc", True, False)},
    "return self.layers[0].weight.sum()": {("layers.[]", True, False)},
    "return self.layers[x].weight @ x": {("layers.[]", True, False)},
    "return [layer.weight for layer in self.layers]": {("layers.[]", True, False)},
    "return (lambda y: y @ self.fc.weight)(x)": {("fc", True, False)},
    "return getattr(self.fc, 'weight') * x": {("fc", True, False)},
    "for a, b in zip(self.a, self.b): x = a.weight @ x + b(x)\n    return x": {
        ("a.[]", True, False),
        ("b.[]", True, False),
    },
    "return x.to(self.wo.weight.dtype)": {("wo", False, False)},
    "return x.to(device=self.wo.weight.device)": {("wo", False, False)},
    "return x.new_zeros(self.fc.weight.shape), self.fc.weight.size(0)": {("fc", False, False)},
    "w = self.fc.weight\n    d = w.dtype\n    return x.to(d)": {("fc", False, False)},
    "return isinstance(self.wo.weight, Tensor) and x.dtype != self.wo.weight.dtype": {
        ("wo", False, False)
    },
    "return x if self.fc.weight is None else self.fc(x)": {("fc", False, False)},
    "for layer in self.layers: x = x.to(layer.weight.dtype)\n    return x": {
        ("layers.[]", False, False)
    },
    "for i, b in enumerate(self.blocks): b.out.weight.div_(2)": {("blocks.[].out", True, True)},
    "self.fc.weight = x": {("fc", True, True)},
    "self.fc.weight.data = x": {("fc", True, True)},
    "self.fc.weight *= 2": {("fc", True, True)},
    "init.normal_(self.fc.weight)": {("fc", True, True)},
    "self.fc.weight.data.copy_(x)": {("fc", True, True)},
    "return self.fc(x), x.weight, other.weight": set(),
    "return self.fc.bias, self.weights": set(),
}


def found(source: str, reads: Callable[..., Any] = attribute_reads) -> set[tuple[str, bool, bool]]:
    """For each path that is read, what is done with it at most."""
    names: dict[str, Any] = {}
    exec(f"def method(self, x):\n    {source}", names)
    most: dict[str, tuple[bool, bool]] = {}
    for read in reads(names["method"].__code__, "weight"):
        path = ".".join(read.path)
        most[path] = max(most.get(path, (False, False)), (read.values, read.changes))
    return {(path, *use) for path, use in most.items()}


@pytest.mark.parametrize(("source", "wanted"), CASES.items(), ids=CASES)
def test_this_python(source: str, wanted: set[tuple[str, bool, bool]]) -> None:
    assert found(source) == wanted


def test_the_file_needs_no_package() -> None:
    """So that it can be tested with a Python that lacks torch."""
    names = runpy.run_path(tested.__file__, run_name="alone")
    assert found("return self.fc.weight", names["attribute_reads"]) == {("fc", True, False)}


@pytest.mark.parametrize("minor", range(10, 15))
def test_other_pythons(minor: int) -> None:
    """Runs the cases with another Python, if there is one; without one there is nothing to do."""
    python = shutil.which(f"python3.{minor}")
    version = [python, "-c", "import sys; print(sys.version_info[:2])"]
    if python is None or subprocess.run(version, capture_output=True).returncode:
        return
    script = (
        "import runpy, sys\n"
        f"names = runpy.run_path({tested.__file__!r}, run_name='alone')\n"
        f"cases = {CASES!r}\n"
        "for source, wanted in cases.items():\n"
        "    method = {}\n"
        "    exec('def method(self, x):\\n    ' + source, method)\n"
        "    most = {}\n"
        "    for read in names['attribute_reads'](method['method'].__code__, 'weight'):\n"
        "        path = '.'.join(read.path)\n"
        "        use = (read.values, read.changes)\n"
        "        most[path] = max(most.get(path, (False, False)), use)\n"
        "    found = {(path, *use) for path, use in most.items()}\n"
        "    assert found == wanted, (source, found)\n"
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"{sys.version}: {done.stderr}"
