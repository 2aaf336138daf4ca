"""The shape of the code base: imports go one way, and every file carries no more than it should."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "torchquant"

# Bottom to top: a module imports from its own line and from those above it, never from below.
LAYERS = (
    ("_C", "_build_info", "version"),
    ("_extension",),
    ("scheme",),
    ("configs", "report", "cpu"),
    ("functional",),
    ("compat", "triton"),
    ("cuda",),
    ("ops",),
    ("graph",),
    ("training",),
    ("observers",),
    ("nn",),
    ("convert",),
    ("qat",),
    ("files",),
    ("analysis",),
    ("integrations",),
    ("models",),
    ("demo", "bench"),
    ("cli",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob("__*__.py")))


def component(path: Path) -> str:
    """The part of the package a file belongs to: its first folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_components(tree: ast.AST) -> Iterator[str]:
    """What a module imports from torchquant, by component, but for what only type checkers see."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom):
        names = [f"{tree.module}.{alias.name}" for alias in tree.names]
    else:
        names = []
    for name in names:
        package, *parts = name.split(".")
        if package == "torchquant" and parts and parts[0] in HEIGHT:
            yield parts[0]
    for child in ast.iter_child_nodes(tree):
        yield from imported_components(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    own = component(path)
    assert own in HEIGHT, f"say in LAYERS above where torchquant.{own} stands"
    imported = set(imported_components(ast.parse(path.read_text())))
    upward = {name for name in imported if name != own and HEIGHT[name] >= HEIGHT[own]}
    assert not upward, f"torchquant.{own} imports from above itself: {sorted(upward)}"


def test_tests_do_not_shadow_the_installed_package() -> None:
    """With either file pytest would import the source tree, which may hold no library."""
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
