"""What surrounds a call, from bytecode: a table of functions, in each version of Python found."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import torchquant

GRAPH = Path(torchquant.__file__).parent / "graph"
FILES = ("calls", "segment", "call_sites")
ROW = re.compile(r"# follow: (.*?); chain: (.*?); obstacle: (.*)")

# A function, and for the first call of self.fc or self.q that has one: the module that receives
# the result, the calls on the same variable, and the reason why no module receives the result.
TABLE = """
def f(self, x):
    return self.act(self.fc(x))
# follow: act; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    return self.act(h)
# follow: act; chain: -; obstacle: -

def f(self, x):
    x = self.fc(x)
    x = self.act(x)
    return self.out(x)
# follow: act; chain: -; obstacle: -

def f(net, x):
    return net.block.act(net.block.fc(x))
# follow: block.act; chain: -; obstacle: -

def f(self, x):
    return self.items["act"](self.items["fc"](x))
# follow: items.act; chain: -; obstacle: -

def f(self, x):
    return self.act(self.fc(self.norm(x)))
# follow: act; chain: -; obstacle: -

def f(self, x):
    for _ in range(3):
        x = self.act(self.fc(x))
    return x
# follow: act; chain: -; obstacle: -

def f(self, x, pre=False):
    if pre:
        return self.fc(x)
    h = self.fc(x)
    return self.act(h)
# follow: act; chain: -; obstacle: -

def f(self, x):
    yield self.act(self.fc(x))
# follow: act; chain: -; obstacle: -

async def f(self, x):
    return self.act(self.fc(x))
# follow: act; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    return self.act(h) + h
# follow: -; chain: -; obstacle: its output is also used elsewhere

def f(self, x):
    return self.act(h := self.fc(x)), h
# follow: -; chain: -; obstacle: its output is also used elsewhere

def f(self, x):
    h = self.fc(x)
    return (h, self.act(h))
# follow: -; chain: -; obstacle: its output is also used elsewhere

def f(self, x):
    h = self.fc(x)
    self.log()
    return self.act(h)
# follow: -; chain: -; obstacle: other code runs between the two

def f(self, x):
    h = self.fc(x)
    y = self.flag
    return self.act(h), y
# follow: -; chain: -; obstacle: other code runs between reading the module and calling the layer

def f(self, x):
    act = self.act
    print(x)
    return act(self.fc(x))
# follow: -; chain: -; obstacle: other code runs between reading the module and calling the layer

def f(self, x):
    h = self.fc(x)
    y = self.act(h)
    if y is None:
        return h
    return y
# follow: -; chain: -; obstacle: its output is kept in a variable

def f(self, x):
    try:
        h = self.fc(x)
        y = self.act(h)
        check(y)
        return y
    except ValueError:
        return h
# follow: -; chain: -; obstacle: its output is kept in a variable

def f(self, x):
    h = self.fc(x)
    if x is None:
        return h
    return self.act(h)
# follow: -; chain: -; obstacle: -

def f(self, x):
    self.pre = h = self.fc(x)
    return self.act(h)
# follow: -; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    g = lambda: h
    return self.act(h)
# follow: -; chain: -; obstacle: -

def f(self, x):
    g = lambda: self
    return self.act(self.fc(x))
# follow: -; chain: -; obstacle: -

def f(self, x):
    self = self.other
    return self.act(self.fc(x))
# follow: -; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    y = self.act(h)
    return y, locals()
# follow: -; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    y = self.act(h)
    breakpoint()
    return y
# follow: -; chain: -; obstacle: -

def f(self, x):
    return self.act(input=self.fc(x))
# follow: -; chain: -; obstacle: -

def f(self, x):
    return self.act(self.fc(input=x))
# follow: -; chain: -; obstacle: -

def f(self, *x):
    return self.act(self.fc(*x))
# follow: -; chain: -; obstacle: -

def f(self, x):
    return self.act(self.fc(x), True)
# follow: -; chain: -; obstacle: -

def f(self, x, c):
    return (self.act if c else self.other)(self.fc(x))
# follow: -; chain: -; obstacle: -

def f(self, x):
    h = self.fc(x)
    h += 1
    return self.act(h)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    k = self.k(x)
    v = self.v(x)
    return q, k, v
# follow: -; chain: q k v; obstacle: -

