"""tests/cases.py covers every operator, and every optional argument given and left out."""

from typing import Any

import pytest
from cases import GENERATORS, OPERATORS, cases, schema
from support import FLOATS, Shape

from torchquant import ops


def test_every_operator_has_cases_and_a_wrapper() -> None:
    assert sorted(GENERATORS) == list(OPERATORS)
    assert set(OPERATORS) <= set(ops.__all__)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_optional_argument_is_given_and_left_out(operator: str) -> None:
    given = [case.given for case in cases(operator)]
    for argument in schema(operator):
        if argument.has_default_value() or str(argument.type).startswith("Optional"):
            assert any(argument.name in values for values in given), argument.name
            assert any(argument.name not in values for values in given), argument.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_cases_have_names_of_their_own(operator: str) -> None:
    names = [case.name for case in cases(operator)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_runs_in_any_size(operator: str) -> None:
    sizes: list[tuple[Any, Any]] = [(Shape(1, 1, 1), FLOATS[0]), (Shape(3, 17, 65), FLOATS[1])]
    for shape, dtype in (*sizes, (Shape(65, 1, 33), FLOATS[2])):
        for case in cases(operator, shape, dtype):
            case.call()
