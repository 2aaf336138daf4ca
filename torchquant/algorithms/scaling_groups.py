"""Finds the layers whose inputs can be scaled, and the norm or layer that takes the scales up.

A forward of each batch is watched (:mod:`torchquant.algorithms.scaling_flow`), so nothing depends
on the classes or the names of modules. Every group that is found is then checked: channels are
multiplied by random powers of two, which costs no rounding, and the model must still compute the
same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward, outputs_of
from torchquant.algorithms.channel_flow import Channels, See
from torchquant.algorithms.fold import FoldUndo, ScalingGroup, fold
from torchquant.algorithms.labels import UNLABELLED, common_owner, names_of, owner_of
from torchquant.algorithms.scaling_flow import ScalingFlow
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import LINEAR, kind_of

__all__ = ["ScalingGroups", "find_scaling_groups", "output_difference"]

TOLERANCE = 1e-5  # of the model's outputs, relative to their greatest magnitude
_TOGETHER = 32  # groups that are checked in one forward


@dataclass(frozen=True)
class ScalingGroups:
    """What :func:`find_scaling_groups` found.

    Attributes:
        groups: the groups, in the order of the calls of their producers.
        reasons: why a linear layer is in no group, by its name.

    Example:
        >>> ScalingGroups((), {"fc": "no norm and no linear layer produces its input"}).reasons
        {'fc': 'no norm and no linear layer produces its input'}
    """

    groups: tuple[ScalingGroup, ...]
    reasons: Mapping[str, str]


@torch.no_grad()
def find_scaling_groups(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None = None,
    *,
    who: str = "find_scaling_groups",
    see: See | None = None,
) -> ScalingGroups:
    """Find the layers of a model whose input channels can be scaled without changing the model.

    Args:
        model: a float model; it stays as it is.
        batches: as for :func:`torchquant.calibrate`, at least one. All are watched, because one
            may take another path than the first.
        forward: takes the model and a batch, and calls the model.
        who: the verb, with which messages start.
        see: called with the name of a weight and float ``[rows, K]`` for each input that the weight
            reads.

    Returns:
        Groups that were checked with the first batch, and reasons for the other layers.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> found = find_scaling_groups(model, [torch.randn(2, 4)])
        >>> [(group.layers, group.producer, group.kind) for group in found.groups]
        [(('1',), '0', 'norm'), (('3',), '1', 'linear')]
    """
    parameters = names_of(model)
    flow = ScalingFlow(parameters, see)
    expected: list[Tensor] = []
    for index, batch in enumerate(batches):
        with flow:
            outputs = outputs_of(who, model, batch, forward)
        flow.finish(outputs)
        if index == 0:
            expected = outputs
    found = _Found(flow, parameters)
    groups = list(found.groups())

    def same() -> str | None:
        difference = output_difference(expected, outputs_of(who, model, batches[0], forward))
        if difference <= TOLERANCE:
            return None
        return f"the outputs of the model would change by {difference:.1e}"

    kept: list[ScalingGroup] = []
    refused: dict[str, str] = {}
    for start in range(0, len(groups), _TOGETHER):
        for group, reason in _checked(model, groups[start : start + _TOGETHER], same):
            if reason is None:
                kept.append(group)
            else:
                refused.update(dict.fromkeys(group.layers, reason))
    grouped = {name for group in kept for name in group.layers}
    reasons = {
        name: refused.get(name) or found.reason(name)
        for name, module in model.named_modules()
        if name not in grouped and is_float_linear(module)
    }
    return ScalingGroups(tuple(kept), reasons)


def is_float_linear(module: nn.Module) -> bool:
    """True for a linear layer that is not quantized yet.

    Example:
        >>> is_float_linear(nn.Linear(2, 2)), is_float_linear(nn.Conv1d(2, 2, 1))
        (True, False)
    """
    quantized = isinstance(module, (QuantizedModule, TrainedModule))
    return not quantized and kind_of(module) is LINEAR


def output_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The greatest difference of outputs, relative to the greatest magnitude of each output.

    Infinite where one of them has another number of outputs, or a NaN that the other does not have.

    Example:
        >>> output_difference([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -3.0])])
        0.25
    """
    if [t.shape for t in expected] != [t.shape for t in actual]:
        return float("inf")
    worst = 0.0
    for before, after in zip(expected, actual, strict=True):
        before, after = before.detach(), after.detach()
        if before.numel() == 0 or torch.equal(before, after):
            continue
        if not (before.is_floating_point() or before.is_complex()):
            return float("inf")
        same = (before == after) | (before.isnan() & after.isnan())
        apart = float((before - after).abs().double().where(~same, 0.0).max())
        finite = before.abs().double().where(before.isfinite(), 0.0)
        most = float(finite.max())
        if apart:  # 0 if all values are NaN in both
            worst = max(worst, apart / most if most else float("inf"))
        if apart != apart:
            return float("inf")
    return worst


