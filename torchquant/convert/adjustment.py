"""What an algorithm found for a prepared layer: integers of its weight, a bias.

The float layer stays as it is, so that the prepared model remains the float model, and algorithms
can compare with it in any order. ``convert_`` gives the integers and the bias to the quantized
layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.nn.base import QuantizedModule
from torchquant.nn.float_form import FloatForm

_DOWN_OR_UP = 1.01  # an integer is less than 1 away from the number that it rounds; float errors
_ATTRIBUTE = "_torchquant_adjustment"  # of the float layer: copies and pickles of a model have it


@dataclass(frozen=True, eq=False)
class Adjustment:
    """The integers and the bias that a layer gets when it is converted.

    Attributes:
        qweight: int8, the canonical integers of the weight; None for the nearest integers.
        weight_scale: float32 ``[outputs]``, the scales of these integers; None with ``qweight``.
        bias: float ``[outputs]``; None for the bias of the float layer.
        corrected: the bias of the float layer of which ``bias`` is the correction; :func:`adjust`
            sets it.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> adjust(layer, Adjustment(bias=torch.zeros(2)))
        >>> adjustment_of(layer).bias, adjustment_of(nn.Linear(4, 2)).bias
        (tensor([0., 0.]), None)
    """

    qweight: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    corrected: Tensor | None = None


def adjustment_of(module: nn.Module) -> Adjustment:
    """The adjustment of a float layer; an empty one if it has none."""
    found: Any = module.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Adjustment) else Adjustment()


def adjust(module: nn.Module, adjustment: Adjustment) -> None:
    """Keep an adjustment with a float layer, in place of the one from before."""
    if adjustment.qweight is None and adjustment.bias is None:
        module.__dict__.pop(_ATTRIBUTE, None)
        return
    bias = module._parameters.get("bias")
    if adjustment.bias is not None and bias is not None:
        adjustment = replace(adjustment, corrected=bias.detach().clone())
    module.__dict__[_ATTRIBUTE] = adjustment


def is_adjusted(module: nn.Module) -> bool:
    """True if an algorithm found something for the layer."""
    return _ATTRIBUTE in module.__dict__


@torch.no_grad()
def apply_adjustment(module: nn.Module, layer: QuantizedModule) -> None:
    """Give a new quantized layer what was found for its float layer.

    Args:
        module: the float layer.
        layer: the layer that was made from it.

    Raises:
        ValueError: the weight has changed since the integers were found, or the bias since its
            correction was found.

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> module = nn.Linear(64, 32)
        >>> layer = QuantizedLinear.from_float(module)
        >>> found = Adjustment(layer.qweight, layer.weight_scale, torch.ones(32))
        >>> adjust(module, found)
        >>> apply_adjustment(module, layer)
        >>> layer.bias[0].item()
        1.0
    """
    found = adjustment_of(module)
    if found.qweight is not None and found.weight_scale is not None:
        if not _is_current(module, layer, found.qweight, found.weight_scale):
            raise ValueError(
                "the weight must be the one for which adaround_ found integers, but it has changed "
                "since; call adaround_ again"
            )
        tensors = {"qweight": found.qweight, "qweight_scale": found.weight_scale}
        layer.load_state_dict({**layer.state_dict(), **tensors})
    if found.bias is not None:
        bias: Any = module.bias
        seen = found.corrected
        if seen is not None and not torch.equal(bias, seen.to(bias.device, bias.dtype)):
            raise ValueError(
                "the bias must be the one that correct_bias_ corrected, but it has changed since; "
                "call correct_bias_ again"
            )
        value = found.bias.to(bias.device, bias.dtype, copy=True)
        layer.bias = nn.Parameter(value, requires_grad=bias.requires_grad)
    form = layer.__dict__.get("float_form", FloatForm())
    for copied in (layer, *form.empty):  # plain attributes of the float layer
        copied.__dict__.pop(_ATTRIBUTE, None)


def float_weight(module: Any) -> Tensor:
    """The weight of a float layer with the outputs first: ``[O, I]`` or ``[O, I / groups, ...]``.

    Example:
        >>> float_weight(nn.Linear(4, 2)).shape
        torch.Size([2, 4])
    """
    weight: Tensor = module.weight.detach().float()
    return weight if weight.dim() > 2 else FloatForm.of(module).matrix(weight)


def _is_current(module: Any, layer: QuantizedModule, qweight: Tensor, scale: Tensor) -> bool:
    """True if each integer is next to the weight, below or above, or at the end of the range."""
    weight = float_weight(module)
    if weight.shape != qweight.shape:
        return False
    qmin, qmax = layer.config.weights.range
    qweight = qweight.to(weight.device)
    position = weight / scale.to(weight.device).view(-1, *[1] * (weight.dim() - 1))
    apart = (position.clamp(qmin, qmax) - qweight).abs().amax()
    dtype: torch.dtype = module.weight.dtype
    return bool(apart <= _DOWN_OR_UP + qmax * torch.finfo(dtype).eps / 2)
