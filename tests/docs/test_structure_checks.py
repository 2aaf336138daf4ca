"""The checks of test_structure.py find each violation in a small package made up for it."""

from pathlib import Path

import pytest
from support.structure import Package, circles, long_files, type_tests, upward_imports

LAYERS = (("top",), ("__init__",), ("side", "nn"), ("low",))
BASES = ("QuantizedModule", "TrainedModule")
LAYER_CLASSES = {
    "__init__.py": "",
    "nn/__init__.py": "from p.nn.linear import Linear\n",
    "nn/base.py": "class QuantizedModule:\n    pass\n\nclass Helper:\n    pass\n",
    "nn/linear.py": "from p.nn import base\n\nclass Linear(base.QuantizedModule): ...\n",
    "nn/conv.py": "from p.nn.linear import Linear as Q\n\nclass Conv(Q):\n    pass\n",
}


def package(folder: Path, files: dict[str, str]) -> Package:
    """A package called p of some files; ``low``, ``side`` and ``top`` exist where none is given."""
    defaults = {f"{name}.py": "" for name in ("__init__", "low", "side", "top")}
    for name, text in {**defaults, **files}.items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(folder / "p", built=("_C",))


CLEAN = {
    "__init__.py": "from p.side import thing\nfrom p.nn import Layer\n",
    "low.py": "import torch\nfrom p import _C\n",
    "side.py": "from p import low\nimport p.low\nthing = p.low\n",
    "nn/__init__.py": "from p.nn.layer import Layer\n",
    "nn/layer.py": "from .part import Part\nclass Layer(Part): ...\n",
    "nn/part.py": "from ..low import x\nclass Part: ...\n",
    "top.py": "import p\nfrom p import thing\nfrom p.nn import Layer\np.nn.Layer\n",
}


def test_a_clean_package_has_no_finding(tmp_path: Path) -> None:
    clean = package(tmp_path, CLEAN)
    assert upward_imports(clean, LAYERS) == []
    assert circles(clean) == []
    assert type_tests(clean, "nn", BASES) == []


# ---------------------------------------------------------------- upward

UPWARD = {
    "plain": "import p.side",
    "from the package": "from p import side",
    "a name of a file": "from p.side import thing",
    "relative": "from .side import thing",
    "renamed": "import p.side as s",
    "star": "from p.side import *",
    "in a function": "def f():\n    from p.side import thing",
    "for type checkers": "import typing\nif typing.TYPE_CHECKING:\n    from p.side import thing",
    "in a try": "try:\n    from p import side\nexcept ImportError:\n    pass",
    "by its name as a string": "import importlib\nimportlib.import_module('p.side')",
    "through the face": "from p import thing",
    "through the face by attribute": "import p\ndef f():\n    return p.thing",
    "through the face, a file by attribute": "import p as q\ndef f():\n    return q.side.thing.x",
}


@pytest.mark.parametrize("case", UPWARD)
def test_upward_imports_are_found(case: str, tmp_path: Path) -> None:
    files = {"__init__.py": "from p.side import thing\n", "side.py": "thing = 1\n"}
    found = upward_imports(package(tmp_path, {**files, "low.py": UPWARD[case] + "\n"}), LAYERS)
    assert {"p/low.py imports p/side.py"} <= {f"{f.file} {f.problem}" for f in found}


def test_the_line_of_an_import_is_named(tmp_path: Path) -> None:
    found = upward_imports(package(tmp_path, {"low.py": "x = 1\n\nimport p.side\n"}), LAYERS)
    assert list(map(str, found)) == ["p/low.py:3: imports p/side.py"]


def test_the_face_is_a_layer_too(tmp_path: Path) -> None:
    for text in ("import p\nprint(p)\n", "import p\n", "from p import value\n"):
        files = {"__init__.py": "value = 1\n", "low.py": text}
        found = upward_imports(package(tmp_path, files), LAYERS)
        assert [f.problem for f in found] == ["imports p/__init__.py"]


def test_neighbours_in_a_layer_do_not_import_each_other(tmp_path: Path) -> None:
    found = upward_imports(package(tmp_path, {"nn/__init__.py": "import p.side\n"}), LAYERS)
    assert [str(f) for f in found] == ["p/nn/__init__.py:1: imports p/side.py"]


def test_a_file_in_no_layer_is_found(tmp_path: Path) -> None:
    found = upward_imports(package(tmp_path, {"new/part.py": "", "new/__init__.py": ""}), LAYERS)
    assert {f.file for f in found} == {"p/new/__init__.py", "p/new/part.py"}
    assert {f.problem for f in found} == {"is in no layer"}


def test_a_part_of_a_package_can_have_a_layer_of_its_own(tmp_path: Path) -> None:
    files = {"nn/__init__.py": "", "nn/a.py": "", "nn/b.py": "import p.nn.a\n"}
    layers = (("__init__",), ("nn.a",), ("nn",), ("top", "side", "low"))
    found = upward_imports(package(tmp_path, files), layers)
    assert [str(f) for f in found] == ["p/nn/b.py:1: imports p/nn/a.py"]


# ---------------------------------------------------------------- circles

