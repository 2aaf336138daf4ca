"""One integer matrix product with everything after it, as data: who runs it is said elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One product with its epilogue; checked by who makes it.

    Args:
        x: int8 or uint8 ``[M, K']``, last stride 1; columns from ``k`` to K' have any content, the
            weight is 0 there (K' = weight's width then).
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
        """Over which the product runs: all of x, which is the layout's padded K or k itself."""
        return self.x.shape[1]

    @property
    def loads_by_tma(self) -> bool:
        """Whether the tensor memory accelerator can read x: 16-byte aligned rows."""
        return self.x.stride(0) % 16 == 0 and self.x.data_ptr() % 16 == 0

    @property
    def stores_by_tma(self) -> bool:
        """Whether it can write the output."""
        size = self.out.element_size()
        return self.out.stride(0) * size % 16 == 0 and self.out.data_ptr() % 16 == 0


def greatest_k(unsigned: bool, zero_point: bool, weight_zero_point: bool) -> int:
    """Up to which K the final sum fits into 32 bits, whatever the integers are."""
    x = 255 if unsigned or zero_point else 128
    w = 255 if weight_zero_point else 128
    return (2**31 - 1) // (x * w)
