"""What a function does with modules and results, with each version of Python on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.flow_cases import CASES, summary

import torchquant.graph.flow as tested
from torchquant.graph.flow import flow_of

GRAPH = Path(tested.__file__).parent
SUPPORT = Path(__file__).resolve().parents[1] / "support"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


@pytest.mark.parametrize("source", CASES)
def test_the_cases(source: str) -> None:
    assert summary(source) == CASES[source]


def test_a_comprehension() -> None:
    assert "layers.each(x)" in summary("return [layer(x) for layer in self.layers]")


def test_inner_functions_see_variables_and_may_get_anything() -> None:
    found = summary("y = self.conv(x)\nreturn run(lambda z: self.norm(y) + self.fc(z))")
    assert {"conv(x)", "norm(conv)", "fc()", "computes with norm"} <= found


def test_a_branch_is_left_out_only_if_a_module_is_surely_there() -> None:
    def method(self, x):  # type: ignore[no-untyped-def]
        return self.a(x) if self.a is not None else x

    uses = flow_of(method.__code__).uses
    assert len([use for use in uses if use.how == "returns"]) == 2
    uses = flow_of(method.__code__, lambda path: True).uses
    assert len([use for use in uses if use.how == "returns"]) == 1
    uses = flow_of(method.__code__, lambda path: False).uses
    assert len([use for use in uses if use.how == "returns"]) == 1


def interpreters(version: str) -> list[Path]:
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [folder / f"python{version}" for folder in folders]
    found = [*names, *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    return [path for path in found if path.is_file() and "shims" not in path.parts]


@pytest.mark.parametrize("version", VERSIONS)
def test_other_versions_of_python(version: str) -> None:
    if version == ".".join(map(str, sys.version_info[:2])):
        found = [Path(sys.executable)]
    else:
        found = interpreters(version)
    if not found:
        pytest.skip(f"there is no Python {version}")
    script = f"""
import runpy, sys, types
for name, folder in (("torchquant", {str(GRAPH.parent)!r}), ("torchquant.graph", {str(GRAPH)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
names = runpy.run_path({str(SUPPORT / "flow_cases.py")!r}, run_name="alone")
assert "torch" not in sys.modules
for source, wanted in names["CASES"].items():
    got = names["summary"](source)
    if got != wanted:
        print(source, "missing", wanted - got, "more", got - wanted, sep="\\n", end="\\n\\n")
"""
    done = subprocess.run(
        [str(found[0]), "-I", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert not done.stdout + done.stderr
