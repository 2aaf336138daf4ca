"""GPTQ and AWQ of a single layer, step by step, as courses show them.

The verbs :func:`torchquant.gptq_` and :func:`torchquant.awq_` do this for a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.awq_inputs import LayerInputs, watch
from torchquant.algorithms.awq_scaling import AWQScales, scaled_rounding, search_scales
from torchquant.algorithms.batches import outputs_of, taken
from torchquant.algorithms.gptq_rounding import gptq
from torchquant.algorithms.hessian import Hessian
from torchquant.algorithms.inputs import columns
from torchquant.algorithms.integer_weight import IntegerWeight
from torchquant.configs import Weights
from torchquant.scheme import PER_CHANNEL, PerGroup


def collect_hessian(model: nn.Module, data: Iterable[Any], layer: str) -> Tensor:
    """The Hessian of the error of a layer's outputs: ``(2 / n) sum x x^T`` over its n inputs.

    Args:
        model: a float model.
        data: batches, as for :func:`torchquant.calibrate`.
        layer: name of a linear layer or convolution of the model.

    Returns:
        float32 ``[K, K]``, or ``[G, K, K]`` for a convolution with G groups.

    Raises:
        ValueError: data has no batches, or none reaches the layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> collect_hessian(model, [torch.eye(3), torch.eye(3)], "0")
        tensor([[0.6667, 0.0000, 0.0000],
                [0.0000, 0.6667, 0.0000],
                [0.0000, 0.0000, 0.6667]])
    """
    module = model.get_submodule(layer)
    hessian = Hessian.of(module)
    batches = taken("collect_hessian", data)
    for number, batch in enumerate(batches):

        def see(name: str, input: Tensor, output: Any, number: int = number) -> None:
            hessian.add(number, columns(module, input))

        outputs_of("collect_hessian", model, batch, None, {layer: see})
    if not hessian.rows:
        raise ValueError(f"collect_hessian: data must reach {layer} with finite inputs, got none")
    found = hessian.value()
    return found[0] if len(found) == 1 else found


def quantize_layer(
    weight: Tensor,
    H: Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
) -> IntegerWeight:
    """GPTQ of a weight: integers with a small error of the layer's outputs.

    Args:
        weight: float ``[N, K]``.
        H: float ``[K, K]``, see :func:`collect_hessian`.
        bits: 2 to 8.
        group_size: number of inputs that share a scale; None for one scale per output.
        symmetric: if False, each scale has a zero point.

    Returns:
        The integers with their scales and zero points; ``dequantize()`` gives the weight.

    Example:
        >>> found = quantize_layer(torch.tensor([[7.0, -3.4]]), torch.eye(2))
        >>> found.qweight
        tensor([[ 7, -3]], dtype=torch.int8)
    """
    return gptq(weight, H, _weights(bits, group_size, symmetric)).integers


def activation_importance(model: nn.Module, data: Iterable[Any], layer: str) -> Tensor:
    """The mean magnitude of each input channel of a layer, by which AWQ scales.

    Args:
        model, data, layer: see :func:`collect_hessian`.

    Returns:
        float32 ``[K]``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> activation_importance(model, [torch.tensor([[1.0, -2.0], [3.0, 2.0]])], "0")
        tensor([2., 2.])
    """
    batches = taken("activation_importance", data)
    inputs = LayerInputs(model.get_submodule(layer), len(batches))
    watch("activation_importance", model, batches, None, {layer: inputs}, [])
    if not inputs.count:
        raise ValueError(
            f"activation_importance: data must reach {layer} with finite inputs, got none"
        )
    return inputs.importance


@torch.no_grad()
def search_alpha(
    weight: Tensor,
    inputs: Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
) -> AWQScales:
    """AWQ of a layer: the scales of its input channels that give the least error of its outputs.

    Args:
        weight: float ``[N, K]``.
        inputs: float ``[n, K]``.
        bits, group_size, symmetric: see :func:`quantize_layer`.

    Returns:
        The scales, and alpha as ``exponent``: from 0 to 1, both included. :func:`quantize_scaled`
        rounds with the scales.

    Example:
        >>> weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        >>> x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
        >>> x[:, 5] *= 30
        >>> found = search_alpha(weight, x, bits=3)
        >>> found.exponent > 0, min(found.errors) < found.errors[0]
        (True, True)
    """
    part, expected = _weights(bits, group_size, symmetric), inputs @ weight.t()

    def error(scales: Tensor) -> float:
        outputs = inputs @ scaled_rounding(weight, scales, part).t()
        return float((outputs - expected).square().mean())

    return search_scales(inputs.abs().mean(0), error)


def quantize_scaled(
    weight: Tensor,
    scales: Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
) -> Tensor:
    """A weight whose columns are scaled, rounded, and scaled back.

    Args:
        weight: float ``[N, K]``.
        scales: float ``[K]``, the ``scales`` of :func:`search_alpha`.
        bits, group_size, symmetric: see :func:`quantize_layer`.

    Returns:
        float32 ``[N, K]``.

    Example:
        >>> quantize_scaled(torch.tensor([[7.0, 0.4]]), torch.tensor([1.0, 2.0]))
        tensor([[7.0000, 0.5000]])
    """
    return scaled_rounding(weight, scales, _weights(bits, group_size, symmetric))


def _weights(bits: int, group_size: int | None, symmetric: bool) -> Weights:
    granularity = PER_CHANNEL if group_size is None else PerGroup(group_size)
    return Weights(bits, symmetric, granularity=granularity)
