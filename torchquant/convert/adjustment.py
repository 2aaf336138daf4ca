"""What an algorithm found for a float layer: integers of its weight, a bias.

The float layer stays as it is, so that the model remains the float model, and algorithms can
compare with it in any order. ``convert_`` gives the integers and the bias to the quantized layer
that it makes from a prepared layer; ``quantize_`` does so for a layer that needs no preparation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.configs import Weights
from torchquant.functional import pack_integers
from torchquant.nn.base import QuantizedModule
from torchquant.nn.float_form import FloatForm
from torchquant.nn.intx_weight import group_size_of

_CHUNK = 1 << 20  # weights that are summed at once in double precision
_ATTRIBUTE = "_torchquant_adjustment"  # of the float layer: copies and pickles of a model have it


@dataclass(frozen=True, eq=False)
class Adjustment:
    """The integers and the bias that a layer gets when it is converted.

    Attributes:
        qweight: int8, the canonical integers of the weight, outputs first; None for the nearest
            integers.
        weight_scale: float32 ``[outputs]``, or ``[outputs, groups]``, the scales of these integers;
            None with ``qweight``.
        bias: float ``[outputs]``; None for the bias of the float layer.
        corrected: the bias of the float layer of which ``bias`` is the correction; :func:`adjust`
            sets it.
        weight_zero_point: int8 or int32 of the shape of ``weight_scale``; None if symmetric.
        found_by: the verb that found the integers, for messages.
        seen: sums over the rows of the weight for which the integers were found; :func:`adjust`
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
    weight_zero_point: Tensor | None = None
    found_by: str = "adaround_"
    seen: Tensor | None = None


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
    if adjustment.qweight is not None:
        adjustment = replace(adjustment, seen=_sums(float_weight(module))[0])
    module.__dict__[_ATTRIBUTE] = adjustment


def restore_adjustment(module: nn.Module, adjustment: Adjustment) -> None:
    """Give a float layer the adjustment back that :func:`adjustment_of` returned, as it was.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> before = adjustment_of(layer)
        >>> adjust(layer, Adjustment(bias=torch.zeros(2)))
        >>> restore_adjustment(layer, before)
        >>> is_adjusted(layer)
        False
    """
    if adjustment.qweight is None and adjustment.bias is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        module.__dict__[_ATTRIBUTE] = adjustment


def is_adjusted(module: nn.Module) -> bool:
    """True if an algorithm found something for the layer."""
    return _ATTRIBUTE in module.__dict__


@torch.no_grad()
def adjustment_problem(module: nn.Module, weights: Weights) -> str | None:
    """Why a layer of these weights cannot take what was found for its float layer, or None.

    Args:
        module: the float layer.
        weights: the weights of the configuration that the quantized layer has.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> adjust(layer, Adjustment(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2)))
        >>> adjustment_problem(layer, Weights()) is None
        True
        >>> print(adjustment_problem(layer, Weights(symmetric=False)).partition(", but")[0])
        adaround_ found integers without zero points
    """
    found = adjustment_of(module)
    if found.bias is not None:
        bias, seen = module._parameters.get("bias"), found.corrected
        if bias is None or (seen is not None and not _same(bias, seen)):
            return (
                "the bias must be the one that correct_bias_ corrected, but it has changed since; "
                "call correct_bias_ again"
            )
    if found.qweight is None or found.weight_scale is None:
        return None
    weight, verb = float_weight(module), found.found_by
    if weight.shape != found.qweight.shape or not _is_seen(module, weight, found.seen):
        return (
            f"the weight must be the one for which {verb} found integers, but it has changed "
            f"since; call {verb} again"
        )
    problem = None
    shape, (qmin, qmax) = _scale_shape(weight, weights), weights.range
    if (found.weight_zero_point is None) is not weights.symmetric:
        problem = f"integers {'with' if weights.symmetric else 'without'} zero points"
    elif tuple(found.weight_scale.shape) != shape:
        problem = f"scales of shape {list(found.weight_scale.shape)} instead of {list(shape)}"
    elif bool((found.qweight < qmin).any() | (found.qweight > qmax).any()):
        problem = f"integers that are not all from {qmin} to {qmax}"
    if problem is None:
        return None
    return (
        f"{verb} found {problem}, but the weights are {weights}; pass the configuration that "
        f"{verb} had, or call {verb} again"
    )


