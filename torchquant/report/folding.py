"""The repeated blocks of a model as one line: ``layers.{0..11}.fc`` for twelve names.

Lines are merged if their names differ only in the numbers of blocks and all else is equal. Every
merged name can be read from the result: a set of numbers is written out, and lines whose numbers
are no complete grid stay apart. Numbers in other text, such as the reason in a report, are kept;
only the beginning of a line's own name (``layers.3``) changes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

# A number that is a whole part of a name ("layers.3.fc") or ends one ("encoder_layer_3").
_NUMBER = re.compile(r"(?:(?<=[._])|^)(?:0|[1-9]\d*)(?=[. ]|$)")
_MARK = re.compile("\0(\\d+)\0")  # place of a number in a pattern


@dataclass(frozen=True)
class Line(Generic[Item]):
    """Items that share a printed line.

    Attributes:
        names: the names with the sets of numbers, as many as each item has.
        texts: the other texts, likewise.
        items: the items, in their order.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class _Pattern:
    names: tuple[str, ...]
    texts: tuple[str, ...]
    key: Hashable


def fold_items(
    items: Iterable[Item],
    names: Callable[[Item], Sequence[str]],
    texts: Callable[[Item], Sequence[str]] = lambda item: (),
    key: Callable[[Item], Hashable] = lambda item: None,
) -> list[Line[Item]]:
    """Merge the items whose names differ only in the numbers of blocks.

    Args:
        items: the items, for example the rows of a report.
        names: takes an item; returns its names in the model.
        texts: takes an item; returns texts that may mention names of the same block.
        key: takes an item; items are merged only if their keys are equal.

    Returns:
        The lines, in the order of their first items.

    Example:
        >>> blocks = [f"blocks.{index}.{name}" for index in range(6) for name in ("up", "down")]
        >>> [line.names[0] for line in fold_items([*blocks, "head"], lambda name: [name])]
        ['blocks.{0..5}.up', 'blocks.{0..5}.down', 'head']
    """
    alike: dict[_Pattern, list[tuple[int, tuple[int, ...], Item]]] = {}
    for place, item in enumerate(items):
        pattern, numbers = _pattern(names(item), texts(item), key(item))
        alike.setdefault(pattern, []).append((place, numbers, item))
    lines: list[tuple[int, Line[Item]]] = []
    for pattern, members in alike.items():
        owners = [place for place, name in enumerate(pattern.names) for _ in _MARK.findall(name)]
        for places, sets, chosen in _grids(members, owners):
            written = [*map(_written, sets)]
            line = Line(_fill(pattern.names, written), _fill(pattern.texts, written), chosen)
            lines.append((places, line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def _pattern(
    names: Sequence[str], texts: Sequence[str], key: Hashable
) -> tuple[_Pattern, tuple[int, ...]]:
    """The texts with marks in place of the numbers of blocks, and these numbers."""
    numbers: list[int] = []
    beginnings: dict[str, str] = {}
    patterns = []
    for name in names:
        pattern, end = "", 0
        for found in _NUMBER.finditer(name):
            mark = f"\0{len(numbers)}\0"
            numbers.append(int(found.group()))
            pattern += name[end : found.start()] + mark
            end = found.end()
            if "." in name[:end]:  # a bare number may stand for anything in a text
                beginnings.setdefault(name[:end], pattern)
        patterns.append(pattern + name[end:])
    marked = tuple(_marked(text, beginnings) for text in texts)
    return _Pattern(tuple(patterns), marked, key), tuple(numbers)


def _marked(text: str, beginnings: dict[str, str]) -> str:
    for beginning in sorted(beginnings, key=len, reverse=True):
        if beginning in text:
            whole = rf"(?<![\w.]){re.escape(beginning)}(?![\w\0])"
            text = re.sub(whole, lambda _, new=beginnings[beginning]: new, text)  # type: ignore[misc]
    return text


Member = tuple[int, tuple[int, ...], Item]


def _grids(
    members: list[Member[Item]], owners: list[int]
) -> Iterator[tuple[int, list[list[int]], tuple[Item, ...]]]:
    """The members as few grids: the first place, the numbers at each mark, and the items."""
    leaders = _leaders([numbers for _, numbers, _ in members], owners)
    free = [place for place, leader in enumerate(leaders) if leader == place]
    by_free: dict[tuple[int, ...], list[Member[Item]]] = {}
    for member in members:
        by_free.setdefault(tuple(member[1][place] for place in free), []).append(member)
    for axes in _boxes(list(by_free)):
        chosen = sorted(
            (
                member
                for numbers, same in by_free.items()
                if all(number in axis for number, axis in zip(numbers, axes, strict=True))
                for member in same
            ),
            key=lambda member: member[0],
        )
        sets = [
            sorted({numbers[place] for _, numbers, _ in chosen}) for place in range(len(leaders))
        ]
        yield chosen[0][0], sets, tuple(item for _, _, item in chosen)


def _leaders(rows: list[tuple[int, ...]], owners: list[int]) -> list[int]:
    """For each place, the place in an earlier name whose number differs from it by a constant.

    Within one name, places are independent: ``a.{0,1}.{0,1}`` stands for four names.
    """
    leaders: list[int] = []
    taken: set[tuple[int, int]] = set()
    for place, owner in enumerate(owners):
        for other in range(place):
            free = leaders[other] == other and owners[other] != owner
            if free and (owner, other) not in taken and _constant(rows, place, other):
                leaders.append(other)
                taken.add((owner, other))
                break
        else:
            leaders.append(place)
    return leaders


def _constant(rows: list[tuple[int, ...]], place: int, other: int) -> bool:
    """True if the difference between two places is the same in all rows."""
    return len({row[place] - row[other] for row in rows}) == 1


def _boxes(rows: Sequence[tuple[int, ...]]) -> list[list[frozenset[int]]]:
    """Distinct rows as a union of grids; each grid is a set of numbers for every place."""
    if not rows[0]:
        return [[]]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in rows:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, same in rests.items():
        firsts.setdefault(frozenset(same), []).append(first)
    return [
        [frozenset(numbers), *box]
        for same, numbers in firsts.items()
        for box in _boxes(sorted(same))
    ]


def _written(numbers: list[int]) -> str:
    """``7`` for one number, ``{0..3,8}`` for several.

    Example:
        >>> _written([7]), _written([0, 1, 2, 3, 8]), _written([1, 2])
        ('7', '{0..3,8}', '{1,2}')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return f"{{{','.join(parts)}}}"


def _fill(patterns: tuple[str, ...], written: list[str]) -> tuple[str, ...]:
    return tuple(
        _MARK.sub(lambda mark: written[int(mark.group(1))], pattern) for pattern in patterns
    )


def fold(lines: Iterable[str]) -> Iterator[str]:
    """Merge lines of text whose names of layers differ only in the numbers of blocks.

    Example:
        >>> list(fold(["fused: blocks.0.up", "fused: blocks.1.up", "mean(x^2) of 2 values"]))
        ['fused: blocks.{0,1}.up (2 times)', 'mean(x^2) of 2 values']
    """
    names = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")

    def found(line: str) -> list[str]:
        return names.findall(line)

    for folded in fold_items(lines, found, lambda line: [names.sub("\0\0", line)]):
        text = folded.texts[0]
        for name in folded.names:
            text = text.replace("\0\0", name, 1)
        yield f"{text} ({len(folded.items)} times)" if len(folded.items) > 1 else text
