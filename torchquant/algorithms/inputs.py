"""What the layers of a model see: their inputs as the columns of a matrix product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant import ops
from torchquant.algorithms.consecutive import dimensions
from torchquant.nn.base import QuantizedModule
from torchquant.nn.conv_geometry import padded

__all__ = ["columns", "grouped_weight", "quantized_input"]


def columns(layer: Any, input: Tensor, most: int | None = None, seed: int = 0) -> Tensor:
    """The inputs of a layer as columns: the layer multiplies its weight by each of them.

    Args:
        layer: a float linear layer or convolution.
        input: what it is called with.
        most: the greatest number of columns of each sample; None for all. Of more, random ones are
            taken.
        seed: the chosen columns follow from it and from the shape of the input.

    Returns:
        float32 ``[G, K, columns]`` with G groups, as :func:`grouped_weight` has them.

    Example:
        >>> layer = torch.nn.Conv2d(4, 6, 3, groups=2, bias=False)
        >>> x = torch.randn(5, 4, 8, 8)
        >>> product = grouped_weight(layer, layer.weight) @ columns(layer, x)
        >>> product.shape
        torch.Size([2, 3, 180])
        >>> outputs = layer(x).transpose(0, 1).flatten(1)
        >>> torch.allclose(product.flatten(0, 1), outputs, atol=1e-5)
        True
    """
    spatial = dimensions(layer)
    input = input.detach().float()
    if not spatial:
        rows = input.reshape(-1, input.shape[-1])
        samples = input.shape[0] if input.dim() > 1 else 1
        found = rows.t().unsqueeze(0)
        return _chosen(found, samples * most, seed) if most else found
    if input.dim() == spatial + 1:
        input = input.unsqueeze(0)
    input, both = padded(layer, input)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if spatial == 1:
        input, both = input.unsqueeze(2), [0, 0, *both]
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    input = F.pad(input, (both[2], both[3], both[0], both[1]))
    patches = F.unfold(input, kernel, dilation, 0, stride)
    if most:
        patches = _chosen(patches, most, seed)
    groups = layer.groups
    by_group: Tensor = patches.unflatten(1, (groups, -1))  # [samples, G, K, places]
    return by_group.permute(1, 2, 0, 3).flatten(2)


def grouped_weight(layer: Any, weight: Tensor) -> Tensor:
    """A weight ``[O, ...]`` as ``[G, O / G, K]``.

    Example:
        >>> grouped_weight(torch.nn.Conv1d(4, 6, 3, groups=2), torch.zeros(6, 2, 3)).shape
        torch.Size([2, 3, 6])
    """
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def quantized_input(layer: QuantizedModule, input: Tensor) -> Tensor:
    """The input of a quantized layer as its integers represent it; unchanged if it is dynamic.

    Example:
        >>> import torchquant
        >>> config = torchquant.Int8StaticActivationInt8WeightConfig()
        >>> scale = torch.tensor([0.5])
        >>> layer = torchquant.QuantizedLinear.from_float(
        ...     torch.nn.Linear(2, 64), config, input_scale=scale)
        >>> quantized_input(layer, torch.tensor([[0.3, 1.1]]))
        tensor([[0.5000, 1.0000]])
    """
    scale: Any = getattr(layer, "input_scale", None)
    if scale is None:
        return input
    zero_point: Any = layer.input_zero_point
    qmin, qmax = layer.config.activations.range
    return ops.fake_quantize(input.detach().float(), scale, zero_point, qmin=qmin, qmax=qmax)


def _chosen(values: Tensor, most: int, seed: int) -> Tensor:
    """At most so many of the last dimension, at random, the same for each shape."""
    count = values.shape[-1]
    if count <= most:
        return values
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:most].to(values.device)
    return values[..., chosen]
