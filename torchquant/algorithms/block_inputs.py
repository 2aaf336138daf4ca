"""What each block of a sequence is called with, batch by batch, so that it can be run alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Enough
from torchquant.algorithms.between import Between
from torchquant.algorithms.blocks import Arguments, Blocks, first_tensor, first_tensor_place

__all__ = ["BlockInputs", "runs_alone"]

_TOLERANCE = 1e-3  # of the results of blocks that run alone, relative to the greatest one


class BlockInputs:
    """The inputs of blocks, of which one after the other is run on all batches.

    The first tensor of a block is the result of the block before. The other arguments are those of
    the forward that recorded them. Objects that a forward may change, such as a cache of keys and
    values, are copied for each run.

    Args:
        blocks: the sequence.
        root: the module that has the blocks.
        run: takes the number of a batch, and calls the forward of ``root`` with it.
        batches: the numbers of the batches.
        folder: see :class:`Between`.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        >>> batch = torch.ones(1, 2)
        >>> blocks = Blocks(("0", "1", "2"), True, True)
        >>> inputs = BlockInputs(blocks, model, lambda number: model(batch), [0])
        >>> for block in range(3):
        ...     inputs.advance(block)
        >>> torch.equal(inputs.values[0], model(batch))
        True
    """

    def __init__(
        self,
        blocks: Blocks,
        root: nn.Module,
        run: Callable[[int], Any],
        batches: Iterable[int],
        folder: Path | None = None,
    ) -> None:
        self.blocks, self._root = blocks, root
        self.values = Between(folder)
        self._calls: dict[int, list[Arguments]] = {}
        try:
            for batch in batches:
                self._record(batch, run)
        except BaseException:
            self.close()
            raise

    @property
    def elements(self) -> list[nn.Module]:
        """The blocks as the root has them now; a block that is a layer may have been replaced."""
        return self.blocks.of(self._root)

    @property
    def batches(self) -> list[int]:
        """The batches that reached the blocks."""
        return [*self._calls]

    def run(self, block: int, batch: int) -> Any:
        """Call a block with what it gets for a batch."""
        calls = self._calls[batch]
        args, kwargs = self._copied(calls[0 if self.blocks.alike else block], {})
        value = self.values[batch].clone()  # a block may change it in place
        args, kwargs = _with(args, kwargs, value)
        return self.elements[block](*args, **kwargs)

    def advance(self, block: int) -> None:
        """Run a block on all batches; its results are what the next block gets."""
        for batch in self.batches:
            value = first_tensor(self.run(block, batch))
            assert value is not None
            self.values[batch] = value

    @contextmanager
    def skipped(self, batch: int) -> Iterator[None]:
        """A context in which the forward of the root gets the last results without computing them.

        Only for blocks that each return one tensor, after the last :meth:`advance`.
        """
        elements = self.elements
        with ExitStack() as stack:
            for element in elements:
                stack.enter_context(_returning(element, element is elements[-1], self, batch))
            yield

    def close(self) -> None:
        """Release the values."""
        self.values.close()
        self._calls.clear()

    def _record(self, batch: int, run: Callable[[int], Any]) -> None:
        calls: list[Arguments] = []
        memo: dict[int, Any] = {}
        first: list[Tensor] = []
        recorded = self.elements[:1] if self.blocks.alike else self.elements

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is recorded[0]:
                value = _first(args, kwargs)
                first.append(value if self.blocks.alike else value.clone())
            empty = first[0].new_empty(0)  # stands for the first tensor, which would stay in memory
            args, kwargs = _with(args, kwargs, empty)
            calls.append(self._copied((args, kwargs), memo))
            if module is recorded[-1]:
                raise Enough

        with ExitStack() as stack:
            for element in recorded:
                handle = element.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            try:
                run(batch)
            except Enough:
                self.values[batch] = first[0]
                self._calls[batch] = calls

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        """Arguments with copies of what a forward may change; tensors and modules are the same."""
        if value is None or isinstance(value, (Tensor, nn.Module, bool, int, float, str)):
            return value
        if id(value) in memo:
            return memo[id(value)][1]
        if type(value) in (tuple, list):
            made: Any = type(value)(self._copied(item, memo) for item in value)
        elif type(value) is dict:
            made = {key: self._copied(item, memo) for key, item in value.items()}
        else:
            modules = {id(module): module for module in self._root.modules()}
            try:
                made = copy.deepcopy(value, modules)
            except Exception:  # an object that cannot be copied is passed as it is
                made = value
        memo[id(value)] = value, made  # the value, so that no other object gets its id
        return made


def runs_alone(blocks: Blocks, root: nn.Module, run: Callable[[int], Any], batch: int) -> bool:
    """True if blocks that run alone give the values that they give in a forward.

    False if one raises an exception when it runs alone. NaN counts as equal to NaN.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        >>> x = torch.ones(1, 2)
        >>> runs_alone(Blocks(("0", "1", "2"), True, True), model, lambda batch: model(x), 0)
        True
    """
    expected: list[Any] = []
    last = blocks.of(root)[-1]
    handle = last.register_forward_hook(lambda _, args, out: expected.append(first_tensor(out)))
    try:
        run(batch)
    finally:
        handle.remove()
    inputs = BlockInputs(blocks, root, run, [batch])
    with closing(inputs):
        try:
            for number in range(len(blocks.names)):
                inputs.advance(number)
        except Exception:  # the block needs what the forward around it does
            return False
        found = inputs.values[batch]
        (value,) = expected
        finite = value.detach()[value.isfinite()]
        atol = _TOLERANCE * float(finite.abs().max()) if finite.numel() else 0.0
        return found.shape == value.shape and torch.allclose(
            found, value, rtol=0.0, atol=atol, equal_nan=True
        )


@contextmanager
def _returning(element: nn.Module, last: bool, inputs: BlockInputs, batch: int) -> Iterator[None]:
    """A context in which an element returns its input, or the last results, without computing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if last:
            return inputs.values[batch].clone()
        return _first(args, kwargs)

    had = "forward" in element.__dict__
    before = element.__dict__.get("forward")
    element.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had:
            element.__dict__["forward"] = before
        else:
            del element.__dict__["forward"]


def _first(args: tuple[Any, ...], kwargs: Mapping[Any, Any]) -> Tensor:
    """The first tensor of a call's arguments."""
    where = first_tensor_place(args, dict(kwargs))
    value: Tensor = args[where] if isinstance(where, int) else kwargs[where]
    return value


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Arguments:
    """Arguments with another first tensor."""
    where = first_tensor_place(args, kwargs)
    if isinstance(where, int):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    assert where is not None
    return args, {**kwargs, where: value}
