"""Where the scale of a channel goes: from a norm or a linear layer to the layers that read it.

Every channel of every norm and of every matrix product with a parameter gets a number, and the
elements that would be divided by s if the channel were divided by s have this number as their
label. Where a matrix product with another parameter sums over labelled elements, the labels say
which of its weights would have to be multiplied by s. A function after which no scale is left, such
as a softmax, blocks the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchquant.algorithms.contraction import Contraction, contraction
from torchquant.algorithms.dataflow import (
    UNLABELLED,
    Call,
    DataFlow,
    Fact,
    Labels,
    Reference,
    Zero,
    along,
    line,
    varies,
)
from torchquant.analysis.verify import tensors_in

PRODUCTS = frozenset("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__".split())
QUOTIENTS = frozenset(
    "div div_ divide divide_ true_divide true_divide_ __truediv__ __itruediv__".split()
)
SUMS = frozenset("add add_ __add__ __radd__ __iadd__".split())
DIFFERENCES = frozenset("sub sub_ subtract __sub__ __isub__".split())
# f(s x) = s f(x) for positive s.
HOMOGENEOUS = frozenset("relu relu_ leaky_relu leaky_relu_ abs __abs__ neg __neg__".split())
# They combine elements of the same place in several rows.
REDUCTIONS = frozenset("sum mean".split())


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


@dataclass(frozen=True, eq=False)
class Reading:
    """A matrix product with a parameter: the labels of what it sums over.

    Attributes:
        axis: the dimension of the parameter that is summed over.
        labels: int32, as long as this dimension; -1 for an element without a label.
    """

    axis: int
    labels: Tensor


class ScalingFlow(DataFlow):
    """Watches a forward and follows the scales of channels; see the top of this file.

    Args:
        parameters: the parameters to follow, by their names.
        see: called with what each weight reads.

    Attributes:
        channels: the channels of each parameter that produces some.
        readings: the readings of each parameter.
        blocked: the reason for each channel whose scale cannot be undone, by its number.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with torch.no_grad(), ScalingFlow(dict(model.named_parameters())) as flow:
        ...     flow.finish(model(torch.ones(3, 4)))
        >>> flow.channels["0.weight"].written
        {'0.weight': (0, 0.0), '0.bias': (0, 0.0)}
        >>> flow.readings["1.weight"][0].labels.tolist()
        [0, 1, 2, 3]
        >>> flow.readings["3.weight"][0].labels.tolist(), flow.channels["1.weight"].first
        ([4, 5, 6, 7], 4)
    """

    def __init__(self, parameters: Mapping[str, Tensor], see: See | None = None) -> None:
        super().__init__(parameters)
        self.see = see
        self.channels: dict[str, Channels] = {}
        self.readings: dict[str, list[Reading]] = {}
        self.blocked: dict[int, str] = {}
        self._count = 0
        self._seen_blocked = torch.zeros(0, dtype=torch.bool)  # by number: is it in `blocked`?

    def finish(self, result: Any) -> None:
        """Block what the model returns."""
        for tensor in tensors_in(result):
            fact = self.fact(tensor)
            if isinstance(fact, Labels):
                self.block(fact, "the model returns it")

    def block(self, labels: Labels, reason: str) -> None:
        """The scales of some channels cannot be undone."""
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
            name
            for name, channels in self.channels.items()
            if channels.first <= number < channels.first + channels.count
        )

    # ------------------------------------------------------------ functions

    def step(self, call: Call) -> bool:
        """Follow the labels through one function."""
        name = call.name
        found = contraction(call)
        if found is not None:
            return self._contract(call, found)
        if name in HOMOGENEOUS:
            self._pass(call, call.fact(call.args[0]))
            return True
        if name in PRODUCTS:
            return self._multiply(call)
        if name in QUOTIENTS:
            return self._divide(call)
        if name in SUMS or name in DIFFERENCES:
            return self._add(call)
        if name in REDUCTIONS:
            return self._reduce(call)
        if name in ("layer_norm", "rms_norm"):
            return self._norm(call)
        if name == "scaled_dot_product_attention":
            return self._attention(call)
        if name in ("masked_fill", "masked_fill_"):
            return self._masked(call)
        return False

    def _pass(self, call: Call, fact: Fact | None) -> None:
        """The result has the labels of an argument."""
        if isinstance(fact, Labels):
            self.label(call.result, fact.values)
        elif isinstance(fact, Reference):
            self.lose(fact, f"{call.name} reads it")

    def _masked(self, call: Call) -> bool:
        value = call.arguments("input", "mask", "value")[2]
        if isinstance(value, Tensor) or value != 0:
            return False
        self._pass(call, call.fact(call.args[0]))
        return True

    def _multiply(self, call: Call) -> bool:
        pair = _operands(call)
        if pair is None:
            return False
        facts = [call.fact(value) for value in pair]
        if isinstance(facts[1], Reference):
            pair, facts = pair[::-1], facts[::-1]
        gain, other = facts
        if isinstance(gain, Reference):
            return self._gain(call, gain, pair[1], other)
        labelled = [fact for fact in facts if isinstance(fact, Labels)]
        if len(labelled) == 2:
            self.block(labelled[0], f"it is multiplied by another value that {call.name} reads")
        if labelled:
            self.label(call.result, labelled[-1].values)
        elif any(isinstance(fact, Zero) for fact in facts):
            self.keep(call.result, Zero())
        return True

    def _gain(self, call: Call, gain: Reference, value: Any, other: Fact | None) -> bool:
        """A product with a parameter: the channels of a norm, or a constant factor."""
        if not isinstance(value, Tensor):
            if gain.offset:
                return False
            self.keep(call.result, gain)
            return True
        axes = [axis for axis in gain.axes if axis is not None]
        if isinstance(other, Reference) or len(axes) != 1:
            return False
        if isinstance(other, Labels):
            self.block(other, f"{gain.name} scales it")
        channels = self._channels(gain, axes[0], "norm")
        if channels is not None:
            self._produce(call.result, channels, gain.axes.index(axes[0]) - len(gain.axes))
        return True

    def _divide(self, call: Call) -> bool:
        pair = _operands(call)
        if pair is None or call.kwargs.get("rounding_mode") is not None:
            return False
        above, below = (call.fact(value) for value in pair)
        if isinstance(below, Labels) or isinstance(above, Reference):
            return False
        if isinstance(below, Reference):
            self.lose(below, f"{call.name} reads it")
        self._pass(call, above)
        return True

    def _add(self, call: Call) -> bool:
        pair = _operands(call)
        if pair is None or call.kwargs.get("alpha", 1) != 1:
            return False
        facts = [call.fact(value) for value in pair]
        if call.name in SUMS and isinstance(facts[1], Reference):
            pair, facts = pair[::-1], facts[::-1]
        first, second = facts
        if isinstance(first, Reference) and not isinstance(second, Reference):
            if isinstance(pair[1], (int, float)):
                return self._offset(call, first, pair[1])
            return call.name in SUMS and self._bias(call, first, second)
        zeros = [isinstance(fact, Zero) or value == 0 for fact, value in _numbers(facts, pair)]
        if zeros[1]:
            self._pass(call, first)
        elif zeros[0]:
            self._pass(call, second)
        elif isinstance(first, Labels) and isinstance(second, Labels):
            self._combine(call, first.values, second.values)
        else:
            return False
        return True

    def _offset(self, call: Call, reference: Reference, number: float) -> bool:
        """A gain that is a parameter plus a constant."""
        if sum(axis is not None for axis in reference.axes) != 1:
            return False
        sign = -1 if call.name in DIFFERENCES else 1
        offset = reference.offset + sign * float(number)
        self.keep(call.result, Reference(reference.name, reference.axes, offset))
        return True

    def _bias(self, call: Call, bias: Reference, other: Fact | None) -> bool:
        """A parameter is added to the channels of a norm or a linear layer."""
        if not isinstance(other, Labels):
            return False
        place = along(other.values)
        labels = None if place is None else line(other.values, place)
        if place is None or labels is None or not self._joins(bias, labels, place - call.result.dim()):
            return False
        self.label(call.result, other.values)
        return True

    def _combine(self, call: Call, first: Tensor, second: Tensor) -> None:
        """A sum keeps a label only where both values have it."""
        first, second = torch.broadcast_tensors(first, second)
        if first.shape == call.result.shape and bool((first == second).all()):
            self.label(call.result, first)
            return
        same = first == second
        for values in (first, second):
            apart = torch.where(same, UNLABELLED, values)
            self.block(Labels(apart), "it is added to another value")
        self.label(call.result, torch.where(same, first, UNLABELLED))

    def _reduce(self, call: Call) -> bool:
        fact = call.fact(call.args[0])
        if not isinstance(fact, Labels):
            return False
        dims = call.arguments("input", "dim", "keepdim")[1]
        if dims is None:
            return False
        dims = [dims] if isinstance(dims, int) else list(dims)
        if not dims or any(varies(fact.values, dim) for dim in dims):
            return False
        self.label(call.result, fact.values.amax(dims, keepdim=call.result.dim() == fact.values.dim()))
        return True

    def _norm(self, call: Call) -> bool:
        names = ("input", "normalized_shape", "weight", "bias")
        value, shape, weight, bias = call.arguments(*names)
        if call.name == "rms_norm":
            bias = None
        fact, gain = call.fact(value), call.fact(weight)
        if isinstance(fact, Labels):
            self.block(fact, f"{call.name} reads it")
        if not isinstance(gain, Reference) or gain.axes != (0,):
            return gain is None and bias is None
        channels = self._channels(gain, 0, "norm")
        if channels is not None and self._adds(bias, call.fact(bias), channels, -1):
            self._produce(call.result, channels, -1)
        return True

    def _attention(self, call: Call) -> bool:
        query, key, value = (call.fact(t) for t in call.arguments("query", "key", "value"))
        if any(isinstance(fact, Reference) for fact in (query, key, value)):
            return False
        for fact in (query, key):
            if isinstance(fact, Labels):
                self.block(fact, "attention compares it")
        mask = call.fact(call.arguments("query", "key", "value", "attn_mask")[3])
        if isinstance(mask, Labels):
            self.block(mask, "attention adds it")
        if not isinstance(value, Labels):
            return True
        labels = value.values
        if varies(labels, -2):
            return False
        labels = labels.narrow(-2, 0, 1)
        heads = call.result.dim() > 2 and labels.shape[-3] not in (1, call.result.shape[-3])
        if heads:  # enable_gqa
            labels = labels.repeat_interleave(call.result.shape[-3] // labels.shape[-3], -3)
        self.label(call.result, labels)
        return True

    # ------------------------------------------------------------ products

    def _contract(self, call: Call, product: Contraction) -> bool:
        first, second = call.fact(product.first), call.fact(product.second)
        if isinstance(first, Reference) and isinstance(second, Reference):
            return False
        if isinstance(second, Reference):
            return self._weight(
                call, product, second, product.second_letters, first, product.first_letters
            )
        if isinstance(first, Reference):
            return self._weight(
                call, product, first, product.first_letters, second, product.second_letters
            )
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
        return self._carried(call, product, fact.values, letters)

    def _carried(
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

    def _weight(
        self,
        call: Call,
        product: Contraction,
        weight: Reference,
        weight_letters: tuple[str, ...],
        fact: Fact | None,
        letters: tuple[str, ...],
    ) -> bool:
        """A product with a parameter reads labelled channels and produces others."""
        summed = product.summed()
        axes = dict(zip(weight_letters, weight.axes, strict=True))
        if len(summed) != 1 or axes[summed[0]] is None or weight.offset:
            return False
        axis, size = axes[summed[0]], self.parameters[weight.name].shape
        assert axis is not None
        labels = torch.full((size[axis],), UNLABELLED, dtype=torch.int32)
        if isinstance(fact, Labels):
            found = line(fact.values, letters.index(summed[0]))
            if found is None:
                self.block(fact, f"{weight.name} reads several channels in one place")
            else:
                labels = found.cpu()
        self.readings.setdefault(weight.name, []).append(Reading(axis, labels))
        if self.see is not None:
            read = product.first if letters is product.first_letters else product.second
            rows = read.detach().movedim(letters.index(summed[0]), -1)
            self.see(weight.name, rows.reshape(-1, rows.shape[-1]))
        new = [
            letter
            for letter, axis in axes.items()
            if axis is not None and letter in product.letters and letter not in letters
        ]
        channels = self._channels(weight, axes[new[0]], "linear") if len(new) == 1 else None
        if channels is None:
            if weight.name in self.channels:
                self._block_all(self.channels[weight.name], "it is used in several ways")
            bias = call.fact(product.bias)
            if isinstance(bias, Labels):
                self.block(bias, f"{call.name} adds it")
            elif isinstance(bias, Reference):
                self.lose(bias, f"{call.name} adds it")
            return True
        place = product.letters.index(new[0]) - len(product.letters)
        if self._adds(product.bias, call.fact(product.bias), channels, place):
            self._produce(call.result, channels, place)
        return True

    # ------------------------------------------------------------ channels

    def _channels(self, reference: Reference, axis: int | None, kind: str) -> Channels | None:
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
            self._block_all(found, "it is used in several ways")
            return None
        return found

    def _block_all(self, channels: Channels, reason: str) -> None:
        for number in range(channels.first, channels.first + channels.count):
            self.blocked.setdefault(number, reason)

    def _produce(self, tensor: Tensor, channels: Channels, place: int) -> None:
        """Label the channels along a dimension, counted from the end."""
        labels = torch.arange(
            channels.first, channels.first + channels.count, dtype=torch.int32, device=tensor.device
        )
        self.label(tensor, labels.view(-1, *[1] * (-place - 1)))

    def _adds(self, bias: Any, fact: Fact | None, channels: Channels, place: int) -> bool:
        """True if what is added to channels is scaled with them."""
        if bias is None or isinstance(fact, Zero):
            return True
        if isinstance(fact, Reference):
            labels = torch.arange(channels.first, channels.first + channels.count)
            if self._joins(fact, labels, place):
                return True
            self.lose(fact, "it is added to channels that are scaled")
        elif isinstance(fact, Labels):
            self.block(fact, "it is added to another value")
        self._block_all(channels, "a value that is no parameter is added to it")
        return False

    def _joins(self, bias: Reference, labels: Tensor, place: int) -> bool:
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


def _operands(call: Call) -> tuple[Any, Any] | None:
    """The two operands of a function of two values."""
    values = (*call.args, *(call.kwargs[key] for key in ("input", "other") if key in call.kwargs))
    return (values[0], values[1]) if len(values) == 2 else None


def _numbers(facts: list[Fact | None], pair: tuple[Any, Any]) -> list[tuple[Fact | None, Any]]:
    """Facts with the operands that are Python numbers; None instead of tensors."""
    return [
        (fact, value if isinstance(value, (int, float)) else None)
        for fact, value in zip(facts, pair, strict=True)
    ]
