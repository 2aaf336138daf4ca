"""The architectures of `benchmarks/zoo.py`: a fast third by default, all with -m slow."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ahead import NewFolder, Processes, Run, Selection
from support.scripts import run_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import zoo  # noqa: E402
from architectures import ARCHITECTURES, Architecture, tensors  # noqa: E402
from zoo_checks import COLUMNS, KNOWN, Outcome, Row, examine, missing_package  # noqa: E402
from zoo_checks.case import cosine, decibels  # noqa: E402

import torchquant  # noqa: E402

FEWEST_FAST = 42


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The libraries of the models warn about settings that do not matter here."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


EXAMINE = f"""
import json, logging, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch
from architectures import ARCHITECTURES
from zoo_checks import examine

torch.set_num_threads(1)
logging.disable(logging.WARNING)
for architecture in ARCHITECTURES:
    if architecture.name in sys.argv:
        row = examine(architecture)
        found = {{"failures": row.failures, "needless": row.needless}}
        print(json.dumps({{"name": architecture.name, **found}}), flush=True)
"""
PROCESSES = 2
SECONDS = 1800.0  # of all the architectures of a process


def processes_ahead(tests: Selection, new_folder: NewFolder) -> tuple[Run, list[tuple[str, ...]]]:
    """The architectures in two processes, which import the libraries of the models once each."""
    names = [a.name for a in tests.values("architecture") if missing_package(a) is None]
    environment = dict(os.environ)
    return (
        lambda key: run_python(EXAMINE, *key, environment=environment, timeout=SECONDS),
        [tuple(names[i::PROCESSES]) for i in range(min(PROCESSES, len(names)))],
    )


@pytest.fixture(scope="module")
def examined(
    request: pytest.FixtureRequest, processes: Processes
) -> Callable[[str], dict[str, Any]]:
    """What the checks found in an architecture, by its name."""
    keys = processes.keys(request.module)

    def found(name: str) -> dict[str, Any]:
        done = processes.result(request.module, next(key for key in keys if name in key))
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        row = next((row for row in rows if row["name"] == name), None)
        assert row is not None, f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return row

    return found


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=() if a.fast else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_every_check_passes(
    architecture: Architecture, examined: Callable[[str], dict[str, Any]]
) -> None:
    package = missing_package(architecture)
    if package is not None:
        pytest.skip(f"needs the package {package}")
    row = examined(architecture.name)
    assert row["failures"] == {}
    assert row["needless"] == [], "an exception that is no longer needed leaves the list"


def test_the_zoo_has_127_architectures_and_the_default_tests_run_a_third() -> None:
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(names) == len(set(names)) == 127
    fast = [architecture for architecture in ARCHITECTURES if architecture.fast]
    assert len(fast) >= FEWEST_FAST
    groups = {architecture.group for architecture in ARCHITECTURES}
    assert groups == {architecture.group for architecture in fast}


def test_known_exceptions_name_an_architecture_and_a_column_and_have_a_reason() -> None:
    names = {architecture.name for architecture in ARCHITECTURES}
    for (name, column), reason in KNOWN.items():
        assert name in names
        assert column in COLUMNS
        assert len(reason) > 20


class Layer(torch.nn.Module):
    """A network of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x)
        return out


def _examined(build: type[torch.nn.Module], *columns: str) -> Row:
    architecture = Architecture("own", "own", "", build, lambda: {"x": torch.randn(4, 64)})
    return examine(architecture, columns)


def test_a_failure_is_an_outcome_with_the_text_of_the_error() -> None:
    class ReadsAnAttribute(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.fc.in_features_of_float  # type: ignore[operator]

        def __init__(self) -> None:
            super().__init__()
            self.fc.in_features_of_float = 0  # type: ignore[assignment]

    row = _examined(ReadsAnAttribute, "runs", "cosine")
    assert row.outcomes["runs"].text.startswith("AttributeError: ")
    assert list(row.failures) == ["runs", "cosine"]


def test_another_computation_is_seen_by_the_cosine() -> None:
    class Noticing(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out if type(self.fc) is torch.nn.Linear else out.relu()

    assert _examined(Layer, "runs", "cosine").failures == {}
    row = _examined(Noticing, "runs", "cosine")
    assert list(row.failures) == ["cosine"]
    assert 0.5 < (row.outcomes["cosine"].value or 0) < 0.9


def test_a_change_of_what_is_not_quantized_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoLayers(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(64)

    def changing(model: torch.nn.Module) -> None:
        model.norm.bias.data += 1  # type: ignore[operator, union-attr]

    def drawing(model: torch.nn.Module) -> None:
        torch.randn(1)

    for verb, text in (
        (changing, "quantize_ changes norm.bias"),
        (drawing, "quantize_ draws random numbers"),
    ):
        monkeypatch.setattr(torchquant, "quantize_", verb)
        assert _examined(TwoLayers, "runs").failures == {"runs": text}


def test_the_time_limit_fails_the_columns_that_are_left() -> None:
    class Slow(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = super().forward(x)
            while True:
                total = total + 1

    architecture = Architecture("own", "own", "", Slow, lambda: {"x": torch.randn(4, 64)})
    row = examine(architecture, ("runs", "cosine"), limit=0.3)
    assert row.outcomes == {c: Outcome("not done after 0.3 s", False) for c in ("runs", "cosine")}


def test_comparisons() -> None:
    one, other = [torch.tensor([1.0, 2.0])], [torch.tensor([2.0, -1.0])]
    assert cosine(one, one) == pytest.approx(1)
    assert cosine(one, other) == pytest.approx(0)
    assert cosine([], []) == 1
    assert cosine(one, [torch.ones(3)]) != cosine(one, [torch.ones(3)]), "not a number"
    assert decibels(one, one) == 200
    assert decibels(one, [torch.tensor([1.1, 2.2])]) == pytest.approx(20)
    assert list(tensors({"a": one, "b": 3, "c": torch.tensor([1])})) == one


def test_the_script_writes_its_results_and_ends_with_status_0(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "zoo.py"), "--only", "lstm_tagger"]
    result = subprocess.run(
        [*command, "--columns", "runs", "cosine", "--save"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of 1 models fail" in result.stdout
    header, row = map(json.loads, next(tmp_path.glob("zoo-*.jsonl")).read_text().splitlines())
    assert {"date", "cpu", "versions", "command"} <= set(header)
    assert row["columns"]["cosine"]["value"] > 0.99
    page = next(tmp_path.glob("zoo-*.md")).read_text()
    assert "--only lstm_tagger" in page
    assert "| lstm_tagger | ok | 1.0000 |" in page


def test_the_script_ends_with_status_1_and_names_the_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Raises(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("nobody has it")

    broken = Architecture("broken", "own", "", Raises, lambda: {"x": torch.randn(4, 64)})
    elsewhere = Architecture("elsewhere", "own", "no_such_package", Raises, dict)
    monkeypatch.setattr(zoo, "ARCHITECTURES", (broken, elsewhere))
    monkeypatch.setattr(zoo, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--columns", "runs", "int8"])
    assert zoo.main() == 1
    printed = capsys.readouterr().out
    assert "broken, runs: KeyError: 'nobody has it'" in printed
    assert "elsewhere: no_such_package is not installed" in printed
    assert "1 of 1 models fail" in printed
