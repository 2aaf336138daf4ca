"""The residual streams of a model that can be rotated, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward, outputs_of
from torchquant.algorithms.channel_flow import Reading
from torchquant.algorithms.labels import common_owner, owner_of
from torchquant.algorithms.stream_flow import StreamFlow
from torchquant.graph.modules import memory_key

__all__ = ["Gain", "Stream", "Streams", "find_streams"]


@dataclass(frozen=True)
class Gain:
    """The gain of a norm that reads a stream; its readers take it over.

    Attributes:
        name: name of the parameter.
        offset: what the model adds to the parameter.
        biases: names of the parameters that are added after the gain.
        readers: names of the weights that read the norm's result, each with the dimension that is
            summed over.

    Example:
        >>> Gain("norm.weight", 0.0, ("norm.bias",), (("fc.weight", 1),)).readers
        (('fc.weight', 1),)
    """

    name: str
    offset: float
    biases: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stream:
    """A tensor that layers write and others read, in one basis.

    Attributes:
        name: the module that writes it first.
        count: the number of its channels.
        keeps_ones: True if its mean is subtracted, so that a rotation must keep the vector of ones.
        written: names of the parameters whose rows, or other elements, are channels of the stream,
            each with the dimension of the channels.
        readers: names of the weights that read it without a norm's gain, as for :class:`Gain`.
        gains: the gains of the norms that read it.
        biases: for each weight that reads it the bias of the layer, if there is one.

    Example:
        >>> Stream("embed", 8, False, (("embed.weight", 1),), (("fc.weight", 1),), (), {}).count
        8
    """

    name: str
    count: int
    keeps_ones: bool
    written: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]
    gains: tuple[Gain, ...]
    biases: Mapping[str, str]


@dataclass(frozen=True)
class Streams:
    """What :func:`find_streams` found.

    Attributes:
        streams: the streams that can be rotated, in the order of the calls.
        reasons: why the weights of others cannot, by the names of their modules.

    Example:
        >>> Streams((), {"fc": "the model returns it"}).reasons
        {'fc': 'the model returns it'}
    """

    streams: tuple[Stream, ...]
    reasons: Mapping[str, str]


@torch.no_grad()
def find_streams(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None = None,
    *,
    who: str = "find_streams",
) -> Streams:
    """Find the residual streams of a model that can be rotated.

    Args:
        model: a float model; it stays as it is.
        batches: as for :func:`torchquant.calibrate`, at least one.
        forward: takes the model and a batch, and calls the model.
        who: the verb, with which messages start.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Embedding(10, 8), nn.RMSNorm(8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> (stream,) = find_streams(model, [torch.arange(3)]).streams
        >>> stream.name, stream.written, stream.gains[0].readers
        ('0', (('0.weight', 1),), (('2.weight', 1),))
    """
    with _single_owners(model):
        parameters = dict(model.named_parameters())
        flow = StreamFlow(parameters)
        for batch in batches:
            with flow:
                outputs = outputs_of(who, model, batch, forward)
            flow.finish(outputs)
    return _Found(flow, parameters).result()


@contextmanager
def _single_owners(model: nn.Module) -> Iterator[None]:
    """Each module has a parameter object of its own, also for shared values, until the end."""
    seen: set[int] = set()
    replaced: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) in seen:
                    replaced.append((module, name, parameter))
                    alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
                    module._parameters[name] = alias
                seen.add(id(parameter))
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


class _Found:
    """Streams from what a :class:`StreamFlow` saw."""

    def __init__(self, flow: StreamFlow, parameters: Mapping[str, Tensor]) -> None:
        self.flow, self.parameters = flow, parameters
        # The producer that each weight reads, and the dimension that is summed over.
        self.reads: dict[str, tuple[str, int]] = {}

    def result(self) -> Streams:
        """The streams without a reason against them."""
        self._read()
        self._uses()
        self._unreached()
        self._norms()
        streams = [
            self._stream(first, members)
            for first, members in self._members().items()
            if first not in self.flow.sources and not self._reason(members)
        ]
        streams = [one for one in streams if one.readers or one.gains]
        return Streams(tuple(streams), self._reasons(streams))

    # ------------------------------------------------------------ what breaks a stream

    def _members(self) -> dict[str, list[str]]:
        """The producers of each stream, by the one that stands for it."""
        members: dict[str, list[str]] = {}
        for producer in self.flow.channels:
            members.setdefault(self.flow.stream(producer), []).append(producer)
        return members

    def _reason(self, members: Iterable[str]) -> str | None:
        for producer in members:
            if producer in self.flow.broken:
                return f"{owner_of(producer) or producer}: {self.flow.broken[producer]}"
        return None

    def _break(self, producers: Iterable[str], reason: str) -> None:
        for producer in producers:
            self.flow.broken.setdefault(producer, reason)

    def _read(self) -> None:
        """Each weight reads one stream, whole and through one norm, in all its calls."""
        for name, readings in self.flow.readings.items():
            found = [self._producer(name, reading) for reading in readings]
            keys = {
                (self.flow.stream(one) if one else None, r.axis)
                for one, r in zip(found, readings, strict=True)
            }
            if len(keys) > 1:
                reason = f"{name} reads other values in another call"
                self._break((one for one in found if one), reason)
            elif found[0] is not None:
                self.reads[name] = found[0], readings[0].axis

    def _producer(self, name: str, reading: Reading) -> str | None:
        """The producer of what a weight reads; None if it is no stream."""
        numbers = reading.labels[reading.labels >= 0]
        if not len(numbers):
            return None
        producers = self.flow.producers(numbers)
        channels = self.flow.channels[producers[0]]
        whole = torch.arange(channels.first, channels.first + channels.count)
        if len(producers) == 1 and torch.equal(reading.labels.long(), whole):
            return producers[0]
        self._break(producers, f"{name} reads a part of its channels, or in another order")
        return None

    def _uses(self) -> None:
        """Parameters that are used in ways that cannot be followed."""
        writers: dict[str, set[str]] = {}
        for producer, channels in self.flow.channels.items():
            for name, (_, offset) in channels.written.items():
                writers.setdefault(name, set()).add(self.flow.stream(producer))
                if self.flow.uses.get(name) is not None:
                    self._break([producer], f"{name}: {self.flow.uses[name]}")
                if offset and channels.kind != "norm":
                    self._break([producer], f"the model adds a constant to {name}")
        for name, streams in writers.items():
            if len(streams) > 1:
                self._break(streams, f"{name} belongs to several streams")
        for name, (producer, _) in self.reads.items():
            if self.flow.uses.get(name) is not None:
                self._break([producer], f"{name}: {self.flow.uses[name]}")

    def _unreached(self) -> None:
        """A layer that no batch reached may read a stream, too."""
        reached = {
            memory_key(self.parameters[name]) for name in self.flow.uses if self.flow.reached(name)
        }
        unreached = [
            name
            for name, parameter in self.parameters.items()
            if parameter.dim() > 1 and memory_key(parameter) not in reached
        ]
        for members in self._members().values() if unreached else ():
            names = [name for one in members for name in self.flow.channels[one].written]
            names += [name for name, (one, _) in self.reads.items() if one in members]
            owner = common_owner(owner_of(name) for name in names)
            count = self.flow.channels[members[0]].count
            for other in unreached:
                inside = not owner or other.startswith(f"{owner}.")
                if inside and count in self.parameters[other].shape:
                    self._break(members, f"no batch reached {owner_of(other)}, which may read it")

    def _norms(self) -> None:
        """A stream can be rotated only if the gains of all its norms can be taken over."""
        for gain, source in self.flow.sources.items():
            reason = self.flow.broken.get(gain)
            if reason is not None:
                self._break([source], f"{owner_of(gain)} reads it: {reason}")
                continue
            if len(self._biases(gain)) and not self._absorbs(gain):
                reason = f"the bias of {owner_of(gain)} cannot be moved, because its gain has zeros"
                self._break([source], reason)

    def _absorbs(self, gain: str) -> bool:
        """True if a bias after the gain can be expressed before the gain, or in later biases."""
        offset = self.flow.channels[gain].written[gain][1]
        values = (
            self.parameters[gain].detach().double().abs() + 0
            if not offset
            else (self.parameters[gain].detach().double() + offset).abs()
        )
        readers = [name for name, (one, _) in self.reads.items() if one == gain]
        return all(self._bias(name) for name in readers) or bool(values.min() > 1e-3 * values.max())

    # ------------------------------------------------------------ the streams

    def _biases(self, producer: str) -> tuple[str, ...]:
        """The parameters that are added to what a parameter produces."""
        return tuple(name for name in self.flow.channels[producer].written if name != producer)

    def _bias(self, weight: str) -> str | None:
        """The bias of the layer with a weight; None if it has none, or shares it."""
        if weight not in self.flow.channels or self.parameters[weight].dim() != 2:
            return None
        biases = self._biases(weight)
        owners = [
            one for one, other in self.flow.channels.items() if set(biases) & {*other.written}
        ]
        return biases[0] if len(biases) == 1 and owners == [weight] else None

    def _readers(self, producers: Iterable[str]) -> tuple[tuple[str, int], ...]:
        wanted = set(producers)
        return tuple((name, axis) for name, (one, axis) in self.reads.items() if one in wanted)

    def _stream(self, first: str, members: Sequence[str]) -> Stream:
        gains = [
            Gain(
                gain,
                self.flow.channels[gain].written[gain][1],
                self._biases(gain),
                self._readers([gain]),
            )
            for gain, source in self.flow.sources.items()
            if source in members or self.flow.stream(source) == first
        ]
        written = {
            name: axis
            for one in members
            for name, (axis, _) in self.flow.channels[one].written.items()
        }
        readers = self._readers(members)
        reading = [name for name, _ in (*readers, *(r for gain in gains for r in gain.readers))]
        return Stream(
            owner_of(members[0]) or members[0],
            self.flow.channels[first].count,
            any(one in self.flow.ones for one in members),
            tuple(written.items()),
            readers,
            tuple(gains),
            {name: bias for name in reading if (bias := self._bias(name))},
        )

    def _reasons(self, streams: Sequence[Stream]) -> dict[str, str]:
        """Why the weights that belong to no stream stay as they are, by module."""
        done = {
            owner_of(name)
            for one in streams
            for name, _ in (*one.written, *one.readers, *(r for g in one.gains for r in g.readers))
        }
        members = self._members()
        reasons: dict[str, str] = {}
        for name, readings in self.flow.readings.items():
            owner = owner_of(name)
            if owner in done or owner in reasons:
                continue
            if name in self.reads:
                producer = self.reads[name][0]
                source = self.flow.sources.get(producer, producer)
                reason = self._reason(members[self.flow.stream(source)])
            else:
                ended = next((one.after for one in readings if one.after is not None), None)
                reason = f"no stream reaches it beyond {ended}" if ended else None
            if reason is not None:
                reasons[owner] = reason
        for producer in self.flow.channels:
            reason = self._reason(members[self.flow.stream(producer)])
            if reason is not None and owner_of(producer) not in done:
                reasons.setdefault(owner_of(producer), reason)
        return reasons
