"""No code sees another value, whatever way a convolutional network is written or used."""

import importlib

import pytest
from support.situations.convolved import (
    CONVOLVED,
    Convolved,
    check_dynamic,
    check_static,
    converted,
)

from torchquant.convert.regions import regions_in

for name in ("hooks", "methods", "values", "running"):
    importlib.import_module(f"support.situations.convolved.{name}")  # fills the list

CASES = [
    pytest.param(kind, mode, id=f"{kind.__name__}-{mode}")
    for kind in CONVOLVED
    for mode in kind.modes
]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_static(kind: type[Convolved], mode: str) -> None:
    check_static(kind, mode)


@pytest.mark.parametrize(
    "kind", [kind for kind in CONVOLVED if kind.dynamic], ids=lambda kind: kind.__name__
)
def test_dynamic(kind: type[Convolved]) -> None:
    check_dynamic(kind, kind.modes[-1])


def test_there_are_many_and_most_have_regions() -> None:
    assert len(CONVOLVED) >= 50
    with_regions = [kind for kind in CONVOLVED if regions_in(converted(kind))]
    assert len(with_regions) >= 40
