"""Reports: the repeated blocks of a model share a line, and every name can be read from it."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchquant.report import FusionReport, QuantizationReport, fold, fold_items


def folded(names: list[str]) -> list[str]:
    return [line.names[0] for line in fold_items(names, lambda name: [name])]


def written_out(name: str) -> list[str]:
    """The names that a folded name stands for."""
    parts = re.split(r"\{([\d.,]+)\}", name)
    sets: list[list[str]] = []
    for place, part in enumerate(parts):
        if place % 2 == 0:
            sets.append([part])
            continue
        runs = [run.partition("..") for run in part.split(",")]
        sets.append([str(n) for a, _, b in runs for n in range(int(a), int(b or a) + 1)])
    return ["".join(choice) for choice in itertools.product(*sets)]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ([], []),
        (["head"], ["head"]),
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0.b", "a.1.b"], ["a.{0,1}.b"]),
        (["a.0.b", "a.0.c", "a.2.b"], ["a.{0,2}.b", "a.0.c"]),
        (["0", "2", "3", "4", "9"], ["{0,2..4,9}"]),
        (["encoder_layer_0.fc", "encoder_layer_1.fc"], ["encoder_layer_{0,1}.fc"]),
        (["fc1", "fc2"], ["fc1", "fc2"]),  # no block: two layers that somebody numbered
        (["a.01.b", "a.02.b"], ["a.01.b", "a.02.b"]),
        ([f"h.{i}.e.{j}.w" for i in range(3) for j in range(4)], ["h.{0..2}.e.{0..3}.w"]),
        # no complete grid: two lines, not one that claims too much
        (["h.0.0", "h.0.1", "h.1.0"], ["h.0.{0,1}", "h.1.0"]),
    ],
)
def test_names(names: list[str], lines: list[str]) -> None:
    assert folded(names) == lines


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_every_name_is_in_one_line(blocks: set[tuple[int, int, int]]) -> None:
    names = [f"s{c}.layers.{a}.experts.{b}.w" for a, b, c in sorted(blocks)]
    found = [name for line in folded(names) for name in written_out(line)]
    assert sorted(found) == sorted(names)


def test_numbers_in_reasons_are_kept() -> None:
    reason = "mean(x^2) = 0.5; layers.{0}.act of layers.{0} uses it"
    rows = [(f"layers.{i}.fc", reason.format(i)) for i in (0, 1)]
    (line,) = fold_items(rows, lambda row: [row[0]], lambda row: [row[1]])
    assert line.texts == (reason.format("{0,1}"),)
    other = [(name, text.replace("0.5", f"{i}.5")) for i, (name, text) in enumerate(rows)]
    assert len(fold_items(other, lambda row: [row[0]], lambda row: [row[1]])) == 2


def test_a_bare_number_does_not_change_reasons() -> None:
    rows = [(str(place), f"{place} of 2 and 0, 1") for place in (0, 1)]
    lines = fold_items(rows, lambda row: [row[0]], lambda row: [row[1]])
    assert [line.texts[0] for line in lines] == [reason for _, reason in rows]


def test_longer_numbers_are_other_blocks() -> None:
    rows = [(f"layers.{i}.a", "see layers.10.b") for i in (1, 10)]
    lines = fold_items(rows, lambda row: [row[0]], lambda row: [row[1]])
    assert [line.texts[0] for line in lines] == ["see layers.10.b"] * 2


def test_fusions_in_a_sequential_keep_their_numbers() -> None:
    fusions = [
        FusionReport("activation", (str(i),), f"{i + 1} (relu)", "fused", "") for i in (0, 2, 4)
    ]
    report = QuantizationReport((), 0, 0, (), tuple(fusions))
    assert str(report).splitlines()[1:] == ["fused: {0,2,4} with {1,3,5} (relu) (3 times)"]


def test_fold_of_lines() -> None:
    lines = [f"left: blocks.{i}.norm (Norm): 2 of 3 differ" for i in range(3)]
    assert list(fold([*lines, "head"])) == [
        "left: blocks.{0..2}.norm (Norm): 2 of 3 differ (3 times)",
        "head",
    ]
