"""Float embeddings: which of them can be quantized, and which are too small to benefit."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from torchquant.nn.base import QuantizedModule
from torchquant.nn.dtypes import FLOAT_DTYPES, dtype_name
from torchquant.nn.float_parameters import finite_refusal, instance_refusal, place_refusal

# A table below one of these sizes stays in float: the packed form is padded to 16 rows and 32
# values of a row.
MIN_ROWS = 16
MIN_WEIGHTS = 4096


def looks_like(module: nn.Module, float_class: type[nn.Module]) -> bool:
    """True if users expect a quantizer to take the module as ``float_class``.

    Example:
        >>> looks_like(nn.Embedding(4, 4), nn.Embedding), looks_like(nn.ReLU(), nn.Embedding)
        (True, False)
    """
    return isinstance(module, float_class)


def refusal(module: nn.Module, float_class: type[nn.Module]) -> str | None:
    """The reason why the type or structure of a module rules out a quantized embedding, or None.

    Example:
        >>> refusal(nn.Embedding(4, 4, max_norm=1.0), nn.Embedding)
        'max_norm, with which each call changes the weight'
    """
    reason = instance_refusal(module)
    if reason is not None:
        return reason
    if type(module) is not float_class:
        return f"{type(module).__name__} (subclass of nn.{float_class.__name__})"
    if "weight" not in module._parameters:
        return "weight computed from other tensors (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    if weight is None or is_lazy(weight) or type(weight) is not nn.Parameter:
        return f"weight of type {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES.values():
        return f"weight of dtype {dtype_name(weight.dtype)}"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm, with which each call changes the weight"
    return None


def value_refusal(module: nn.Module) -> str | None:
    """The reason why the values of a table that :func:`refusal` accepts rule it out, or None."""
    weight = module._parameters["weight"]
    assert weight is not None
    reason = place_refusal(weight)
    if reason is not None:
        return reason
    if weight.dim() != 2 or weight.numel() == 0:
        return f"weight of shape {list(weight.shape)}"
    return finite_refusal(weight.detach())


def too_small(module: nn.Module) -> bool:
    """True if a table is too small to benefit; depends on its shape alone.

    Example:
        >>> too_small(nn.Embedding(2, 768)), too_small(nn.Embedding(512, 768))
        (True, False)
    """
    rows, size = weight_shape(module)
    return rows < MIN_ROWS or rows * size < MIN_WEIGHTS


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """``(num_embeddings, embedding_dim)`` of a float or quantized embedding.

    Example:
        >>> weight_shape(nn.Embedding(10, 4))
        (10, 4)
    """
    if isinstance(module, QuantizedModule):
        return module.weight_shape
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.dim() != 2:
        return tuple(getattr(module, name, 0) for name in ("num_embeddings", "embedding_dim"))
    return tuple(weight.shape)


__all__ = ["looks_like", "refusal", "too_small", "weight_shape"]
