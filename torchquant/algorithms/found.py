"""What an algorithm found for a layer, and how: the results of a walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchquant.convert.adjustment import Adjustment

__all__ = ["Found"]

_TENSORS = ("qweight", "weight_scale", "weight_zero_point")
_PLAIN = ("action", "reason", "nearest_error", "error", "rows", "fell_back")


@dataclass(frozen=True, eq=False)
class Found:
    """The integers that an algorithm found for a layer.

    Attributes:
        adjustment: the integers; None for the nearest ones.
        action: "compressed", or "rounded" if the algorithm could not be used.
        reason: why it could not be used, or a remark; may be empty.
        nearest_error: the squared error of the layer's outputs with the nearest integers, relative
            to the squares of the outputs.
        error: the same with these integers.
        rows: number of inputs that the layer saw.
        fell_back: True if rounding was the last resort, of which the user is warned.

    Example:
        >>> Found(None, "rounded", "saw 3 inputs").entry()["reason"]
        'saw 3 inputs'
    """

    adjustment: Adjustment | None
    action: str
    reason: str
    nearest_error: float = 0.0
    error: float = 0.0
    rows: int = 0
    fell_back: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the adjustment by name."""
        values = ((name, getattr(self.adjustment, name, None)) for name in _TENSORS)
        return {name: value for name, value in values if value is not None}

    def entry(self) -> dict[str, Any]:
        """The rest as JSON values."""
        by = None if self.adjustment is None else self.adjustment.found_by
        return {**{name: getattr(self, name) for name in _PLAIN}, "found_by": by}

    @classmethod
    def of(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
        """The reverse of :meth:`entry` and :meth:`tensors`.

        Example:
            >>> Found.of(Found(None, "rounded", "").entry(), {}).action
            'rounded'
        """
        adjustment = None
        if "qweight" in tensors:
            adjustment = Adjustment(
                tensors["qweight"],
                tensors["weight_scale"],
                weight_zero_point=tensors.get("weight_zero_point"),
                found_by=entry["found_by"],
            )
        return cls(adjustment, **{name: entry[name] for name in _PLAIN})
