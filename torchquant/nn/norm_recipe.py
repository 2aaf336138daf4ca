"""How a norm of any class is computed with one operator, and for which calls this was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchquant import ops

#: What a call depends on: the dtypes of input, weight and bias, the number of dimensions of the
#: input, and whether the module is in training mode.
CallKey = tuple[torch.dtype, torch.dtype | None, torch.dtype | None, int, bool]
#: The same under autocast: autocast's device type and dtype, then the dtypes and the mode.
AutocastKey = tuple[str, torch.dtype, torch.dtype, torch.dtype | None, torch.dtype | None, bool]


@dataclass(frozen=True)
class NormRecipe:
    """One operator in place of a norm's forward.

    Attributes:
        family: "rms" for :func:`torchquant.ops.rms_norm`, "layer" for
            :func:`torchquant.ops.layer_norm`.
        weight: the name of the parameter that multiplies; None without one.
        bias: the name of the parameter that is added; None without one.
        eps: added to the mean square or to the variance.
        one_plus: the weight is ``1 + w``, as in Gemma.
        one_plus_wide: ``1 + w`` is computed in float32, not in the dtype of the weight.
        channels_first: the norm is over dimension 1 of ``[N, K, H, W]``.
        cast_before_weight: see :func:`torchquant.ops.rms_norm`.
        size: K, the length of the normalized dimension; None if every length is allowed.
        argument: name of the tensor argument of the norm's forward; None if it has no name.
        residual: whether ``norm(input, residual=y)`` may mean the norm of the sum, because the
            norm's forward has no such argument.
        contiguous: only contiguous input is allowed, because for other input the norm's output has
            other strides than the operator's.
        calls: the calls for which the operator gave the same results.
        autocast_calls: the same for calls under autocast.
        remark: what the operator does not compute, in words; may be empty.
    """

    family: Literal["rms", "layer"]
    weight: str | None
    bias: str | None
    eps: float
    one_plus: bool = False
    one_plus_wide: bool = False
    channels_first: bool = False
    cast_before_weight: bool = False
    size: int | None = None
    argument: str | None = None
    residual: bool = False
    contiguous: bool = False
    calls: frozenset[CallKey] = frozenset()
    autocast_calls: frozenset[AutocastKey] = frozenset()
    remark: str = ""

    def fits(self, input: Tensor) -> bool:
        """True if the normalized dimension has the length that the norm allows."""
        return self.size is None or self.length(input) == self.size

    def length(self, input: Tensor) -> int:
        """The length of the normalized dimension."""
        return input.shape[1 if self.channels_first else -1]

    def tensors(self, parameters: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """The weight and the bias as the operator takes them."""
        weight = None if self.weight is None else parameters.get(self.weight)
        bias = None if self.bias is None else parameters.get(self.bias)
        if self.one_plus and weight is not None:
            weight = self.multiplier(weight)
        return weight, bias

    def multiplier(self, weight: Tensor) -> Tensor:
        """``1 + w``, rounded as the norm rounds it."""
        return 1.0 + (weight.float() if self.one_plus_wide else weight)

    def compute(
        self,
        parameters: Mapping[str, Tensor | None],
        input: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The norm of ``input``, through the dispatcher."""
        if self.channels_first:
            input = input.permute(0, 2, 3, 1)
            return self._over_last_dimension(parameters, input, residual).permute(0, 3, 1, 2)
        return self._over_last_dimension(parameters, input, residual)

    def _over_last_dimension(
        self, parameters: Mapping[str, Tensor | None], input: Tensor, residual: Tensor | None
    ) -> Tensor:
        weight, bias = self.tensors(parameters)
        if self.family == "rms":
            return ops.rms_norm(input, weight, self.eps, cast_before_weight=self.cast_before_weight)
        return ops.layer_norm(input, weight, bias, self.eps, residual)


def call_key(input: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> CallKey:
    """The key of a call; see :data:`CallKey`."""
    return (
        input.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        input.dim(),
        training,
    )
