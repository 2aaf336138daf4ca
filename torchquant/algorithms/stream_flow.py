"""Residual streams: tensors that are sums, each written by layers and read by others.

A stream can be rotated if only linear layers read it, perhaps after a norm. :class:`StreamFlow`
watches a forward and finds tensors that must be rotated together. A sum of two values makes them
one stream. RMSNorm commutes with a rotation; so does LayerNorm, if the rotation keeps the vector of
ones. Whatever else reads the single channels of a stream breaks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant.algorithms.channel_flow import ChannelFlow, Channels
from torchquant.algorithms.contraction import Contraction, contraction
from torchquant.algorithms.dataflow import JOINS, Call, operands
from torchquant.algorithms.labels import Fact, Labels, Reference, Squares, Zero, along, line
from torchquant.algorithms.scaling_flow import DIFFERENCES, PRODUCTS, QUOTIENTS, SUMS

_WRITES = ("index_add", "index_copy", "scatter_add", "setitem", "masked_scatter")


class StreamFlow(ChannelFlow):
    """Watches a forward and finds residual streams; see the top of this file.

    Attributes:
        same: for each producer of channels another one of the same stream; itself for the first.
        sources: the producer of the stream that a norm reads, by the name of the norm's gain.
        ones: producers of streams that the rotation must not change along the vector of ones.
        broken: why a stream cannot be rotated, by one of its producers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> with torch.no_grad(), StreamFlow(dict(model.named_parameters())) as flow:
        ...     flow.finish(model(torch.ones(3, 4)))
        >>> flow.sources, flow.ones, flow.broken
        ({'1.weight': '0.weight'}, {'0.weight'}, {'2.weight': 'the model returns it'})
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters)
        self.same: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.ones: set[str] = set()
        self.broken: dict[str, str] = {}
        self._firsts: list[int] = []
        self._producers: list[str] = []

    def stream(self, producer: str) -> str:
        """The producer that stands for the stream of another one."""
        while self.same.setdefault(producer, producer) != producer:
            producer = self.same[producer]
        return producer

    def block(self, labels: Labels, reason: str) -> None:
        """Break the streams to which labels belong."""
        for producer in self.producers(labels.used()):
            self.broken.setdefault(producer, reason)

    def block_all(self, channels: Channels, reason: str) -> None:
        """Break the stream of a producer."""
        self.broken.setdefault(self.owner(channels.first), reason)

    def producers(self, numbers: Tensor) -> list[str]:
        """The producers of some channels."""
        if len(self._firsts) != len(self.channels):
            self._firsts = [channels.first for channels in self.channels.values()]
            self._producers = list(self.channels)
        starts = torch.tensor(self._firsts, dtype=torch.int64)
        places = torch.bucketize(numbers.cpu().long(), starts, right=True).unique() - 1
        return [self._producers[place] for place in places.tolist()]

    def unknown(self, call: Call) -> None:
        """Break streams whose channels a call reads."""
        added = call.name in SUMS or call.name in DIFFERENCES
        for fact in call.facts.values():
            if isinstance(fact, Squares):
                self.block(fact.labels, f"{call.name} reads the squares of its channels")
            elif isinstance(fact, Labels) and added:
                self.block(fact, "it is added to a value that no layer writes")
        super().unknown(call)

    def join(self, call: Call) -> bool:
        """All that is joined belongs to one stream."""
        tensors = [tensor for tensor in call.tensors() if tensor.numel()]
        return self._joined(call, tensors)

    # ------------------------------------------------------------ functions

    def step(self, call: Call) -> bool:
        """Follow the streams through one function."""
        name = call.name
        product = contraction(call)
        if product is not None:
            return self.contract(call, product)
        if name in JOINS:
            return self.join(call)
        if name in PRODUCTS or name in QUOTIENTS:
            return self._scale(call)
        if name in SUMS or name in DIFFERENCES:
            return self._sum(call)
        if name in ("pow", "square"):
            return self._square(call)
        if name in ("mean", "sum", "var", "std", "norm", "vector_norm"):
            return self._reduce(call)
        if name in ("layer_norm", "rms_norm"):
            return self._norm(call)
        if name == "normalize":
            return self._normalize(call)
        if name == "embedding":
            return self._embed(call)
        if name in ("conv1d", "conv2d", "conv3d"):
            return self._convolve(call)
        if name in _WRITES:
            return self._write(call)
        if name == "where":
            return self._where(call)
        return name == "masked_fill" and self._masked(call)

    def contract(self, call: Call, product: Contraction) -> bool:
        """A product with another value than a parameter mixes rows, and no channels."""
        for tensor in (product.first, product.second):
            fact = call.fact(tensor)
            if isinstance(fact, Squares):
                return False
            if isinstance(fact, Labels) and fact.values.numel() and self._place(fact) is None:
                return False
        return super().contract(call, product)

    def _scale(self, call: Call) -> bool:
        pair = operands(call)
        if pair is None or call.kwargs.get("rounding_mode") is not None:
            return False
        facts = [call.fact(value) for value in pair]
        if call.name in PRODUCTS and isinstance(facts[0], Reference):
            pair, facts = pair[::-1], facts[::-1]
        first, second = facts
        if isinstance(second, Reference):
            return call.name in PRODUCTS and self._gain(call, first, second, pair[0])
        if isinstance(first, Reference):
            return False
        if call.name in PRODUCTS and isinstance(second, Labels):
            if pair[0] is pair[1]:
                self.keep(call.result, Squares(second))
                return True
            pair, (first, second) = pair[::-1], (second, first)
        if isinstance(second, Labels) or not isinstance(first, Labels):
            return not isinstance(second, Labels)
        if not self._even(call, first, pair[1]):
            return False
        self.label(call.result, first.values)
        return True

    def _gain(self, call: Call, fact: Fact | None, gain: Reference, value: Any) -> bool:
        """The gain of a norm, which its readers can take over."""
        if not isinstance(value, Tensor):
            if not gain.offset:
                self.keep(call.result, gain)
            return not gain.offset
        axes = [axis for axis in gain.axes if axis is not None]
        if isinstance(fact, Reference) or len(axes) != 1:
            return False
        if not isinstance(fact, Labels):
            self.lose(gain, "it scales no stream")
            return True
        producer, place = self._basis(fact)
        if producer is None or gain.axes.index(axes[0]) - len(gain.axes) != place:
            return False
        return self._source(call, producer, gain, axes[0], place)

    def _source(self, call: Call, producer: str, gain: Reference, axis: int, place: int) -> bool:
        """Channels that are those of a stream times a gain."""
        channels = self.channels_of(gain, axis, "norm")
        known = self.sources.setdefault(gain.name, producer)
        if channels is None or not self._one(known, producer):
            return False
        self.produce(call.result, channels, place)
        return True

    def _sum(self, call: Call) -> bool:
        pair = operands(call)
        if pair is None:
            return False
        facts = [call.fact(value) for value in pair]
        if call.kwargs.get("alpha", 1) != 1:
            return False
        numbers = [isinstance(value, (int, float)) for value in pair]
        if isinstance(facts[0], Reference) and numbers[1]:
            return self._offset(call, facts[0], pair[1])
        if isinstance(facts[1], Reference) and numbers[0] and call.name in SUMS:
            return self._offset(call, facts[1], pair[0])
        if not any(isinstance(fact, Labels) for fact in facts):
            return self._parameters(call, pair)
        index = facts.index(None) if None in facts else None
        if index is not None:  # a value that is the same for all channels
            labelled = facts[1 - index]
            assert isinstance(labelled, Labels)
            producer, _ = self._basis(labelled)
            if producer is None or not self._even(call, labelled, pair[index]):
                return False
            if not numbers[index] or pair[index] != 0:
                self.ones.add(producer)
            self.label(call.result, labelled.values)
            return True
        return self._joined(call, [value for value in pair if isinstance(value, Tensor)])

    def _parameters(self, call: Call, pair: tuple[Any, Any]) -> bool:
        """A sum in which no value belongs to a stream yet."""
        if any(isinstance(call.fact(value), Squares) for value in pair):
            return False
        for value in pair:
            fact = call.fact(value)
            if isinstance(fact, Reference):
                self.lose(fact, "it is added to a value that belongs to no stream")
        return True

    def _offset(self, call: Call, gain: Reference, number: float) -> bool:
        sign = -1 if call.name in DIFFERENCES else 1
        moved = Reference(gain.name, gain.axes, gain.offset + sign * float(number))
        self.keep(call.result, moved)
        return True

    def _square(self, call: Call) -> bool:
        fact = call.fact(call.args[0])
        two = call.name == "square" or call.arguments("input", "exponent")[1] == 2
        if not two or not isinstance(fact, Labels) or self._basis(fact)[0] is None:
            return False
        self.keep(call.result, Squares(fact))
        return True

    def _reduce(self, call: Call) -> bool:
        """Over the channels: the result is no longer in the stream. Over rows: it still is."""
        fact: Any = call.fact(call.args[0])
        squares = isinstance(fact, Squares)
        labels: Any = fact.labels if squares else fact
        if not isinstance(labels, Labels):
            return False
        dims = self._dims(call)
        producer, place = self._basis(labels)
        if dims is None or producer is None:
            return False
        places = {dim if dim < 0 else dim - labels.values.dim() for dim in dims}
        if place in places:
            norm = call.name in ("norm", "vector_norm")
            power = call.kwargs.get("ord", call.arguments("x", "p")[1])
            if norm and power not in (None, 2, 2.0, "fro"):
                return False
            if not (squares or norm):
                self.ones.add(producer)
            return not squares or call.name in ("mean", "sum")
        if squares or call.name not in ("mean", "sum"):
            return False
        keepdim = call.result.dim() == labels.values.dim()
        self.label(call.result, labels.values.amax([*places], keepdim=keepdim))
        return True

    @staticmethod
    def _dims(call: Call) -> list[int] | None:
        if call.name in ("norm", "vector_norm"):
            found = call.arguments("x", "p", "dim")[2]
        else:
            found = call.arguments("input", "dim")[1]
        if isinstance(found, bool) or found is None:
            return None
        return [found] if isinstance(found, int) else list(found)

    def _norm(self, call: Call) -> bool:
        value, shape, weight, bias = call.arguments("input", "normalized_shape", "weight", "bias")
        if call.name == "rms_norm":
            bias = None
        fact, gain = call.fact(value), call.fact(weight)
        if not isinstance(fact, Labels):
            for tensor in (weight, bias):
                lost = call.fact(tensor)
                if isinstance(lost, Reference):
                    self.lose(lost, "it scales no stream")
            return not isinstance(fact, (Squares, Reference))
        producer, place = self._basis(fact)
        if producer is None or place != -1 or len(shape) != 1:
            return False
        if call.name == "layer_norm":
            self.ones.add(producer)
        if weight is None and bias is None:
            self.label(call.result, fact.values)
            return True
        if not isinstance(gain, Reference) or gain.axes != (0,):
            return False
        if not self._source(call, producer, gain, 0, -1):
            return False
        return self.adds(bias, call.fact(bias), self.channels[gain.name], -1)

    def _normalize(self, call: Call) -> bool:
        value, p, dim = call.arguments("input", "p", "dim")
        fact = call.fact(value)
        if not isinstance(fact, Labels) or p not in (None, 2, 2.0):
            return False
        place = self._basis(fact)[1]
        dim = 1 if dim is None else dim
        if place is None or dim not in (place, place + fact.values.dim()):
            return False
        self.label(call.result, fact.values)
        return True

    def _embed(self, call: Call) -> bool:
        names = ("input", "weight", "padding_idx", "max_norm")
        _, weight, _, max_norm = call.arguments(*names)
        table = call.fact(weight)
        if not isinstance(table, Reference) or table.axes != (0, 1) or max_norm is not None:
            return False
        channels = self.channels_of(table, 1, "linear")
        if channels is None:
            return False
        self.produce(call.result, channels, -1)
        return True

    def _convolve(self, call: Call) -> bool:
        value, weight, bias = call.arguments("input", "weight", "bias")
        kernel = call.fact(weight)
        if call.fact(value) is not None or not isinstance(kernel, Reference):
            return False
        channels = self.channels_of(kernel, 0, "linear")
        if channels is not None and self.adds(bias, call.fact(bias), channels, -1):
            self.produce(call.result, channels, 1 - weight.dim())
        return True

    def _write(self, call: Call) -> bool:
        """Rows of one value are written to, or added to, another one."""
        tensors = [tensor for tensor in call.tensors() if tensor.is_floating_point()]
        if len(tensors) != 2:
            return False
        target = call.result if isinstance(call.result, Tensor) else tensors[0]
        return self._joined(call, tensors, target)

    def _where(self, call: Call) -> bool:
        condition, *values = call.arguments("condition", "input", "other")
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) != 2 or not self._joined(call, tensors):
            return False
        fact = self.fact(call.result)
        return isinstance(fact, Labels) and self._even(call, fact, condition)

    def _masked(self, call: Call) -> bool:
        value, mask, number = call.arguments("input", "mask", "value")
        fact = call.fact(value)
        if isinstance(number, Tensor) or number != 0 or not isinstance(fact, Labels):
            return False
        if not self._even(call, fact, mask):
            return False
        self.label(call.result, fact.values)
        return True

    # ------------------------------------------------------------ streams

    def _joined(self, call: Call, tensors: list[Tensor], result: Tensor | None = None) -> bool:
        """All tensors belong to one stream, and so does the result."""
        result = call.result if result is None else result
        facts = [call.fact(tensor) for tensor in tensors]
        places = {self._whole(fact)[1] for fact in facts if isinstance(fact, Labels)}
        if len(places) != 1 or None in places:
            return False
        (place,) = places
        assert place is not None
        names: list[str] = []
        for fact in facts:
            if isinstance(fact, Labels):
                found = self._whole(fact)[0]
            elif isinstance(fact, Reference):
                found = self._parameter(fact, place)
            elif isinstance(fact, Zero):
                continue
            else:
                return False
            if found is None:
                return False
            names.append(found)
        width = self.channels[names[0]].count
        if result.shape[place] != width or any(not self._one(names[0], one) for one in names):
            return False
        self.produce(result, self.channels[names[0]], place)
        return True

    def _parameter(self, reference: Reference, place: int) -> str | None:
        """A parameter that is added to a stream, or joined with it, becomes a part of it."""
        axis = reference.axes[place] if -place <= len(reference.axes) else None
        if axis is None or reference.offset:
            return None
        channels = self.channels_of(reference, axis, "linear")
        return None if channels is None else reference.name

    def _one(self, first: str, second: str) -> bool:
        """Two producers write to one stream."""
        a, b = self.stream(first), self.stream(second)
        if a == b:
            return True
        if self.channels[a].count != self.channels[b].count:
            return False
        for name in (first, second):
            if self.channels[name].kind == "norm":
                self.broken.setdefault(name, "a norm's result is added to another value")
        self.same[b] = a
        return True

    def _place(self, labels: Labels) -> int | None:
        """The only dimension along which channels differ, counted from the end."""
        found = along(labels.values)
        return None if found is None else found - labels.values.dim()

    def _whole(self, labels: Labels) -> tuple[str | None, int | None]:
        """The producer whose channels are all there, in their order, and their dimension."""
        place = self._place(labels)
        found = None if place is None else line(labels.values, place)
        if found is None or int(found[0]) < 0:
            return None, None
        name = self.producers(found[:1])[0]
        channels = self.channels[name]
        numbers = torch.arange(channels.first, channels.first + channels.count)
        return (name, place) if torch.equal(found.cpu().long(), numbers) else (None, None)

    def _basis(self, labels: Labels) -> tuple[str | None, int | None]:
        """As :meth:`_whole`, but only for a stream itself and not for the result of a norm."""
        name, place = self._whole(labels)
        return (None, None) if name and self.channels[name].kind == "norm" else (name, place)

    def _even(self, call: Call, labels: Labels, other: Any) -> bool:
        """True if a value is the same for all channels of a stream."""
        if not isinstance(other, Tensor):
            return True
        place = self._place(labels)
        if place is None:
            return False
        return other.dim() < -place or other.shape[place] == 1 or other.stride(place) == 0
