"""The structure of the code: imports go down one list, without circles, and files are short."""

from pathlib import Path

import pytest
from support.structure import Package, circles, long_files, type_tests, upward_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Package(ROOT / "torchquant", built=("_C", "_build_info"))

# From the top to the bottom. A package or file imports only from layers below its own; names in one
# layer do not import each other.
LAYERS = (
    ("cli",),
    ("demo", "bench"),
    ("__init__",),
    ("compat",),
    ("algorithms",),
    ("integrations", "analysis"),
    ("files",),
    ("qat",),
    ("convert",),
    ("chains",),
    ("nn",),
    ("observers",),
    ("training",),
    ("graph",),
    ("cuda",),
    ("triton",),
    ("ops", "models"),
    ("functional",),
    ("configs", "report", "data"),
    ("scheme", "cpu"),
    ("_extension", "version"),
)

# The files at the root of the package. A new idea belongs in a folder.
ROOT_FILES = {
    "__init__.py",
    "_build_info.py",  # written by the build
    "_extension.py",
    "cpu.py",
    "observers.py",
    "py.typed",
    "qat.py",
    "scheme.py",
    "version.py",
}

MOST_LINES = 450
CODE = (".py", ".pyi", ".cpp", ".h", ".inc")
# Longer files, each with the reason why it is a table and not a program.
TABLES: dict[str, str] = {}


def test_imports_go_down() -> None:
    assert not list(map(str, upward_imports(PACKAGE, LAYERS)))


def test_every_layer_exists() -> None:
    named = [name for names in LAYERS for name in names]
    assert len(named) == len(set(named))
    modules = {module.partition(".")[2] or "__init__" for module in PACKAGE.sources}
    assert not set(named) - modules


def test_no_circle_between_files() -> None:
    assert not [" -> ".join(circle) for circle in circles(PACKAGE)]


def test_types_of_layers_are_told_apart_in_nn_only() -> None:
    """Other code uses the table of kinds and the two base classes."""
    bases = ("QuantizedModule", "TrainedModule")
    concrete = {name for _, name in PACKAGE.subclasses("nn", bases)}
    assert {"QuantizedLinear", "QATLinear"} <= concrete
    assert not list(map(str, type_tests(PACKAGE, "nn", bases)))


def test_files_at_the_root() -> None:
    found = {path.name for path in PACKAGE.root.iterdir() if path.is_file()}
    libraries = {name for name in found if name.startswith("_C.")}
    assert found - libraries - ROOT_FILES == set()
    assert ROOT_FILES - found <= {"_build_info.py"}


def test_no_file_is_long() -> None:
    found = long_files(ROOT, ("torchquant", "csrc", "tests"), CODE, MOST_LINES)
    assert {path: lines for path, lines in found.items() if path not in TABLES} == {}
    assert set(TABLES) <= set(found), "a table that is no longer too long leaves the list"


@pytest.mark.parametrize("name", ["tests/__init__.py", "conftest.py"])
def test_tests_do_not_shadow_the_installed_package(name: str) -> None:
    """With either file pytest would import the source tree, which may hold no library."""
    assert not (ROOT / name).exists()
