"""Shows what layers read to their statistics, in a forward that ends as soon as all have read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from torchquant.algorithms.batches import Enough
from torchquant.algorithms.consecutive import dimensions
from torchquant.algorithms.found import Found
from torchquant.algorithms.inputs import columns
from torchquant.algorithms.places import Place

__all__ = ["Collector", "Method", "Statistics"]

Run = Callable[[int], Any]  # takes the number of a batch, and calls a module with it


class Statistics(Protocol):
    """What a method collects about the inputs of a layer.

    Example:
        >>> from torchquant.algorithms.hessian import Hessian
        >>> statistics: Statistics = Hessian(64)
    """

    def add(self, batch: int, columns: Tensor) -> None:
        """Add the inputs of a batch as :func:`torchquant.algorithms.inputs.columns` has them.

        The batches come lane by lane; see :mod:`torchquant.algorithms.hessian`.
        """

    def reduce(self) -> None:
        """Add what the other processes have collected."""


class Method(Protocol):
    """How the integers of a layer are found; see the example of :class:`Collector`.

    Example:
        >>> [name for name in ("compress", "memory", "statistics") if name in vars(Method)]
        ['compress', 'memory', 'statistics']
    """

    def statistics(self, place: Place) -> Any:
        """Empty statistics for a layer, and for others that read the same tensors."""

    def memory(self, place: Place) -> int:
        """The greatest number of bytes that the statistics of a layer take."""

    def compress(self, place: Place, statistics: Any) -> Found:
        """The integers of a layer; this does not change the layer."""


class Collector:
    """Shows the inputs of layers to their statistics.

    Args:
        method: makes the statistics.
        inputs: the names of the layers; those that read the same tensor are one element.
        places: the layers by name.
        once: whether the forward may end when each layer has been called once.
        most: the greatest number of inputs of a convolution for each sample.

    Attributes:
        statistics: by the first name of each element of ``inputs``.
        apart: True if layers that should read the same tensor did not; the statistics are then
            useless.

    Example:
        >>> import torch
        >>> from torchquant.algorithms.hessian import Hessian
        >>> from torchquant.configs import QuantizationConfig
        >>> class Method:
        ...     def statistics(self, place):
        ...         return Hessian.of(place.layer)
        >>> linear = nn.Linear(8, 4)
        >>> place = Place("fc", linear, QuantizationConfig(), linear)
        >>> collector = Collector(Method(), [("fc",)], {"fc": place}, True, 100)
        >>> collector.run(lambda batch: linear(torch.ones(3, 8)), range(2))
        >>> collector.statistics["fc"].rows
        6
    """

    def __init__(
        self,
        method: Method,
        inputs: Iterable[tuple[str, ...]],
        places: Mapping[str, Place],
        once: bool,
        most: int,
    ) -> None:
        self.places, self.once, self.most = places, once, most
        self.statistics = {names[0]: method.statistics(places[names[0]]) for names in inputs}
        self.leaders = {name: names[0] for names in inputs for name in names}
        self.apart = False
        self._read: dict[str, Any] = {}  # the tensors that leaders read in this batch
        self._called: set[str] = set()
        self._batch = 0

    def run(self, run: Run, batches: Iterable[int]) -> None:
        """Collect what the layers see in some batches."""
        with ExitStack() as stack:
            for name, place in self.places.items():
                hook = partial(self._see, name)
                handle = place.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for self._batch in batches:
                self._read.clear()
                self._called.clear()
                with suppress(Enough):
                    run(self._batch)
                if self.apart:
                    break
        self._read.clear()

    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        leader, place = self.leaders[name], self.places[name]
        shared = sum(1 for other in self.leaders.values() if other == leader) > 1
        if name == leader:
            self.apart |= shared and name in self._called
            self._read[name] = value
            if isinstance(value, Tensor):
                most = self.most if dimensions(place.layer) else None
                found = columns(place.layer, place.seen(value), most)
                self.statistics[name].add(self._batch, found)
        else:
            self.apart |= value is not self._read.get(leader) or name in self._called
        self._called.add(name)
        if self.apart or (self.once and len(self._called) == len(self.places)):
            raise Enough
