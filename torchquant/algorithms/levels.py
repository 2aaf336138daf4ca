"""Which layers of a module can be compressed together: those that do not depend on each other.

A layer depends on another one if its input changes with the output of the other one. Layers that
depend on no layer are the first level, layers that depend only on the first level the second, and
so on: q, k, v | o | gate, up | down in a transformer. The levels are found by running one batch
with changed outputs, so that no forward has to be read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

__all__ = ["Level", "levels_of"]


@dataclass(frozen=True)
class Level:
    """Layers that can be compressed together.

    Attributes:
        inputs: the names of the layers, in the order of their first calls; layers that read the
            same tensor are one element.
        once: True if the batch reached each layer once.

    Example:
        >>> Level((("q", "k"), ("gate",)), True).names
        ('q', 'k', 'gate')
    """

    inputs: tuple[tuple[str, ...], ...]
    once: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all layers."""
        return tuple(name for names in self.inputs for name in names)


def levels_of(
    modules: Mapping[str, nn.Module], run: Callable[[], Any], *, by_order: bool = False
) -> list[Level]:
    """The levels of layers, after a level of those that the batch does not reach.

    A forward may read the weight of such a layer without a call; the others shall see its integers.
    A call with an empty tensor, such as an expert without tokens gets it, does not reach a layer.

    Args:
        modules: the layers as the forward calls them, by name.
        run: calls the forward with a batch.
        by_order: if True, layers that are called one after the other with one tensor are a level,
            and the outputs are not changed.

    Example:
        >>> import torch
        >>> layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkvo"})
        >>> x = torch.randn(2, 4)
        >>> def run():
        ...     return layers["o"](layers["q"](x) * layers["k"](x) + layers["v"](x))
        >>> [level.names for level in levels_of(layers, run)]
        [('q', 'k', 'v'), ('o',)]
    """
    clean = _seen(modules, run)
    order = [name for name in clean if clean[name].marks]
    missed = [name for name in modules if name not in order]
    groups = _by_order(clean, order) if by_order or len(order) < 2 else None
    if groups is None:
        try:
            groups = _by_change(modules, run, clean, order)
        except Exception:  # the forward refuses changed values
            groups = _by_order(clean, order)
    levels = [_level(clean, names) for names in groups]
    by_name = _by_template(missed, levels)
    levels = [
        Level((*level.inputs, *_single(late)), level.once and not late)
        for level, late in zip(levels, by_name, strict=False)
    ]
    return [Level(_single(by_name[-1]), False), *levels] if by_name[-1] else levels


@dataclass
class _Calls:
    """The inputs of a layer: what identifies their values, and the tensor of the first call."""

    marks: list[Any]
    tensor: int = -1  # equal for layers whose first call gets the same tensor


def _seen(
    modules: Mapping[str, nn.Module], run: Callable[[], Any], changed: frozenset[str] = frozenset()
) -> dict[str, _Calls]:
    """The inputs of layers in a run in which the outputs of some layers are changed."""
    found: dict[str, _Calls] = {}
    alive: list[Any] = []  # weak references to the tensors of first calls

    def before(name: str, args: Any, kwargs: Any) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(value, Tensor) and not value.numel():
            return  # as if it was not called: an empty input never changes
        calls = found.setdefault(name, _Calls([]))
        if not calls.marks:
            mark = _mark(value)
            known = (place for place, (kept, at) in enumerate(alive) if kept() is value)
            calls.tensor = next((place for place in known if alive[place][1] == mark), len(alive))
            if calls.tensor == len(alive) and isinstance(value, Tensor):
                alive.append((weakref.ref(value), mark))
            elif calls.tensor == len(alive):
                alive.append((lambda: None, mark))
        calls.marks.append(_mark(value))

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
            if name in changed:
                stack.callback(module.register_forward_hook(_change).remove)
        run()
    return found


def _change(module: nn.Module, args: Any, output: Any) -> Any:
    """Another output of the same shape."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    return output.roll(1, -1) * 1.5 + 1


def _mark(value: Any) -> Any:
    """What differs between tensors with different values; NaN differs from itself."""
    if not isinstance(value, Tensor):
        return None
    flat = value.detach().flatten().double()
    return tuple(value.shape), float(flat.sum()), float(flat.square().sum())


def _by_change(
    modules: Mapping[str, nn.Module],
    run: Callable[[], Any],
    clean: Mapping[str, _Calls],
    order: list[str],
) -> list[list[str]]:
    groups, rest = [], list(order)
    while len(rest) > 1:
        seen = _seen(modules, run, frozenset(rest))
        free = [name for name in rest if name in seen and seen[name].marks == clean[name].marks]
        groups.append(free or rest[:1])  # a layer that is called on its own output is never free
        rest = [name for name in rest if name not in groups[-1]]
    return [*groups, rest] if rest else groups


def _by_order(clean: Mapping[str, _Calls], order: list[str]) -> list[list[str]]:
    return [[*names] for _, names in groupby(order, key=lambda name: clean[name].tensor)]


def _level(clean: Mapping[str, _Calls], names: list[str]) -> Level:
    """A level in which layers that read one tensor, once each, are together."""
    inputs: dict[Any, list[str]] = {}
    for name in names:
        once = len(clean[name].marks) == 1
        inputs.setdefault(clean[name].tensor if once else name, []).append(name)
    once = all(len(clean[name].marks) == 1 for name in names)
    return Level(tuple(map(tuple, inputs.values())), once)


def _single(names: list[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _by_template(missed: list[str], levels: list[Level]) -> list[list[str]]:
    """Layers that a batch does not reach, by the level of a layer whose name differs in numbers.

    The last element has those without such a layer.
    """
    level_of = {
        _template(name): place for place, level in enumerate(levels) for name in level.names
    }
    found: list[list[str]] = [[] for _ in (*levels, None)]
    for name in missed:
        found[level_of.get(_template(name), -1)].append(name)
    return found


def _template(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