@torch.no_grad()
def apply_adjustment(module: nn.Module, layer: QuantizedModule) -> None:
    """Give a new quantized layer what was found for its float layer.

    Args:
        module: the float layer.
        layer: the layer that was made from it.

    Raises:
        ValueError: see :func:`adjustment_problem`.

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
    problem = adjustment_problem(module, layer.config.weights)
    if problem is not None:
        raise ValueError(problem)
    give_integers(found, layer)
    if found.bias is not None:
        bias: Any = module.bias
        value = found.bias.to(bias.device, bias.dtype, copy=True)
        layer.bias = nn.Parameter(value, requires_grad=bias.requires_grad)
    form = layer.__dict__.get("float_form", FloatForm())
    for copied in (layer, *form.empty):  # plain attributes of the float layer
        copied.__dict__.pop(_ATTRIBUTE, None)


@torch.no_grad()
def give_integers(found: Adjustment, layer: QuantizedModule) -> None:
    """Give a quantized layer the integers that were found, if there are any.

    Example:
        >>> from torchquant.nn import QuantizedIntxLinear
        >>> layer = QuantizedIntxLinear.from_float(nn.Linear(64, 32))
        >>> give_integers(Adjustment(torch.ones_like(layer.integers), layer.weight_scale), layer)
        >>> layer.integers.float().mean()
        tensor(1.)
    """
    if found.qweight is None or found.weight_scale is None:
        return
    described = layer.canonical()
    packed, bits = described["qweight"][0] == torch.uint8, layer.config.weights.bits
    tensors = {
        "qweight": pack_integers(found.qweight, bits) if packed else found.qweight,
        "qweight_scale": found.weight_scale,
    }
    if found.weight_zero_point is not None:
        dtype = described["qweight_zero_point"][0]
        tensors["qweight_zero_point"] = found.weight_zero_point.to(dtype)
    layer.load_state_dict({**layer.state_dict(), **tensors})


def float_weight(module: Any) -> Tensor:
    """The weight of a float layer with the outputs first: ``[O, I]`` or ``[O, I / groups, ...]``.

    Example:
        >>> float_weight(nn.Linear(4, 2)).shape
        torch.Size([2, 4])
    """
    weight: Tensor = module.weight.detach().float()
    return weight if weight.dim() > 2 else FloatForm.of(module).matrix(weight)


def _scale_shape(weight: Tensor, weights: Weights) -> tuple[int, ...]:
    """The shape of the scales of a layer; a scale for all outputs is repeated."""
    size = group_size_of(weights)
    outputs, terms = weight.shape[0], weight[0].numel()
    return (outputs,) if size is None else (outputs, -(-terms // size))


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows of a weight that differ for other orders, and the sums of magnitudes."""
    rows = weight.flatten(1)
    place = torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=rows.device)
    parts = rows.split(max(1, _CHUNK // max(1, rows.shape[1])))
    sums = [torch.stack([part @ place, part.abs() @ place]) for part in map(Tensor.double, parts)]
    signed, sizes = torch.cat(sums, 1)
    return signed, sizes


def _is_seen(module: Any, weight: Tensor, seen: Tensor | None) -> bool:
    """True if a weight has the sums of before, but for a conversion to the dtype of the module."""
    if seen is None:
        return True
    sums, sizes = _sums(weight)
    apart = (sums - seen.to(sums.device)).abs()
    return bool((apart <= torch.finfo(module.weight.dtype).eps * sizes).all())


def _same(bias: Tensor, seen: Tensor) -> bool:
    return torch.equal(bias, seen.to(bias.device, bias.dtype))
