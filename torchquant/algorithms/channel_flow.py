"""Channels that parameters produce, and the matrix products that read them.

:class:`ChannelFlow` watches a model. Every channel of every norm and of every matrix product with a
parameter gets a number, which is the label of the elements that belong to the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchquant.algorithms.contraction import Contraction
from torchquant.algorithms.dataflow import Call, DataFlow
from torchquant.algorithms.labels import (
    UNLABELLED,
    Fact,
    Labels,
    Reference,
    Zero,
    line,
    varies,
)
from torchquant.analysis.verify import tensors_in

# Takes the name of a weight and what it reads, float [rows, K].
See: TypeAlias = Callable[[str, Tensor], None]


@dataclass
class Channels:
    """The channels of one norm or linear layer.

    Attributes:
        first: the number of its first channel.
        count: the number of its channels.
        kind: "norm" or "linear".
        written: dimensions and offsets of the parameters that produce the channels, by name.
    """

    first: int
    count: int
    kind: str
    written: dict[str, tuple[int, float]] = field(default_factory=dict)

    def have(self, labels: Tensor) -> Tensor:
        """True for labels that are numbers of these channels."""
        return (labels >= self.first) & (labels < self.first + self.count)

    def numbers(self) -> range:
        """The numbers of the channels."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, eq=False)
class Reading:
    """A matrix product with a parameter: the labels of what it sums over.

    Attributes:
        axis: the dimension of the parameter that is summed over.
        labels: int32, as long as this dimension; -1 for an element without a label.
        after: the function with which labels ended before; None if none did.
    """

    axis: int
    labels: Tensor
    after: str | None = None


