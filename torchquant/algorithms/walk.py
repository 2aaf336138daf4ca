"""The walk: layers of a model are compressed in the order of their calls, block by block.

Each layer is compressed with what it reads in a model whose layers before it have their integers
already. Blocks (:mod:`torchquant.algorithms.blocks`) are run alone, on the values that the block
before gave, so that memory holds one tensor for each batch, beside the other arguments of the
blocks, and the statistics of few layers. It also holds what was found so far. In a block,
layers that do not depend on each other are one stage (:mod:`torchquant.algorithms.levels`).

Processes share the batches by the lanes of :mod:`torchquant.algorithms.hessian`, and the layers of
a stage in turn. They take all decisions together, so that each has the bits of a process alone with
the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchquant.algorithms.block_inputs import BlockInputs, runs_alone
from torchquant.algorithms.blocks import Blocks, find_blocks
from torchquant.algorithms.collect import Collector, Method, Run
from torchquant.algorithms.found import Found
from torchquant.algorithms.hessian import LANES, lanes_of
from torchquant.algorithms.levels import Level, levels_of
from torchquant.algorithms.places import Place
from torchquant.algorithms.resume import Results
from torchquant.algorithms.together import agreed, every, from_process, in_all, place_among
from torchquant.report.progress import track

__all__ = ["walk"]

_MOST_MEMORY = 1 << 30  # of the statistics that are collected at the same time, in bytes
_COLUMNS = 100_000  # of a convolution, over all batches


@torch.no_grad()
def walk(
    who: str,
    model: nn.Module,
    places: Sequence[Place],
    run: Run,
    batches: int,
    method: Method,
    *,
    samples: int = 1,
    by_order: bool = False,
    offload: Path | None = None,
    results: Results | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Found], list[str]]:
    """Find the integers of layers one after the other, each with what it reads behind the others.

    The model is the same after the walk, also if the walk fails.

    Args:
        who: the verb, which the progress bar names.
        model: the model that ``run`` calls.
        places: the layers.
        run: takes the number of a batch, and calls the model with this batch.
        batches: the number of batches.
        method: collects statistics, and finds integers with them.
        samples: the number of samples in all batches; of convolutions with many places for each
            sample, the statistics take some.
        by_order: see :func:`torchquant.algorithms.levels.levels_of`.
        offload: a folder for the values between blocks; None keeps them in memory.
        results: what an interrupted walk found, and where to keep what this one finds.
        progress: see :func:`torchquant.report.progress.track`.

    Returns:
        What was found for each layer by its name, and notes for the report.

    Example:
        >>> from torchquant.algorithms.places import FloatPlace
        >>> from torchquant.configs import QuantizationConfig
        >>> from torchquant.convert.plan import find_layers
        >>> class Count:
        ...     rows = 0
        ...     def add(self, batch, columns):
        ...         self.rows += columns.shape[-1]
        ...     def reduce(self): ...
        >>> class Nearest:
        ...     def statistics(self, place):
        ...         return Count()
        ...     def memory(self, place):
        ...         return 0
        ...     def compress(self, place, statistics):
        ...         return Found(None, "rounded", f"saw {statistics.rows} rows")
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> steps = find_layers(net)
        >>> for step in steps:
        ...     step.config = QuantizationConfig()
        >>> x = torch.randn(4, 8)
        >>> places = [*map(FloatPlace, steps)]
        >>> found, notes = walk("verb", net, places, lambda batch: net(x), 2, Nearest())
        >>> found["2"].reason
        'saw 8 rows'
    """
    modes = [(module, module.training) for module in model.modules()]
    most = max(1, _COLUMNS // max(1, samples))
    try:
        model.eval()
        walker = _Walk(method, most, by_order, offload, results)
        lanes = lanes_of(*place_among())
        own = [batch for lane in lanes for batch in range(lane, batches, LANES)]
        with closing(walker.scope(model, "", list(places), run, own)) as steps:
            for _ in track(steps, who, progress, total=len(places)):
                pass
        return walker.found, walker.notes
    finally:
        for place in places:
            place.restore()
        for module, mode in modes:
            module.training = mode


class _Walk:
    """A walk through the scopes of a model: the model, and blocks in it."""

    def __init__(
        self,
        method: Method,
        most: int,
        by_order: bool,
        offload: Path | None,
        results: Results | None,
    ) -> None:
        self.method, self.most, self.by_order = method, most, by_order
        self.offload, self.results = offload, results
        self.found: dict[str, Found] = {}
        self.notes: list[str] = []
        self._levels: dict[Any, list[Level]] = {}  # of blocks that are built in the same way

    def scope(
        self, root: nn.Module, name: str, places: list[Place], run: Run, batches: list[int]
    ) -> Generator[str]:
        """Compress the layers of a module; yields the name of each layer that is done.

        Args:
            root: the module.
            name: its name in the model.
            places: its layers.
            run: takes the number of a batch, and calls the module.
            batches: the batches of this process.
        """
        with ExitStack() as stack:
            done: list[BlockInputs] = []
            run = partial(_run_without, run, done)
            sequences, order = agreed(lambda: self._parts(root, name, places, run, batches))
            for part in order:
                if isinstance(part, int):
                    blocks = sequences[part]
                    inputs = in_all(partial(BlockInputs, blocks, root, run, batches, self.offload))
                    stack.callback(inputs.close)
                    last = part == order[-1]
                    yield from self._blocks(root, name, places, inputs, last)
                    if blocks.single and not last:
                        done.append(inputs)
                    else:
                        inputs.close()
                else:
                    mine = [place for place in places if place.name in part]
                    yield from self._layers(root, name, mine, run, batches)

    def _parts(
        self, root: nn.Module, name: str, places: list[Place], run: Run, batches: list[int]
    ) -> tuple[list[Blocks], list[Any]]:
        """Sequences of blocks, and their numbers and the names of other layers in call order."""
        names = [place.name for place in places]
        if not batches:
            return [], [names]
        once = partial(run, batches[0])
        found = find_blocks(root, once, [place.module for place in places])
        sequences = []
        for blocks in found:
            if runs_alone(blocks, root, run, batches[0]):
                sequences.append(blocks)
            else:
                first = f"{name}.{blocks.names[0]}".lstrip(".")
                self.notes.append(
                    f"The model is run as a whole for each layer of the blocks from {first} on, "
                    "because a block that runs alone gives other values or raises an error."
                )
        if not sequences:
            return [], [names]
        blocks_of = [{id(m) for e in s.of(root) for m in e.modules()} for s in sequences]
        rest = [place for place in places if not any(id(place.module) in b for b in blocks_of)]
        watched: dict[Any, nn.Module] = {place.name: place.module for place in rest}
        watched.update((number, s.of(root)[0]) for number, s in enumerate(sequences))
        called = _call_order(watched, once)
        order: list[Any] = []
        for key in [*called, *(place.name for place in rest if place.name not in called)]:
            if isinstance(key, int):
                order.append(key)
            elif order and isinstance(order[-1], list):
                order[-1].append(key)
            else:
                order.append([key])
        return sequences, order

    def _blocks(
        self, root: nn.Module, name: str, places: list[Place], inputs: BlockInputs, last: bool
    ) -> Iterator[str]:
        """Compress the layers of blocks, and run each block on all batches."""
        held = []
        for element in inputs.elements:
            inside = {id(module) for module in element.modules()}
            held.append([place for place in places if id(place.module) in inside])
        for number, element in enumerate(inputs.elements):
            path = f"{name}.{inputs.blocks.names[number]}".lstrip(".")
            if held[number]:
                run = partial(inputs.run, number)
                yield from self.scope(element, path, held[number], run, inputs.batches)
            if last and not any(held[number + 1 :]):
                return
            in_all(partial(inputs.advance, number))

    def _layers(
        self, root: nn.Module, name: str, places: list[Place], run: Run, batches: list[int]
    ) -> Iterator[str]:
        """Compress layers that are in no inner block, level by level."""
        below = {place.name.removeprefix(f"{name}."): place for place in places}
        parts = tuple((path, place.kind, place.shape) for path, place in below.items())
        key = (type(root), parts)
        if key not in self._levels:
            modules = {path: place.module for path, place in below.items()}
            self._levels[key] = agreed(lambda: self._find_levels(modules, run, batches))
        for level in self._levels[key]:
            for inputs in self._fitting(level, below):
                yield from self._stage(inputs, level.once, below, run, batches)

    def _find_levels(
        self, modules: Mapping[str, nn.Module], run: Run, batches: list[int]
    ) -> list[Level]:
        if not batches:
            return [Level(tuple((path,) for path in modules), False)]
        return levels_of(modules, partial(run, batches[0]), by_order=self.by_order)

    def _fitting(
        self, level: Level, below: Mapping[str, Place]
    ) -> Iterator[tuple[tuple[str, ...], ...]]:
        """The inputs of a level in parts whose statistics fit in memory."""
        part: list[tuple[str, ...]] = []
        size = 0
        for names in level.inputs:
            more = self.method.memory(below[names[0]])
            if part and size + more > _MOST_MEMORY:
                yield tuple(part)
                part, size = [], 0
            part.append(names)
            size += more
        yield tuple(part)

    def _stage(
        self,
        inputs: tuple[tuple[str, ...], ...],
        once: bool,
        below: Mapping[str, Place],
        run: Run,
        batches: list[int],
    ) -> Iterator[str]:
        """Compress layers that do not depend on each other."""
        places = {name: below[name] for names in inputs for name in names}
        full = [place.name for place in places.values()]
        found = None
        if self.results is not None:
            found = agreed(partial(self.results.load, full))
        if found is None:
            statistics = self._collect(inputs, once, places, run, batches)
            number, processes = place_among()
            made = in_all(partial(self._compress, places, statistics, number, processes))
            del statistics
            every_one = [from_process(one, at % processes) for at, one in enumerate(made)]
            found = dict(zip(full, every_one, strict=True))
            if self.results is not None:
                save = partial(self.results.save, found)
                in_all(save if number == 0 else lambda: None)
        for place in places.values():
            one = self.found[place.name] = found[place.name]
            place.install(one.adjustment)
            yield place.name

    def _compress(
        self, places: Mapping[str, Place], statistics: dict[str, Any], number: int, processes: int
    ) -> list[Found | None]:
        """What this process finds: every so many layers; None for the others."""
        return [
            self.method.compress(place, statistics[path]) if at % processes == number else None
            for at, (path, place) in enumerate(places.items())
        ]

    def _collect(
        self,
        inputs: tuple[tuple[str, ...], ...],
        once: bool,
        places: Mapping[str, Place],
        run: Run,
        batches: list[int],
    ) -> dict[str, Any]:
        """The statistics of layers; those that read the same tensor have the same ones."""
        collector = Collector(self.method, inputs, places, once, self.most)
        in_all(partial(collector.run, run, batches))
        if any(every(collector.apart)):  # in one of the batches, they read other tensors
            inputs = tuple((name,) for names in inputs for name in names)
            collector = Collector(self.method, inputs, places, once, self.most)
            in_all(partial(collector.run, run, batches))
        for names in inputs:
            collector.statistics[names[0]].reduce()
        return {name: collector.statistics[names[0]] for names in inputs for name in names}


def _run_without(run: Run, done: Sequence[BlockInputs], batch: int) -> Any:
    """Run a module in which finished blocks give their last results at once."""
    with ExitStack() as stack:
        for inputs in done:
            if batch in inputs.batches:
                stack.enter_context(inputs.skipped(batch))
        return run(batch)


def _call_order(modules: Mapping[Any, nn.Module], run: Callable[[], Any]) -> list[Any]:
    """The keys of modules in the order of their first calls."""
    order: dict[Any, None] = {}
    with ExitStack() as stack:
        for key, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda _, args, key=key: order.setdefault(key)
            )
            stack.callback(handle.remove)
        run()
    return [*order]