def f(self, x):
    return self.act(self.q(x)) * self.k(x)
# follow: act; chain: q k; obstacle: -

def f(self, x, shape):
    q = self.q(x).view(shape).transpose(1, 2)
    k = self.k(x).view(shape).transpose(1, 2)
    return q, k
# follow: -; chain: q k; obstacle: -

def f(self, x):
    q = self.q(x) * self.scale
    return q, self.k(x)
# follow: -; chain: q k; obstacle: -

def f(self, x):
    q = self.norm(self.q(x))
    return q, self.k(x)
# follow: norm; chain: q k; obstacle: -

def f(self, x):
    q = self.q(x)
    x.add_(1)
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    x += 1
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x, other):
    q = self.q(x).mul(other)
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x, other):
    q = self.q(x) * other
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    x[0] = 1
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    change(x)
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    if self.training:
        x.add_(1)
    return q, self.k(x)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    x = self.norm(x)
    return q, self.k(x)
# follow: -; chain: q norm; obstacle: -

def f(self, x, y):
    return self.q(x), self.k(y)
# follow: -; chain: -; obstacle: -

def f(self, x):
    q = self.q(x)
    with guard:
        k = self.k(x)
    return q, k
# follow: -; chain: -; obstacle: -

def f(self, x):
    yield self.q(x)
    yield self.k(x)
# follow: -; chain: -; obstacle: -
"""


def rows() -> Iterator[tuple[str, tuple[str, str, str]]]:
    for block in TABLE.strip().split("\n\n"):
        source, _, expected = block.rpartition("\n")
        match = ROW.fullmatch(expected)
        assert match is not None, expected
        yield source, match.groups()  # type: ignore[misc]


def answers(source: str, call_sites: Any) -> tuple[str, str, str]:
    """The answers for the first call of the layer that has any."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    found = ["-", "-", "-"]
    for call in call_sites(namespace["f"].__code__).calls:
        if _text(call.path).split(".")[-1] not in ("fc", "q"):
            continue
        if call.follow is not None:
            found[0] = _text(call.follow)
        if call.chain:
            found[1] = " ".join(_text(later.path) for later in call.chain)
        if call.obstacle:
            found[2] = call.obstacle
    return (found[0], found[1], found[2])


def _text(path: Any) -> str:
    return ".".join(str(getattr(step, "key", step)) for step in path)


def load_by_path() -> Any:
    """The three files alone, without torch, which other versions of Python may not have."""
    for name in ("torchquant", "torchquant.graph"):
        sys.modules[name] = types.ModuleType(name)
    for name in FILES:
        full = f"torchquant.graph.{name}"
        spec = importlib.util.spec_from_file_location(full, GRAPH / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules["torchquant.graph.call_sites"].call_sites


@pytest.mark.parametrize(("source", "expected"), rows())
def test_the_table(source: str, expected: tuple[str, str, str]) -> None:
    from torchquant.graph.call_sites import call_sites

    assert answers(source, call_sites) == expected


VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def interpreters(version: str) -> list[Path]:
    """Interpreters of a version: on the path, and where pyenv keeps them."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [folder / f"python{version}" for folder in folders]
    found = [*names, *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    # A shim of pyenv exists for versions that do not run; the call in the test tells.
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
import re, sys, types, importlib.util
from pathlib import Path
GRAPH, FILES, TABLE = Path({str(GRAPH)!r}), {FILES!r}, {TABLE!r}
ROW = re.compile({ROW.pattern!r})
{_source_of("rows", "answers", "_text", "load_by_path")}
wrong = []
call_sites = load_by_path()
for source, expected in rows():
    got = answers(source, call_sites)
    if got != expected:
        wrong.append((source, got, expected))
for line in wrong:
    print(*line, sep="\\n", end="\\n\\n")
sys.exit(len(wrong) > 0)
"""
    done = subprocess.run(
        [str(found[0]), "-I", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{found[0]}:\n{done.stdout}{done.stderr}"


def _source_of(*names: str) -> str:
    import inspect

    future = "from typing import Any, Iterator\n"
    return future + "\n".join(inspect.getsource(globals()[name]) for name in names)


def test_the_three_files_import_no_torch() -> None:
    for name in FILES:
        text = (GRAPH / f"{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) torch\b", text, re.MULTILINE)
