"""Progress bars: on standard error, in a terminal, and only for long work."""

import sys
from collections.abc import Iterator

import pytest
from rich.console import Console
from torch import nn

import torchquant
from torchquant.report import progress as module
from torchquant.report.progress import track


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)

    def work(self, seconds: float, shown: bool | None = None) -> Iterator[int]:
        for item in track(range(10), "work", shown):
            self.now += seconds
            yield item


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: self.stderr))


@pytest.mark.parametrize(
    ("seconds", "shown", "bar"),
    [
        (0.01, None, False),
        (0.25, None, True),
        (1.0, None, True),
        (1.0, False, False),
        (0.01, True, True),
    ],
)
def test_when_a_bar_appears(
    clock: Clock,
    terminal: None,
    seconds: float,
    shown: bool | None,
    bar: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [*clock.work(seconds, shown)] == [*range(10)]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("work" in err) is bar


def test_no_bar_without_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert [*clock.work(5.0)] == [*range(10)]
    assert capsys.readouterr() == ("", "")


def test_a_bar_ends_with_an_error(
    clock: Clock, terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        for item in clock.work(1.0):
            if item == 5:
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert [*clock.work(1.0)] == [*range(10)], "a second bar can start"


def test_generators_and_nothing() -> None:
    assert [*track((item for item in "ab"), "work", True)] == ["a", "b"]
    assert [*track([], "work", True)] == []


def test_short_work_imports_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rich.progress", raising=False)
    assert [*track([1, 2], "work")] == [1, 2]
    assert "rich.progress" not in sys.modules


def test_the_verbs_take_the_argument(capsys: pytest.CaptureFixture[str]) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    prepared = model()
    torchquant.quantize_(model(), progress=True)
    assert "quantize_" in capsys.readouterr().err
    torchquant.prepare_qat_(prepared, progress=True)
    assert "prepare_qat_" in capsys.readouterr().err
    torchquant.convert_(prepared, progress=True)
    assert "convert_" in capsys.readouterr().err
    torchquant.quantize_(model(), progress=False)
    assert capsys.readouterr().err == ""
