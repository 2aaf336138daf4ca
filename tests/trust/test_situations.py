"""No code sees a value that fusion changed, whatever way a module is written or used."""

import importlib

import pytest
from support.situations import ALL, Situation, check, check_trained, in_python

FILES = (*("paths", "functions", "kept", "later", "swapped", "projected", "regrouped", "running"),)
for name in FILES:
    importlib.import_module(f"support.situations.{name}")  # fills the list

CASES = [
    pytest.param(kind, mode, id=f"{kind.__name__}-{mode}") for kind in ALL for mode in kind.modes
]
TRAINED = [case for case in CASES if case.values[0].trains]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_quantized(kind: type[Situation], mode: str) -> None:
    check(kind, mode)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_quantized_with_frames_read_in_python(
    kind: type[Situation], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_python(monkeypatch)
    check(kind, kind.modes[-1])


@pytest.mark.parametrize(("kind", "mode"), TRAINED)
def test_trained(kind: type[Situation], mode: str) -> None:
    check_trained(kind, mode)


def test_there_are_many() -> None:
    assert len(ALL) >= 120
    names = [kind.__name__ for kind in ALL]
    assert not {name for name in names if names.count(name) > 1}
