"""Blocks: modules that a forward calls one after the other, each on the result of the one before.

The layers of a transformer are blocks, and so are the stages of a convolutional network. They are
found by watching one batch, not by names: the elements of an ``nn.ModuleList`` or
``nn.Sequential`` are blocks if the forward calls each of them once and in order, and passes the
first tensor of each result to the next one as its first tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.modules import has_hooks

__all__ = ["Blocks", "find_blocks", "first_tensor", "first_tensor_place", "same_arguments"]

_LEAST_LAYERS = 4  # fewer layers are reached faster than the values between blocks are kept
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Key = int | str  # of an argument: by position or by name


@dataclass(frozen=True)
class Blocks:
    """A sequence of blocks.

    Attributes:
        names: the names of the blocks below the module in which they were found.
        alike: True if all blocks get the same objects as arguments, besides the first tensor.
        single: True if each block returns one tensor and nothing else.

    Example:
        >>> Blocks(("layers.0", "layers.1"), True, True).of(nn.ModuleDict({
        ...     "layers": nn.ModuleList([nn.ReLU(), nn.GELU()])}))
        [ReLU(), GELU(approximate='none')]
    """

    names: tuple[str, ...]
    alike: bool
    single: bool

    def of(self, root: nn.Module) -> list[nn.Module]:
        """The blocks as modules."""
        return [root.get_submodule(name) for name in self.names]


def find_blocks(
    root: nn.Module, run: Callable[[], Any], layers: Iterable[nn.Module]
) -> list[Blocks]:
    """Find the outermost sequences of blocks in a module.

    Args:
        root: the module.
        run: calls the forward of the module with a batch, or of a model that has it.
        layers: the layers that shall be compressed; sequences with few of them are left out.

    Returns:
        Sequences without common modules, in the order of their first calls.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> find_blocks(model, lambda: model(torch.ones(1, 8)), [*model])
        [Blocks(names=('0', '1', '2', '3'), alike=True, single=True)]
    """
    wanted = {id(layer) for layer in layers}
    watches = []
    for name, module in root.named_modules():
        names = [*_elements(name, module)]
        elements = [root.get_submodule(one) for one in names]
        if _may_be_blocks(elements, wanted):
            watches.append(_Watch(names, elements))
    if not watches:
        return []
    order: list[_Watch] = []
    with ExitStack() as stack:
        for watch in watches:
            watch.start(stack, order)
        run()
    found: list[_Watch] = []
    for watch in watches:  # a module comes before those that it holds
        inside = any(watch.is_inside(other) for other in found)
        if watch.holds and len(watch.elements) == watch.calls and not inside:
            found.append(watch)
    found.sort(key=order.index)
    return [Blocks(tuple(watch.names), watch.alike, watch.single) for watch in found]


def first_tensor_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
    """Where the first tensor of a call's arguments is, or None.

    Example:
        >>> first_tensor_place((None, torch.ones(1)), {}), first_tensor_place((), {"x": 3})
        (1, None)
    """
    values: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    return next((place for place, value in values if isinstance(value, Tensor)), None)


def first_tensor(result: Any) -> Tensor | None:
    """The first tensor of a result: itself, or the first element of a tuple, a list or a mapping.

    Example:
        >>> first_tensor((torch.ones(1), None)), first_tensor([None, torch.ones(1)])
        (tensor([1.]), None)
    """
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    return result if isinstance(result, Tensor) else None


def same_arguments(first: Arguments, other: Arguments) -> bool:
    """True if two calls have the same objects or equal plain values, besides the first tensor.

    Example:
        >>> mask = torch.ones(2)
        >>> same_arguments(((mask, mask, 1), {}), ((mask + 1, mask, 1), {}))
        True
        >>> same_arguments(((mask, mask), {}), ((mask, mask + 1), {}))
        False
    """
    rest = []
    for args, kwargs in (first, other):
        place = first_tensor_place(args, kwargs)
        values = {key: value for key, value in (*enumerate(args), *kwargs.items()) if key != place}
        rest.append((place, values))
    (place, values), (other_place, other_values) = rest
    if place != other_place or values.keys() != other_values.keys():
        return False
    return all(_same(value, other_values[key]) for key, value in values.items())


class _Watch:
    """What a forward does with the elements of one container."""

    def __init__(self, names: list[str], elements: list[nn.Module]) -> None:
        self.names, self.elements = names, elements
        self.calls = 0
        self.holds = self.alike = self.single = True
        self._first: Arguments = ((), {})
        self._last: tuple[Any, int | None] = None, None  # no result yet

    def start(self, stack: ExitStack, order: list[_Watch]) -> None:
        """Watch the calls of the elements until the stack is closed."""
        for place, element in enumerate(self.elements):

            def before(_: Any, args: Any, kwargs: Any, place: int = place) -> None:
                if not self.calls:
                    order.append(self)
                self._before(place, args, kwargs)

            def after(_: Any, args: Any, result: Any) -> None:
                self._after(result)

            handles = (
                element.register_forward_pre_hook(before, with_kwargs=True),
                element.register_forward_hook(after),
            )
            for handle in handles:
                stack.callback(handle.remove)

    def is_inside(self, other: _Watch) -> bool:
        """True if the elements are parts of another container's elements."""
        return any(
            self.elements[0] is module for element in other.elements for module in element.modules()
        )

    def _before(self, place: int, args: Any, kwargs: Any) -> None:
        where = first_tensor_place(args, kwargs)
        self.holds &= place == self.calls and where is not None
        self.calls += 1
        if not self.holds or where is None:
            return
        if place == 0:
            self._first = args, kwargs
            return
        value = args[where] if isinstance(where, int) else kwargs[where]
        last, version = self._last
        self.holds &= value is last and _version(value) == version
        self.alike &= same_arguments(self._first, (args, kwargs))

    def _after(self, result: Any) -> None:
        value = first_tensor(result)
        self.holds &= value is not None
        self.single &= isinstance(result, Tensor)
        self._last = value, _version(value)


def _elements(name: str, module: nn.Module) -> Iterator[str]:
    """The names of the elements of a container; a plain sequence in it stands for its elements."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return
    for key, child in module._modules.items():
        path = f"{name}.{key}".lstrip(".")
        plain = type(child) is nn.Sequential and len(child) > 0 and not has_hooks(child)
        if child is not None:
            yield from _elements(path, child) if plain else (path,)


def _may_be_blocks(elements: list[nn.Module], wanted: set[int]) -> bool:
    """True if modules are distinct and hold enough layers, none of them in two."""
    held = [{id(m) for m in element.modules()} & wanted for element in elements]
    layers = sum(map(len, held))
    distinct = len({id(element) for element in elements}) == len(elements)
    several = sum(map(bool, held)) > 1
    return distinct and several and layers >= _LEAST_LAYERS and len(set().union(*held)) == layers


def _same(first: Any, other: Any) -> bool:
    if first is other:
        return True
    if isinstance(first, (tuple, list)) and type(first) is type(other):
        return len(first) == len(other) and all(map(_same, first, other))
    plain = (bool, int, float, str, torch.dtype, torch.device)
    return isinstance(first, plain) and type(first) is type(other) and first == other


def _version(value: Any) -> int | None:
    counts = isinstance(value, Tensor) and not value.is_inference()
    return value._version if counts else None
