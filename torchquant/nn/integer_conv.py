"""A convolution in training: the integer forward of the deployed layer, and gradients through it.

The forward computes with int8 integers. The backward pass multiplies the values that the integers
represent, as if they had been the float inputs of the convolution: it needs the integers, their
scales, and the sign of each output if a ReLU is applied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant.nn.conv_geometry import is_channels_last


class Sizes(NamedTuple):
    """The sizes that the operators take; padding is before and after each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Integers(NamedTuple):
    """The integers of an input or a weight, with a scale and zero point per sample or channel.

    A zero point of None is 0.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def values(self) -> Tensor:
        """The float32 values that the integers represent."""
        shape = (-1, *[1] * (self.q.dim() - 1))
        steps = self.q.to(torch.float32)
        if self.zero_point is not None:
            steps = steps - self.zero_point.to(torch.float32).reshape(shape)
        return steps * self.scale.reshape(shape)


def quantize_samples(
    input: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    symmetric: bool,
) -> Integers:
    """The integers of each sample of an input, in the memory format of the input.

    Args:
        input: float ``[N, C, ...]``.
        scale, zero_point: of all samples; None gives each sample its own, from its range.
        qmin, qmax, symmetric: as for :func:`torchquant.ops.quantize_rows`.

    Example:
        >>> quantize_samples(torch.tensor([[[-3.0, 1.0]]]), None, None, -2, 1, False).q
        tensor([[[-2,  1]]], dtype=torch.int8)
    """
    last = is_channels_last(input)
    pixels = input.permute(0, 2, 3, 1) if last else input
    rows = pixels.flatten(1)
    q, scales, zeros = ops.quantize_rows(
        rows, scale, zero_point, qmin=qmin, qmax=qmax, symmetric=symmetric
    )
    q = q.reshape(pixels.shape)
    return Integers(q.permute(0, 3, 1, 2) if last else q, scales.reshape(-1), zeros.reshape(-1))


def integer_conv(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_integers: Integers,
    weight_integers: Integers,
    sizes: Sizes,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """A convolution on integers whose gradients pass straight through to float tensors.

    Args:
        values: the tensor that gets the gradient of the input, ``[N, C, ...]``.
        weight: the tensor that gets the gradient of the weight.
        bias: float ``[O]`` or None.
        input_integers: the integers of the input, with one scale per sample.
        weight_integers: the integers of the weight, with one scale per output channel.
        sizes: the sizes of the convolution.
        activation: "none" or "relu".
        dtype: the dtype of the result.
    """
    trained = (values, weight) if bias is None else (values, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained):
        result: Tensor = _IntegerConv.apply(
            values, weight, bias, *input_integers, *weight_integers[:2], sizes, activation, dtype
        )
        return result
    return _forward(bias, input_integers, weight_integers, sizes, activation, dtype)


def _forward(
    bias: Tensor | None,
    input: Integers,
    weight: Integers,
    sizes: Sizes,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return ops.conv_static(
        input.q,
        input.scale,
        input.zero_point,
        ops.pack_conv_weight(weight.q, sizes.groups),
        weight.scale,
        bias,
        weight_shape=weight.q.shape,
        **sizes._asdict(),
        activation=activation,
        output_dtype=dtype,
    )


class _IntegerConv(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qweight: Tensor,
        qweight_scale: Tensor,
        sizes: Sizes,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        integers = Integers(q, scale, zero_point), Integers(qweight, qweight_scale, None)
        detached = None if bias is None else bias.detach()
        return _forward(detached, *integers, sizes, activation, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, bias, *integers, sizes, activation, _ = inputs
        positive = output > 0 if activation == "relu" else None
        ctx.save_for_backward(*integers, positive)
        ctx.sizes = sizes
        ctx.dtypes = values.dtype, weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "QATConv: no gradient of the gradient (create_graph=True), the straight-through "
                "estimator has none; use the float layer (to_float()) for it"
            )
        q, scale, zero_point, qweight, qweight_scale, positive = ctx.saved_tensors
        grad = grads[0].to(torch.float32)
        if positive is not None:
            grad = torch.where(positive, grad, 0.0)
        needs = ctx.needs_input_grad[:3]
        found = _gradients(
            grad,
            Integers(q, scale, zero_point),
            Integers(qweight, qweight_scale, None),
            ctx.sizes,
            (needs[0], needs[1]),
        )
        bias_grad = grad.sum([0, *range(2, grad.dim())]) if needs[2] else None
        results = [
            None if one is None else one.to(dtype)
            for one, dtype in zip((*found, bias_grad), ctx.dtypes, strict=True)
        ]
        return *results, *[None] * 8


def _gradients(
    grad: Tensor, input: Integers, weight: Integers, sizes: Sizes, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and weight, in float32."""
    if not any(needs):
        return None, None
    x, padding = input.values(), sizes.padding
    before, after = padding[::2], padding[1::2]
    symmetric = before == after
    if not symmetric:  # torch's own operator pads both sides alike
        last_first = [
            side for pair in reversed([*zip(before, after, strict=True)]) for side in pair
        ]
        x = nn.functional.pad(x, last_first)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight.values(),
        None,
        list(sizes.stride),
        list(before) if symmetric else [0] * len(before),
        list(sizes.dilation),
        False,
        [0] * len(before),
        sizes.groups,
        [needs[0], needs[1], False],
    )
    if grad_input is not None and not symmetric:
        for place, size in enumerate(input.q.shape[2:]):
            grad_input = grad_input.narrow(2 + place, before[place], size)
    return grad_input, grad_weight


__all__ = ["quantize_samples"]
