"""The records of a forward in evaluation mode and in training mode.

Most forwards make the same calls in both modes: what differs happens inside of modules such as
dropout and batch norm, which a record calls as modules. Others differ: an auxiliary head that only
training computes, a functional dropout, a branch that is dropped at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from torchquant.chains.arguments import arguments_of
from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.guard import Expected, reads_mode
from torchquant.chains.operations import Operation, Same, Shape
from torchquant.configs import Static
from torchquant.graph.in_place import without_in_place
from torchquant.graph.trace import Trace, Untraceable, trace

Test = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Record:
    """A record, and the mode for which it holds.

    Args:
        trace: the calls.
        training: the mode of the modules whose forwards were followed; None for both modes.
        drops: the indices of calls that evaluation does not make, or makes without effect, and
            that drop values at random in training.
    """

    trace: Trace
    training: bool | None = None
    drops: frozenset[int] = frozenset()


def both_modes(root: nn.Module, evaluation: Trace, is_leaf: Test) -> tuple[Record, ...]:
    """One record that holds in both modes, or one for evaluation and one for training.

    Args:
        root: the module.
        evaluation: the record of its forward in evaluation mode.
        is_leaf: as for :func:`torchquant.graph.trace.trace`.

    Raises:
        Untraceable: the forward cannot be recorded in training mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
        >>> [record.training for record in both_modes(net, trace(net, lambda m: True),
        ...                                           lambda module: True)]
        [None]
    """
    dropping = {id(module) for module in _identities(root, evaluation)}

    def is_entry(module: nn.Module) -> bool:
        return is_leaf(module) or id(module) in dropping

    try:
        found = without_in_place(trace(root, is_entry, training=True), root)
    except Untraceable as reason:
        raise Untraceable(f"in training mode, {reason}") from None
    same = found.calls == evaluation.calls and found.result == evaluation.result
    if same and found.scopes == evaluation.scopes:
        return (Record(evaluation),)
    drops = frozenset(_drops(root, found, dropping))
    return Record(evaluation, False), Record(found, True, drops)


def _identities(root: nn.Module, record: Trace) -> Iterator[nn.Module]:
    """The modules that return their argument in evaluation mode, and read the mode."""
    calls: dict[str, bool] = {}
    for scope in record.scopes:
        same = scope.start == scope.end and scope.args[:1] == (scope.result,)
        calls[scope.path] = same and calls.get(scope.path, True)
    for path, same in calls.items():
        module = root.get_submodule(path)
        if same and path and reads_mode(module):
            yield module


def _drops(root: nn.Module, record: Trace, dropping: set[int]) -> Iterator[int]:
    for index, call in enumerate(record.calls):
        if call.kind == "module":
            if id(root.get_submodule(call.target)) in dropping:
                yield index
        elif call.kind in ("function", "method"):
            name, values = arguments_of(call, None)
            if name == "dropout" and values is not None and values.get("training", True) is True:
                yield index


class ModeExpected(Expected):
    """What has to stay as it is for a record to hold.

    Modules that a record calls as one entry may be in any mode.

    Args:
        root: the module.
        record: a record of its forward.
    """

    def __init__(self, root: nn.Module, record: Record) -> None:
        super().__init__(root, record.trace)
        scopes = (root.get_submodule(scope.path) for scope in record.trace.scopes)
        followed = {id(root), *map(id, scopes)}
        found = []
        for one in self.of_modules:
            if not one.is_mode:
                found.append(one)
            elif record.training is not None and id(one.owner) in followed:
                found.append(replace(one, value=record.training))
        self.of_modules = found
        self._make(self.of_code or [])


class TrainingBatch(FirstBatch):
    """The first batch of a record of training mode, in which what is dropped is an identity."""

    drops: frozenset[int] = frozenset()

    def operations(
        self, activations: Mapping[str, Static], shapes: Sequence[Shape] | None = None
    ) -> list[Operation]:
        """What each call computes."""
        found = super().operations(activations, shapes)
        return [Same() if index in self.drops else one for index, one in enumerate(found)]