@dataclass(frozen=True)
class _Reading:
    """The dimension of a weight that is summed over, and the free channels that it reads."""

    axis: int
    labels: Tensor


def _checked(
    model: nn.Module, groups: Sequence[ScalingGroup], same: Any
) -> Iterator[tuple[ScalingGroup, str | None]]:
    """Each group with the reason why folding changes the model; None where it does not."""
    if not groups:
        return
    reason = _trial(model, groups, same)
    if reason is None or len(groups) == 1:
        yield from ((group, reason) for group in groups)
        return
    middle = len(groups) // 2
    yield from _checked(model, groups[:middle], same)
    yield from _checked(model, groups[middle:], same)


def _trial(model: nn.Module, groups: Sequence[ScalingGroup], same: Any) -> str | None:
    """Fold random powers of two, compare the outputs, and undo it."""
    generator = torch.Generator().manual_seed(0)
    undos: list[FoldUndo] = []
    try:
        for group in groups:
            powers = torch.randint(-2, 3, (group.count,), generator=generator)
            factors = torch.exp2(powers.double())[group.channels.clamp(min=0)]
            undos.append(fold(model, group, group.free(factors)))
        reason: str | None = same()
        return reason
    finally:
        for undo in reversed(undos):
            undo.restore()


class _Found:
    """Groups from what a :class:`ScalingFlow` saw."""

    def __init__(self, flow: ScalingFlow, parameters: Mapping[str, Tensor]) -> None:
        self.flow, self.parameters = flow, parameters
        self.readings: dict[str, _Reading] = {}  # without the labels of blocked channels
        self._settle()

    def groups(self) -> Iterator[ScalingGroup]:
        """All groups; layers that read different channels of a producer are different groups."""
        for name, channels in self.flow.channels.items():
            for columns, readers in self._readers(channels):
                layers = tuple(dict.fromkeys(owner_of(reader) for reader, _ in readers))
                written = tuple((key, *value) for key, value in channels.written.items())
                yield ScalingGroup(
                    layers,
                    owner_of(name),
                    channels.kind,
                    columns,
                    channels.count,
                    tuple(readers),
                    written,
                )

    def reason(self, layer: str) -> str:
        """Why a layer is in no group."""
        weight = f"{layer}.weight" if layer else "weight"
        if weight not in self.parameters:
            return "it shares its weight with another module"
        if not self.flow.reached(weight):
            return "no batch reached it"
        if weight not in self.flow.readings:
            return f"its weight is not multiplied by rows: {self.flow.uses[weight] or 'unknown'}"
        for reading in self.flow.readings[weight]:
            for number in reading.labels.unique().tolist():
                if number in self.flow.blocked:
                    owner = owner_of(self.flow.owner(number))
                    return f"it reads {owner}, and {self.flow.blocked[number]}"
            if reading.after is not None:
                return f"{reading.after} stands before it, which scales do not pass"
        return "no norm and no linear layer produces its input"

    # ------------------------------------------------------------ what can be scaled

    def _settle(self) -> None:
        """Block channels until what is left is consistent."""
        self._block_parameters()
        self._block_unreached()
        while True:
            before = len(self.flow.blocked)
            for name in self.flow.readings:
                self._one_reading(name)
            for channels in self.flow.channels.values():
                self._disjoint(channels)
            if len(self.flow.blocked) == before:
                return

    def _block(self, numbers: Iterable[int], reason: str) -> None:
        for number in numbers:
            if number >= 0:
                self.flow.blocked.setdefault(number, reason)

    def _block_parameters(self) -> None:
        """Parameters that are used in ways that the labels do not follow, or that two scale."""
        writers: dict[str, list[Channels]] = {}
        for channels in self.flow.channels.values():
            for name in channels.written:
                writers.setdefault(name, []).append(channels)
        for name, found in writers.items():
            for channels in found:
                numbers = channels.numbers()
                if self.flow.uses.get(name) is not None:
                    self._block(numbers, f"{name} is used elsewhere: {self.flow.uses[name]}")
                if len(found) > 1:
                    self._block(numbers, f"{name} belongs to several layers")
        for name, readings in self.flow.readings.items():
            if self.flow.uses.get(name) is not None:
                reason = f"{name} is used elsewhere: {self.flow.uses[name]}"
                for reading in readings:
                    self._block(reading.labels.tolist(), reason)

    def _one_reading(self, name: str) -> None:
        """All calls that read a weight must read the same channels."""
        readings = self.flow.readings[name]
        axis = readings[0].axis
        free = [self._free(reading.labels) for reading in readings]
        for reading, labels in zip(readings[1:], free[1:], strict=True):
            if reading.axis != axis or not torch.equal(labels, free[0]):
                for one in free:
                    self._block(one.tolist(), f"{name} reads other channels in another call")
        self.readings[name] = _Reading(axis, self._free(readings[0].labels))

    def _free(self, labels: Tensor) -> Tensor:
        """Labels without those of blocked channels."""
        blocked = self.flow.blocked
        kept = [UNLABELLED if number in blocked else number for number in labels.tolist()]
        return torch.tensor(kept, dtype=torch.int64)

    def _readers(self, channels: Channels) -> list[tuple[Tensor, list[tuple[str, int]]]]:
        """The columns that read the channels of a producer, with the weights that have them."""
        found: list[tuple[Tensor, list[tuple[str, int]]]] = []
        for name, reading in self.readings.items():
            labels = reading.labels
            own = channels.have(labels)
            if not bool(own.any()):
                continue
            columns = torch.where(own, labels - channels.first, UNLABELLED)
            for other, readers in found:
                if torch.equal(other, columns):
                    readers.append((name, reading.axis))
                    break
            else:
                found.append((columns, [(name, reading.axis)]))
        return found

    def _disjoint(self, channels: Channels) -> None:
        """Block channels that some layers read in one order and other layers in another one."""
        seen: set[int] = set()
        for columns, _ in self._readers(channels):
            used = set(columns[columns >= 0].tolist())
            self._block(
                (number + channels.first for number in used & seen),
                "layers read it in different orders",
            )
            seen |= used

    def _block_unreached(self) -> None:
        """A layer that no batch reached may read the channels, too."""
        unreached = [
            name
            for name, parameter in self.parameters.items()
            if parameter.dim() > 1 and not self.flow.reached(name)
        ]
        if not unreached:
            return
        for name, channels in self.flow.channels.items():
            numbers = channels.numbers()
            readers = [
                reader
                for reader, readings in self.flow.readings.items()
                if any(bool(channels.have(reading.labels).any()) for reading in readings)
            ]
            if not readers:
                continue
            owner = common_owner(owner_of(one) for one in (name, *readers))
            for other in unreached:
                inside = not owner or other.startswith(f"{owner}.")
                if inside and channels.count in self.parameters[other].shape:
                    self._block(numbers, f"no batch reached {owner_of(other)}, which may read it")
