"""What a verb says about the regions of a model, in which values stay int8 between layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torchquant.report.words import percent


@dataclass(frozen=True)
class BreakReport:
    """A call at which the values of a region are float.

    Attributes:
        name: the module in whose forward the call is, and what is called.
        reason: why it is not computed on integers.
        flops: its share of the region's arithmetic, in operations of the first batch.

    Example:
        >>> BreakReport("head: softmax", "it has no int8 step", 640).flops
        640
    """

    name: str
    reason: str
    flops: int = 0


@dataclass(frozen=True)
class RegionReport:
    """What a verb did to a region: a module whose values stay int8 from layer to layer.

    Attributes:
        name: the module's name in the model; "" is the model itself.
        kind: the name of its class.
        action: "found" before a batch has shown the sizes; afterwards "observed", "trained" (as
            int8) or "int8"; "float" for a module that cannot be one.
        reason: why it cannot; or empty.
        layers: the number of its layers with static activations.
        values: the number of its int8 values.
        breaks: the calls at which values are float.
        flops: the arithmetic of the first batch in operations, two for each multiply-add.
        int8_flops: the part of it that runs on integers.

    Example:
        >>> print(RegionReport("", "Net", "int8", "", 3, 5, (), 1000, 990))
        int8: the model (Net): 3 layers, 5 values between layers; 99 % of the multiply-adds
    """

    name: str
    kind: str
    action: Literal["found", "observed", "trained", "int8", "float"]
    reason: str
    layers: int = 0
    values: int = 0
    breaks: tuple[BreakReport, ...] = ()
    flops: int = 0
    int8_flops: int = 0

    @property
    def share(self) -> float | None:
        """The part of the multiply-adds that runs on integers; None before the first batch."""
        return self.int8_flops / self.flops if self.flops else None

    def __str__(self) -> str:
        where = f"{self.name or 'the model'} ({self.kind})"
        if self.action == "float":
            return f"float between the layers of {where}: {self.reason}"
        layers = f"{self.layers} layer{'' if self.layers == 1 else 's'}"
        if self.action == "found":
            return f"found: {where}: {layers}; the first batch shows which values can be int8"
        text = f"{self.action}: {where}: {layers}, {self.values} values between layers"
        if self.flops:
            text += f"; {percent(self.int8_flops, self.flops)} of the multiply-adds"
        if self.breaks:
            kinds = Counter(one.reason for one in self.breaks)
            listed = (
                f"{reason} ({count} times)" if count > 1 else reason
                for reason, count in kinds.items()
            )
            text += f"; float at {', '.join(listed)}"
        return text


__all__ = ["BreakReport", "RegionReport"]
