"""The arguments of quantized layers, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from torchquant import functional
from torchquant.configs import QuantizationConfig, Static
from torchquant.functional._checks import MIN_SCALE, scale_tensor, zero_point_tensor


def static_parameters(
    config: QuantizationConfig,
    scale: Tensor | None,
    zero_point: Tensor | None,
    device: torch.device,
    who: str = "QuantizedLinear.from_float",
) -> tuple[Tensor, Tensor] | None:
    """Checked copies of input_scale and input_zero_point on ``device``; None if dynamic."""
    activations = config.activations
    if not isinstance(activations, Static):
        if scale is not None or zero_point is not None:
            raise ValueError(
                f"{who}: input_scale and input_zero_point must be None for dynamic activations, "
                f"whose scales are computed at run time; config is {config}"
            )
        return None
    if scale is None:
        raise ValueError(
            f"{who}: input_scale must be given for static activations, got None: the range of the "
            "inputs cannot be derived from a weight; train with torchquant.prepare_qat_ and "
            "torchquant.convert_, or pass input_scale and input_zero_point"
        )
    qmin, qmax = activations.range
    if isinstance(scale, Tensor):
        scale = scale.detach().to(device, copy=True)
    if isinstance(zero_point, Tensor):
        zero_point = zero_point.to(device)
    scale = scale_tensor(who, "input_scale", scale, device, (1,))
    if not MIN_SCALE <= scale.item() < float("inf"):
        raise ValueError(
            f"{who}: input_scale must be finite and at least 2^-126, got {scale.item()}"
        )
    zero_point = zero_point_tensor(who, "input_zero_point", zero_point, device, qmin, qmax, (1,))
    if not qmin <= zero_point.item() <= qmax:
        raise ValueError(
            f"{who}: input_zero_point must be from {qmin} to {qmax}, got {zero_point.item()}"
        )
    return scale, zero_point.clone()


def check_size(name: str, value: int, who: str = "QuantizedLinear") -> int:
    """``value`` if it is a possible size of a layer; raises otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{who}: {name} must be an integer of at least 1, got {value!r}")
    return value


def check_activation(activation: str, who: str = "QuantizedLinear") -> str:
    """``activation`` if it names an activation function; raises otherwise."""
    if activation not in functional.ACTIVATIONS:
        raise ValueError(
            f"{who}: activation must be one of {', '.join(functional.ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    return activation
