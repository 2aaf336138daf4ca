"""Runs every example: the README's blocks, the docstrings' examples and the scripts."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.ahead import NewFolder, Processes, Run, Selection

import torchquant

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
SCRIPTS = [*sorted(ROOT.glob("examples/*.py")), *sorted(ROOT.glob("benchmarks/bench_*.py"))]
SCRIPT_SECONDS = 600
SmokeRun = Callable[[Path], "subprocess.CompletedProcess[str]"]
DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
USER_COMMAND = "pip install . && torchquant demo"
TEST_COMMAND = 'pip install -e ".[test]" && pytest'


def fenced_blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of each ```language block of a Markdown page."""
    text = page.read_text()
    fences = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start(1)), fence[1]) for fence in fences]


def public_modules() -> list[str]:
    """Every Python module of the package; the C++ library has no docstring examples."""
    found = pkgutil.walk_packages(torchquant.__path__, "torchquant.")
    names = [module.name for module in found]
    return ["torchquant", *(n for n in names if n.rpartition(".")[2] not in ("_C", "__main__"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page's blocks run top to bottom in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = fenced_blocks(page, "python")
    for line, block in blocks:
        # Blank lines in front make a traceback show the page's own line numbers.
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    assert blocks or page.name != "README.md", "README.md holds no ```python block"


@pytest.mark.parametrize("command", [USER_COMMAND, TEST_COMMAND])
def test_readme_holds_the_command_as_a_line_of_its_own(command: str) -> None:
    blocks = fenced_blocks(ROOT / "README.md", "bash")
    assert command in [line for _, block in blocks for line in block.splitlines()]


def test_ci_runs_the_readme_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert f"'{USER_COMMAND}'" in script
    assert f"'{TEST_COMMAND}'" in script


def test_ci_keeps_its_torch_and_refuses_lost_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert script.count('check "$same_torch"') == 2
    assert "export CI=true" in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_named_on_a_page_exist(page: Path) -> None:
    """Relative links, and `code` that looks like a path of this repository."""
    text = page.read_text()
    links = {page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)}
    folders = "benchmarks|csrc|examples|tests|torchquant"
    paths = {ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text)}
    assert not [str(path) for path in links | paths if not path.exists()]


def docstring_tests(module: ModuleType) -> list[doctest.DocTest]:
    """Every docstring of a module; doctest itself misses wrapped functions (`@contextmanager`)."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(module)
    names = {test.name for test in tests}
    for name, thing in vars(module).items():
        inner = inspect.unwrap(thing) if callable(thing) else None
        if inner is not thing and getattr(inner, "__module__", None) == module.__name__:
            qualified = f"{module.__name__}.{name}"
            found = finder.find(inner, qualified, module=False, globs=vars(module).copy())
            tests += [test for test in found if test.name not in names]
    return tests


def imported(name: str) -> ModuleType:
    """A module of the package; a module that needs Triton is skipped where Triton is missing."""
    if name.startswith("torchquant.triton.") and find_spec("triton") is None:
        pytest.importorskip(name, reason="triton is not installed", exc_type=ImportError)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", public_modules())
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = imported(name)
    tests = docstring_tests(module)
    written = len(re.findall(r"^\s*>>> ", inspect.getsource(module), re.MULTILINE))
    assert sum(len(test.examples) for test in tests) == written, "doctest misses an example"
    runner = doctest.DocTestRunner(optionflags=DOCTEST_FLAGS)
    for test in tests:
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0, f"{runner.failures} of {written} examples failed, see above"


def needs_example(thing: object) -> bool:
    """Whether users call it: a function or a class, but no record and no exception."""
    if isinstance(thing, type) and issubclass(thing, (tuple, BaseException)):
        return False
    return callable(thing) and not is_dataclass(thing)


def has_example(thing: object) -> bool:
    return ">>>" in (thing.__doc__ or "")


@pytest.mark.parametrize("name", public_modules())
def test_exported_names_have_a_docstring_with_an_example(name: str) -> None:
    module = imported(name)
    exported = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
    lacking = [
        n for n, thing in exported.items() if needs_example(thing) and not has_example(thing)
    ]
    assert not lacking, f"{name}: no example in the docstring of {', '.join(lacking)}"


def run_time_modules() -> set[str]:
    """Import names of torchquant's own requirements, which are never a reason to skip."""
    requirements = [r for r in requires("torchquant") or [] if "extra ==" not in r]
    return {"torchquant", *(re.split(r"[^\w-]", r)[0].replace("-", "_") for r in requirements)}


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[Path]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    environment |= {"MPLBACKEND": "Agg", "COLUMNS": "120"}
    scripts = tests.values("script")
    folders = {script: new_folder(script.stem) for script in scripts}

    def run(script: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "--smoke"],
            cwd=folders[script],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCRIPT_SECONDS,
        )

    return run, scripts


@pytest.fixture(scope="module")
def smoke_run(request: pytest.FixtureRequest, processes: Processes) -> SmokeRun:
    """The ended process of a script, which ran below a folder of its own."""
    return lambda script: processes.result(request.module, script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_smoke_run(script: Path, smoke_run: SmokeRun) -> None:
    """`--smoke` does everything that the script does, on small data, below the current folder."""
    result = smoke_run(script)
    output = result.stdout + result.stderr
    missing = re.search(r"No module named '([\w.]+)'", output)
    if result.returncode != 0 and missing:
        module = missing[1].partition(".")[0]
        if module not in run_time_modules() and find_spec(module) is None:
            pytest.skip(f"needs the package {module}: {script.name}")
    assert result.returncode == 0, output[-6000:]
