"""quantized_linear: one call for every kind of integer linear, from plain or packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant.functional.quantized_linear import (
    check_integer_input,
    check_quantized_linear,
    check_weight,
)
from torchquant.ops.linear import linear_static, pack_weight, unpack_weight

__all__ = ["PackedWeight", "quantized_linear"]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed int8 weight and its size, for repeated calls of :func:`quantized_linear`.

    Example:
        >>> weight = PackedWeight.pack(torch.ones(8, 32, dtype=torch.int8))
        >>> weight.out_features, weight.in_features, torch.equal(weight.unpack(), torch.ones(8, 32))
        (8, 32, True)
    """

    packed: Tensor
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor) -> PackedWeight:
        """Pack an int8 ``[N, K]`` weight."""
        return cls(pack_weight(weight), weight.shape[0], weight.shape[1])

    def unpack(self) -> Tensor:
        """The int8 ``[N, K]`` weight."""
        return unpack_weight(self.packed, self.out_features, self.in_features)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Pack the weight for another device's kernels; return self if it is on that device."""
        if torch.device(device) == self.packed.device:
            return self
        return PackedWeight.pack(self.unpack().to(device))


def quantized_linear(
    input: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    input_scale: float | Tensor,
    input_zero_point: int | Tensor = 0,
    weight_scale: float | Tensor,
    weight_zero_point: int | Tensor | None = None,
    output_scale: float | Tensor | None = None,
    output_zero_point: int | Tensor = 0,
    output_bits: int = 8,
    output_dtype: torch.dtype = torch.float32,
    activation: str = "none",
) -> Tensor:
    """Run an int8 linear layer with int32 accumulation on integers; the result is float or integer.

    ``y = activation((input - input_zero_point) @ (weight - weight_zero_point).T * input_scale *
    weight_scale + bias)``; zero points are compensated with row and column sums, so the
    product stays int8.

    Args:
        input: int8 or uint8 ``[..., K]``.
        weight: int8 ``[N, K]``, N and K not 0, packed on each call; or a :class:`PackedWeight`.
        bias: int32 ``[N]`` in units of ``input_scale * weight_scale`` (without zero-point
            shift), float ``[N]``, or None.
        input_scale, input_zero_point: one value, or a tensor with one per row of input.
        weight_scale, weight_zero_point: one value, or a tensor ``[N]``.
        output_scale: if given, the result is quantized to int8, or to uint8 with
            ``output_dtype=torch.uint8``.
        output_zero_point, output_bits: zero point and number of bits of a quantized result.
        output_dtype: float32, bfloat16 or float16 (int8 or uint8 with ``output_scale``).
        activation: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid
            or leaky_relu.

    Returns:
        ``[..., N]``; the bits of :func:`torchquant.functional.quantized_linear` on every device.

    Raises:
        TypeError: a tensor or ``output_dtype`` has a wrong dtype.
        ValueError: a shape, a device, a number, ``output_bits``, or the activation's name is wrong.

    Source: Jacob et al. (2018), section 2.3, for the zero-point algebra.

    Example:
        >>> x = torch.tensor([[1, -2, 3]], dtype=torch.int8)
        >>> w = torch.tensor([[1, 1, 1], [2, 0, -2]], dtype=torch.int8)
        >>> quantized_linear(x, w, input_scale=0.5, input_zero_point=1, weight_scale=0.25)
        tensor([[-0.1250, -0.5000]])
    """
    who = "quantized_linear"
    check_integer_input(who, input)
    if not isinstance(weight, PackedWeight):
        check_weight(who, input, weight)
        weight = PackedWeight.pack(weight)
    elif weight.in_features != input.shape[-1]:
        raise ValueError(
            f"{who}: weight must be packed from int8 [N, K] with K = {input.shape[-1]}, "
            f"got [{weight.out_features}, {weight.in_features}]"
        )
    checked = check_quantized_linear(
        who,
        input,
        weight.out_features,
        bias,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        weight_scale=weight_scale,
        weight_zero_point=weight_zero_point,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_range=output_bits,
        output_dtype=output_dtype,
        activation=activation,
    )
    return linear_static(
        input,
        checked.input_scale,
        checked.input_zero_point,
        weight.packed,
        checked.weight_scale,
        None if weight_zero_point is None else checked.weight_zero_point,
        bias,
        out_features=weight.out_features,
        activation=activation,
        output_dtype=checked.output_dtype,
        output_scale=checked.output_scale,
        output_zero_point=int(output_zero_point),
        output_qmin=checked.output_qmin,
        output_qmax=checked.output_qmax,
    )