class ChannelFlow(DataFlow):
    """Watches a forward, numbers channels, and records which weights read which channels.

    Args:
        parameters: the parameters to follow, by their names.
        see: called with what each weight reads.

    Attributes:
        channels: the channels of each parameter that produces some.
        readings: the readings of each parameter.
        blocked: the reason for each channel whose way cannot be followed, by its number.

    Example:
        >>> flow = ChannelFlow({"weight": torch.ones(3, 2)})
        >>> flow.channels_of(Reference("weight", (0, 1)), 0, "linear").numbers()
        range(0, 3)
    """

    def __init__(self, parameters: Mapping[str, Tensor], see: See | None = None) -> None:
        super().__init__(parameters)
        self.see = see
        self.channels: dict[str, Channels] = {}
        self.readings: dict[str, list[Reading]] = {}
        self.blocked: dict[int, str] = {}
        self._without_rows: set[str] = set()  # weights of products without rows
        self._count = 0
        self._seen_blocked = torch.zeros(0, dtype=torch.bool)  # by number: is it in `blocked`?

    def finish(self, result: Any) -> None:
        """Block what the model returns."""
        for tensor in tensors_in(result):
            fact = self.fact(tensor)
            if isinstance(fact, Labels):
                self.block(fact, "the model returns it")

    def block(self, labels: Labels, reason: str) -> None:
        """The way of some channels cannot be followed."""
        used = labels.used().cpu().long()
        if len(self._seen_blocked) < self._count:
            more = torch.zeros(2 * self._count - len(self._seen_blocked), dtype=torch.bool)
            self._seen_blocked = torch.cat([self._seen_blocked, more])
        new = used[~self._seen_blocked[used]]
        self._seen_blocked[new] = True
        for number in new.tolist():
            self.blocked.setdefault(number, reason)

    def owner(self, number: int) -> str:
        """The parameter that produces a channel."""
        return next(
            name for name, channels in self.channels.items() if number in channels.numbers()
        )

    def reached(self, name: str) -> bool:
        """True if the forward used a parameter, and not only in products without rows."""
        return name in self.uses and (name in self.readings or name not in self._without_rows)

    # ------------------------------------------------------------ products

    def contract(self, call: Call, product: Contraction) -> bool:
        """Follow labels through a product; False if that is not possible."""
        first, second = call.fact(product.first), call.fact(product.second)
        if isinstance(first, Reference) and isinstance(second, Reference):
            return False
        if isinstance(second, Reference):
            return self.weight(call, product, second)
        if isinstance(first, Reference):
            return self.weight(call, product.turned(), first)
        if product.bias is not None and call.fact(product.bias) is not None:
            return False
        labelled = [
            (fact, letters)
            for fact, letters in (
                (first, product.first_letters),
                (second, product.second_letters),
            )
            if isinstance(fact, Labels)
        ]
        if len(labelled) != 1 or product.bias is not None:
            return not labelled
        (fact, letters) = labelled[0]
        return self.carried(call, product, fact.values, letters)

    def carried(
        self, call: Call, product: Contraction, labels: Tensor, letters: tuple[str, ...]
    ) -> bool:
        """A product with another value, such as probabilities: labels are those of each term."""
        gone = [place for place, letter in enumerate(letters) if letter not in product.letters]
        if any(varies(labels, place) for place in gone):
            return False
        for place in reversed(gone):
            labels = labels.select(place, 0)
        kept = [letter for letter in letters if letter in product.letters]
        order = [kept.index(letter) for letter in product.letters if letter in kept]
        labels = labels.permute(order)
        for place, letter in enumerate(product.letters):
            if letter not in kept:
                labels = labels.unsqueeze(place)
        self.label(call.result, labels)
        return True

    def weight(self, call: Call, product: Contraction, weight: Reference) -> bool:
        """A product with a parameter, its second value, reads channels and produces others."""
        read, letters, fact = product.first, product.first_letters, call.fact(product.first)
        summed = product.summed()
        axes = dict(zip(product.second_letters, weight.axes, strict=True))
        if len(summed) != 1 or axes[summed[0]] is None or weight.offset:
            return False
        if read.numel() == 0:  # nothing is read, as by an expert that no token chose
            self._without_rows.add(weight.name)
            return True
        axis, size = axes[summed[0]], self.parameters[weight.name].shape
        assert axis is not None
        labels = torch.full((size[axis],), UNLABELLED, dtype=torch.int32)
        if isinstance(fact, Labels):
            found = line(fact.values, letters.index(summed[0]))
            if found is None:
                self.block(fact, f"{weight.name} reads several channels in one place")
            else:
                labels = found.cpu()
        known = self.readings.setdefault(weight.name, [])
        if not any(one.axis == axis and torch.equal(one.labels, labels) for one in known):
            known.append(Reading(axis, labels, self.ended(read)))
        if self.see is not None:
            rows = read.detach().movedim(letters.index(summed[0]), -1)
            self.see(weight.name, rows.reshape(-1, rows.shape[-1]))
        new = [
            letter
            for letter, axis in axes.items()
            if axis is not None and letter in product.letters and letter not in letters
        ]
        channels = self.channels_of(weight, axes[new[0]], "linear") if len(new) == 1 else None
        if channels is None:
            if weight.name in self.channels:
                self.block_all(self.channels[weight.name], "it is used in several ways")
            bias = call.fact(product.bias)
            if isinstance(bias, Labels):
                self.block(bias, f"{call.name} adds it")
            elif isinstance(bias, Reference):
                self.lose(bias, f"{call.name} adds it")
            return True
        place = product.letters.index(new[0]) - len(product.letters)
        if self.adds(product.bias, call.fact(product.bias), channels, place):
            self.produce(call.result, channels, place)
        return True

    # ------------------------------------------------------------ channels

    def channels_of(self, reference: Reference, axis: int | None, kind: str) -> Channels | None:
        """The channels along a dimension of a parameter; None if it has others already."""
        assert axis is not None
        found = self.channels.get(reference.name)
        if found is None:
            count = self.parameters[reference.name].shape[axis]
            found = Channels(self._count, count, kind)
            found.written[reference.name] = axis, reference.offset
            self.channels[reference.name] = found
            self._count += count
        if found.written[reference.name] != (axis, reference.offset) or found.kind != kind:
            self.block_all(found, "it is used in several ways")
            return None
        return found

    def block_all(self, channels: Channels, reason: str) -> None:
        """Block all channels of a producer."""
        for number in channels.numbers():
            self.blocked.setdefault(number, reason)

    def produce(self, tensor: Tensor, channels: Channels, place: int) -> None:
        """Label the channels along a dimension, counted from the end."""
        labels = torch.arange(
            channels.first, channels.first + channels.count, dtype=torch.int32, device=tensor.device
        )
        self.label(tensor, labels.view(-1, *[1] * (-place - 1)))

    def adds(self, bias: Any, fact: Fact | None, channels: Channels, place: int) -> bool:
        """True if what is added to channels is scaled with them."""
        if bias is None or isinstance(fact, Zero):
            return True
        if isinstance(fact, Reference):
            labels = torch.arange(channels.first, channels.first + channels.count)
            if self.joins(fact, labels, place):
                return True
            self.lose(fact, "it is added to channels that are scaled")
        elif isinstance(fact, Labels):
            self.block(fact, "it is added to another value")
        self.block_all(channels, "a value that is no parameter is added to it")
        return False

    def joins(self, bias: Reference, labels: Tensor, place: int) -> bool:
        """Let a parameter be scaled with the channels whose labels are along a dimension."""
        axes = [axis for axis in bias.axes if axis is not None]
        if len(axes) != 1 or bias.offset or len(labels) == 0 or int(labels[0]) < 0:
            return False
        name = self.owner(int(labels[0]))
        channels = self.channels[name]
        whole = torch.arange(channels.first, channels.first + channels.count)
        if bias.axes.index(axes[0]) - len(bias.axes) != place or not torch.equal(
            labels.cpu().long(), whole
        ):
            return False
        known = {one for one, other in self.channels.items() if bias.name in other.written}
        if known - {name} or channels.written.get(bias.name, (axes[0], 0.0)) != (axes[0], 0.0):
            return False
        channels.written[bias.name] = axes[0], 0.0
        return True
