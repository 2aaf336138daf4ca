"""One integer matrix product and its epilogue, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One product with its epilogue. The caller has checked all fields.

    Args:
        x: int8 or uint8 ``[M, K']``, last stride 1. K' is ``k`` or the weight's width; columns from
            ``k`` on can have any content, because the weight is 0 there.
        weight: int8 ``[N16, K64]``, the rows of the layout.
        sums: int32 ``[N16]``, of the weight's rows.
        out: ``[M, N]``, last stride 1. int32 for raw sums, float, or int8 or uint8.
        k: in_features.
        scale: fp32 ``[1]`` or ``[M]``; None: raw sums.
        zero_point: int32 ``[1]`` or ``[M]``, or None.
        row_sums: int32 ``[M]``, of x over the k inputs; needed with weight_zero_point.
        weight_scale: fp32 ``[1]`` or ``[N]``; weight_zero_point: int32 ``[1]`` or ``[N]`` or None.
        bias: fp32 or int32 ``[N]`` or None.
        activation: a name of functional.ACTIVATIONS.
        output_scale: fp32 ``[1]`` for an int8 or uint8 output, with its zero point and range.
    """

    x: Tensor
    weight: Tensor
    sums: Tensor
    out: Tensor
    k: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    row_sums: Tensor | None = None
    weight_scale: Tensor | None = None
    weight_zero_point: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    output_scale: Tensor | None = None
    output_zero_point: int = 0
    output_qmin: int = -128
    output_qmax: int = 127

    @property
    def m(self) -> int:
        return self.out.shape[0]

    @property
    def n(self) -> int:
        return self.out.shape[1]

    @property
    def unsigned(self) -> bool:
        return self.x.dtype == torch.uint8

    @property
    def columns(self) -> int:
        """The columns that the product covers: all of x, which has padded K or k columns."""
        return self.x.shape[1]

    @property
    def loads_by_tma(self) -> bool:
        """True if the tensor memory accelerator can read x, which needs 16-byte aligned rows."""
        return self.x.stride(0) % 16 == 0 and self.x.data_ptr() % 16 == 0

    @property
    def stores_by_tma(self) -> bool:
        """True if the tensor memory accelerator can write the output."""
        size = self.out.element_size()
        return self.out.stride(0) * size % 16 == 0 and self.out.data_ptr() % 16 == 0


def greatest_k(unsigned: bool, zero_point: bool, weight_zero_point: bool) -> int:
    """The largest K for which the final sum fits into 32 bits for all integers."""
    x = 255 if unsigned or zero_point else 128
    w = 255 if weight_zero_point else 128
    return (2**31 - 1) // (x * w)
