"""Where the scale of a channel goes: from a norm or a linear layer to the layers that read it.

Every channel of every norm and of every matrix product with a parameter gets a number, and the
elements that would be divided by s if the channel were divided by s have this number as their
label. Where a matrix product with another parameter sums over labelled elements, the labels say
which of its weights would have to be multiplied by s. A function after which no scale is left, such
as a softmax, blocks the channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchquant.algorithms.channel_flow import ChannelFlow
from torchquant.algorithms.contraction import contraction
from torchquant.algorithms.dataflow import Call, operands, words
from torchquant.algorithms.labels import (
    UNLABELLED,
    Fact,
    Labels,
    Reference,
    Zero,
    along,
    line,
    varies,
)

PRODUCTS = words("mul multiply rmul imul")
QUOTIENTS = words("div divide true_divide truediv itruediv")
SUMS = words("add radd iadd")
DIFFERENCES = words("sub subtract isub")
# f(s x) = s f(x) for positive s.
HOMOGENEOUS = words("relu leaky_relu abs neg")
# They combine elements of the same place in several rows.
REDUCTIONS = words("sum mean")


class ScalingFlow(ChannelFlow):
    """Watches a forward and follows the scales of channels; see the top of this file.

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

    # ------------------------------------------------------------ functions

    def step(self, call: Call) -> bool:
        """Follow the labels through one function."""
        name = call.name
        found = contraction(call)
        if found is not None:
            return self.contract(call, found)
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
        if name == "pad":
            return self._pad(call)
        if name == "masked_fill":
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

    def _pad(self, call: Call) -> bool:
        """Rows of zeros have every scale."""
        source, _, mode, value = call.arguments("input", "pad", "mode", "value")
        fact = call.fact(source)
        place = along(fact.values) if isinstance(fact, Labels) else None
        if place is None or mode not in (None, "constant") or value:
            return False
        labels = line(fact.values, place) if isinstance(fact, Labels) else None
        if labels is None or len(labels) != call.result.shape[place]:
            return False
        self.label(call.result, labels.view(-1, *[1] * (call.result.dim() - place - 1)))
        return True

    def _multiply(self, call: Call) -> bool:
        pair = operands(call)
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
        channels = self.channels_of(gain, axes[0], "norm")
        if channels is not None:
            self.produce(call.result, channels, gain.axes.index(axes[0]) - len(gain.axes))
        return True

    def _divide(self, call: Call) -> bool:
        pair = operands(call)
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
        pair = operands(call)
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
        elif isinstance(first, Reference) or isinstance(second, Reference):
            return False
        else:
            for fact in (first, second):
                if isinstance(fact, Labels):
                    self.block(fact, "it is added to another value")
            self.ends(call.result, "an addition")
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
        if place is None or labels is None:
            return False
        if not self.joins(bias, labels, place - call.result.dim()):
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
        if bool(same.any()):
            self.label(call.result, torch.where(same, first, UNLABELLED))
        else:
            self.ends(call.result, "an addition")

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
        keepdim = call.result.dim() == fact.values.dim()
        self.label(call.result, fact.values.amax(dims, keepdim=keepdim))
        return True

    def _norm(self, call: Call) -> bool:
        names = ("input", "normalized_shape", "weight", "bias")
        value, _, weight, bias = call.arguments(*names)
        if call.name == "rms_norm":
            bias = None
        fact, gain = call.fact(value), call.fact(weight)
        if isinstance(fact, Labels):
            self.block(fact, f"{call.name} reads it")
        if not isinstance(gain, Reference) or gain.axes != (0,):
            return gain is None and bias is None
        channels = self.channels_of(gain, 0, "norm")
        if channels is not None and self.adds(bias, call.fact(bias), channels, -1):
            self.produce(call.result, channels, -1)
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


def _numbers(facts: list[Fact | None], pair: tuple[Any, Any]) -> list[tuple[Fact | None, Any]]:
    """Facts with the operands that are Python numbers; None instead of tensors."""
    return [
        (fact, value if isinstance(value, (int, float)) else None)
        for fact, value in zip(facts, pair, strict=True)
    ]
