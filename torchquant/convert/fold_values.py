"""The values of a layer that computes a batch norm as well, compared on random input."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.nn.folded_norm import FoldedNorm

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TOLERANCE = 1e-5


def fold(layer: Any, norm: Any) -> str:
    """Fold a batch norm into a layer, in place; the reason why it stays, or empty.

    Example:
        >>> layer, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        >>> norm.running_mean += 1
        >>> bias = layer.bias
        >>> fold(layer, norm), torch.allclose(layer.bias, (bias - 1) / (1 + norm.eps) ** 0.5)
        ('', True)
    """
    old_weight, old_bias = layer._parameters["weight"], layer._parameters["bias"]
    with torch.inference_mode(False), torch.no_grad():
        input = _probe(layer)
        wanted = frozen(norm, _apply(layer, input))
        weight, bias = _folded(layer, norm)
        layer._parameters["weight"] = nn.Parameter(weight, old_weight.requires_grad)
        trained = old_weight.requires_grad if old_bias is None else old_bias.requires_grad
        layer._parameters["bias"] = nn.Parameter(bias, trained)
        got = _apply(layer, input)
        allowed = _TOLERANCE * wanted.abs().max()
        error = (got - wanted).abs().max()
        if bool(error <= allowed):
            return ""
        layer._parameters["weight"], layer._parameters["bias"] = old_weight, old_bias
    relative = float(error / wanted.abs().max())
    return f"the folded layer differs by {relative:.1e} of the greatest result"


def extension_problem(norm: Any) -> str:
    """Why a derived batch norm is no batch norm followed by its own modules; or empty.

    Its forward was recorded, so it only computes; it runs in a copy.

    Example:
        >>> extension_problem(nn.BatchNorm2d(8))
        ''
    """
    name = type(norm).__name__
    copied = copy.deepcopy(norm).eval()
    dimensions = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
    spatial = next(count for cls, count in dimensions.items() if isinstance(norm, cls))
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, norm.num_features, *[5] * spatial)
    x = torch.randn(shape, generator=generator, dtype=norm.running_mean.dtype)
    x = x.to(norm.running_mean.device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            got = type(copied).forward(copied, x.clone())
            wanted = FoldedNorm.in_place_of(copied)(frozen(copied, x))
        except Exception as error:
            return f"{name} does not take a batch of {list(shape)}: {error}"
        same = isinstance(got, Tensor) and got.shape == wanted.shape
        if same and bool((got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()):
            return ""
    return f"{name} computes more than a batch norm and its own modules"


def channels(layer: Any) -> int:
    """The output channels of a layer.

    Example:
        >>> channels(nn.Linear(2, 3)), channels(nn.Conv1d(2, 5, 1))
        (3, 5)
    """
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def frozen(norm: Any, x: Tensor) -> Tensor:
    """The batch norm with its running statistics, in either mode.

    Example:
        >>> frozen(nn.BatchNorm1d(1, eps=0.0), torch.ones(1, 1))
        tensor([[1.]], grad_fn=<NativeBatchNormBackward0>)
    """
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    ones = torch.ones_like(variance)
    gain = ones if norm.weight is None else norm.weight.detach().double()
    shift = 0 * ones if norm.bias is None else norm.bias.detach().double()
    bias = 0 * ones if layer.bias is None else layer.bias.detach().double()
    factor = gain / torch.sqrt(variance + norm.eps)
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...], groups after each other
        groups = layer.groups
        grouped = weight.double().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        by_group = factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (grouped * by_group).reshape(weight.shape)
    else:
        scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), (shift + (bias - mean) * factor).to(weight.dtype)


def _apply(layer: nn.Module, input: Tensor) -> Tensor:
    """The forward of the layer's class, without hooks."""
    output: Tensor = type(layer).forward(layer, input)
    return output


def _probe(layer: Any) -> Tensor:
    """Random input, large enough for a few outputs in each dimension."""
    weight = layer.weight
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape: Iterable[int] = (4, layer.in_features)
    elif isinstance(layer, _TRANSPOSED):
        shape = (2, layer.in_channels, *[3] * (weight.dim() - 2))
    else:
        spans = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape = (2, layer.in_channels, *[(k - 1) * d + 1 + s for k, d, s in spans])
    input = torch.randn(tuple(shape), generator=generator, dtype=weight.dtype)
    return input.to(weight.device)


__all__ = ["channels", "extension_problem", "fold", "frozen"]
