"""parameter_groups: a model's parameters for an optimizer; learned steps get no weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchquant.training.learned_clip import PACTQuantizer
from torchquant.training.learned_steps import LSQQuantizer


def parameter_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """A model's trainable parameters for an optimizer, with weight decay only where it helps.

    Weight decay would pull learned steps, offsets and clips towards 0. That does not make a model
    simpler; it changes the quantization. So they get no decay, and neither do biases and the
    parameters of normalisation layers.

    Args:
        model: any module.
        weight_decay: for all other parameters.

    Returns:
        Two groups: with ``weight_decay``, then with 0. A shared parameter appears once.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: weight_decay is not a number of at least 0.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), LSQQuantizer())
        >>> [len(group["params"]) for group in parameter_groups(model, 0.1)]
        [1, 2]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(weight_decay, (int, float)) or not weight_decay >= 0:
        raise ValueError(
            f"parameter_groups: weight_decay must be a number of at least 0, got {weight_decay!r}"
        )
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        spared = (
            isinstance(module, (LSQQuantizer, PACTQuantizer)) or "Norm" in type(module).__name__
        )
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            # Parameters with one dimension are biases and gains, whatever their names.
            exempt = spared or parameter.dim() <= 1 or name.endswith("bias")
            (others if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": float(weight_decay)},
        {"params": others, "weight_decay": 0.0},
    ]


__all__ = ["parameter_groups"]