CIRCLES = {
    "two files at the root": {"low.py": "import p.side", "side.py": "import p.low"},
    "inside one folder": {
        "nn/__init__.py": "",
        "nn/low.py": "from p.nn import side",
        "nn/side.py": "from p.nn.low import x",
    },
    "relative": {
        "nn/__init__.py": "",
        "nn/low.py": "from .side import x",
        "nn/side.py": "from . import low",
    },
    "for type checkers": {
        "low.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.side import x",
        "side.py": "import p.low",
    },
    "in a function": {"low.py": "def f():\n    import p.side", "side.py": "from p import low"},
    "a folder's own face": {
        "nn/__init__.py": "from p.nn.low import x",
        "nn/low.py": "def f():\n    from p.nn import x",
    },
    "the package's face": {
        "__init__.py": "from p.side import thing",
        "side.py": "import p.low\nthing = 1",
        "low.py": "def f():\n    import p\n    return p.thing",
    },
    "the package's face, a file": {
        "__init__.py": "from p import side",
        "side.py": "import p.low",
        "low.py": "import p\ndef f():\n    return p.side.thing",
    },
    "of three": {"low.py": "import p.side", "side.py": "import p.top", "top.py": "import p.low"},
}


@pytest.mark.parametrize("case", CIRCLES)
def test_circles_are_found(case: str, tmp_path: Path) -> None:
    files = {name: f"{text}\n" for name, text in CIRCLES[case].items()}
    found = circles(package(tmp_path, files))
    members = {name for name in files if not name.endswith("__init__.py")}
    assert any(members & {file.removeprefix("p/") for file in circle} for circle in found)
    assert all(circle[0] == circle[-1] and len(circle) > 2 for circle in found)


def test_a_circle_is_named_once(tmp_path: Path) -> None:
    found = circles(package(tmp_path, {"low.py": "import p.side\n", "side.py": "import p.low\n"}))
    assert found == [["p/low.py", "p/side.py", "p/low.py"]]


def test_the_face_imports_what_imports_nothing_back(tmp_path: Path) -> None:
    """Importing ``p.side`` runs ``p/__init__.py`` first; that alone is no circle."""
    files = {"__init__.py": "from p import low, side\n", "side.py": "from p import low\n"}
    assert circles(package(tmp_path, files)) == []


# ---------------------------------------------------------------- types

LINEAR = "from p.nn import Linear\n"
TYPE_TESTS = {
    "isinstance": "from p.nn.linear import Linear\nisinstance(m, Linear)",
    "through the folder's face": LINEAR + "isinstance(m, Linear)",
    "by attribute": "from p import nn\nisinstance(m, nn.Linear)",
    "from the face of all": "import p\nisinstance(m, p.nn.linear.Linear)",
    "renamed": "from p.nn import Linear as Q\nissubclass(type(m), Q)",
    "in a tuple": LINEAR + "isinstance(m, (int, Linear))",
    "in a union": LINEAR + "isinstance(m, int | Linear)",
    "under another name": LINEAR + "T = (Linear,)\nisinstance(m, T)",
    "type is": LINEAR + "type(m) is Linear",
    "type in": LINEAR + "type(m) in {Linear, int}",
    "class equals": LINEAR + "m.__class__ == Linear",
    "name equals": "type(m).__name__ == 'Linear'",
    "match": LINEAR + "match m:\n    case Linear():\n        pass",
    "match by value": "from p import nn\nmatch type(m):\n    case nn.Linear:\n        pass",
    "match by name": "match type(m).__name__:\n    case 'Linear':\n        pass",
    "a table": LINEAR + "T = {Linear: 1}",
    "passed on": LINEAR + "find(model, Linear)",
    "passed on in a tuple": LINEAR + "find(kinds=[Linear])",
    "in a function": "def f(m):\n    from p.nn import Linear\n    isinstance(m, Linear)",
}


@pytest.mark.parametrize("case", TYPE_TESTS)
def test_type_tests_are_found(case: str, tmp_path: Path) -> None:
    found = type_tests(
        package(tmp_path, {**LAYER_CLASSES, "top.py": TYPE_TESTS[case]}), "nn", BASES
    )
    assert [(f.file, f.problem) for f in found] == [("p/top.py", "tests for Linear")]


def test_classes_further_down_count(tmp_path: Path) -> None:
    text = "from p.nn.conv import Conv\nisinstance(m, Conv)\n"
    found = type_tests(package(tmp_path, {**LAYER_CLASSES, "top.py": text}), "nn", BASES)
    assert list(map(str, found)) == ["p/top.py:2: tests for Conv"]


ALLOWED = {
    "the base class": "from p.nn.base import QuantizedModule\nisinstance(m, QuantizedModule)",
    "another class": "from p.nn.base import Helper\nisinstance(m, Helper)",
    "another class of that name": "class Linear: ...\nisinstance(m, Linear)",
    "making one": LINEAR + "layer = Linear()\nuse(layer)\nuse(Linear())",
    "a cast": LINEAR + "from typing import cast\ncast(Linear, m)",
    "its methods": LINEAR + "use(Linear.from_float(m))\nuse(Linear.name)",
    "an annotation": LINEAR + "def f(m: Linear) -> list[Linear]: ...",
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_no_type_test_is_not_found(case: str, tmp_path: Path) -> None:
    found = type_tests(package(tmp_path, {**LAYER_CLASSES, "top.py": ALLOWED[case]}), "nn", BASES)
    assert found == []


def test_inside_the_folder_types_may_be_told_apart(tmp_path: Path) -> None:
    files = {**LAYER_CLASSES, "nn/kinds.py": TYPE_TESTS["isinstance"]}
    assert type_tests(package(tmp_path, files), "nn", BASES) == []


# ---------------------------------------------------------------- lines


def test_long_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for name, lines in (("a.py", 11), ("b.py", 10), ("c.txt", 99), ("deep.inc", 12)):
        (tmp_path / "code" / name).write_text("x\n" * lines)
    found = long_files(tmp_path, ["code"], (".py", ".inc"), 10)
    assert found == {"code/a.py": 11, "code/deep.inc": 12}
