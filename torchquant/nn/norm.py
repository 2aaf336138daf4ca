"""RMSNorm and LayerNorm on the kernels; drop-in replacements with the same state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant._extension import load
from torchquant.nn.norm_probe import find_recipe
from torchquant.nn.norm_recipe import NormRecipe
from torchquant.ops._arguments import has_kernels

_C = load()
_fast_rms_norm, _fast_layer_norm = _C.rms_norm, _C.layer_norm

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        size: K, the length of the last dimension.
        eps: added to the mean square.
        elementwise_affine: whether the module has a weight.
        cast_before_weight: order of rounding for bfloat16 and float16 input; see
            :func:`torchquant.ops.rms_norm`. False is the order of torch, True the order of Llama in
            transformers.
        device: device of the weight.
        dtype: dtype of the weight.

    State dict: ``weight`` ``[K]``, as in ``torch.nn.RMSNorm`` and in transformers.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]], grad_fn=<...>)
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        cast_before_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.cast_before_weight = cast_before_weight
        ones = torch.ones(size, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if ones is None else nn.Parameter(ones))

    @classmethod
    def from_float(cls, norm: nn.Module) -> RMSNorm:
        """Create an RMSNorm that shares the weight of a float norm.

        Args:
            norm: ``torch.nn.RMSNorm`` over one dimension, or any module with a ``weight`` ``[K]``
                and ``variance_epsilon`` or ``eps`` that computes the same function. Copies of the
                norm are compared with the operator, in both modes and all dtypes; the comparison
                also determines the order of rounding.

        Raises:
            TypeError: norm lacks these attributes.
            ValueError: norm computes a different function (for example a weight of ``1 + w``, or a
                mean that is subtracted), takes more arguments than the input, normalizes several
                dimensions, has a weight that is not float ``[K]``, or is on the meta device.
        """
        if type(norm) is nn.RMSNorm:
            if len(norm.normalized_shape) != 1:
                raise ValueError(
                    "RMSNorm.from_float: norm must normalize one dimension, got "
                    f"{list(norm.normalized_shape)}"
                )
            weight: Any = norm.weight
            eps = norm.eps
            if eps is None:
                eps = torch.finfo(torch.float32).eps
            size = norm.normalized_shape[0]
        else:
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            weight = getattr(norm, "weight", None)
            if not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
                raise TypeError(
                    "RMSNorm.from_float: norm must be torch.nn.RMSNorm or have a weight and "
                    f"variance_epsilon or eps, got {type(norm).__name__}"
                )
            size = weight.shape[-1] if weight.dim() else 0
        _check_weight("RMSNorm.from_float", weight, size)
        result = cls(size, eps, False)
        result.register_parameter("weight", weight)
        if type(norm) is not nn.RMSNorm:
            recipe = _recipe("RMSNorm.from_float", norm, "x / sqrt(mean(x^2) + eps) * weight")
            result.eps, result.cast_before_weight = recipe.eps, recipe.cast_before_weight
        return result.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, float32, bfloat16 or float16 ``[..., K]``.

        The output has the shape and dtype of the input.
        """
        weight = self._parameters["weight"]
        if type(input) is Tensor and not torch.compiler.is_dynamo_compiling():
            return _fast_rms_norm(input, weight, self.eps, self.cast_before_weight)  # type: ignore[no-any-return]
        return ops.rms_norm(input, weight, self.eps, cast_before_weight=self.cast_before_weight)

    def extra_repr(self) -> str:
        cast = ", cast_before_weight=True" if self.cast_before_weight else ""
        return f"{self.size}, eps={self.eps}, weight={self.weight is not None}{cast}"


class LayerNorm(nn.Module):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension.

    ``forward(input, residual)`` normalizes ``input + residual`` in the same pass.

    Args:
        size: K, the length of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether the module has a weight.
        bias: whether the module has a bias in addition to the weight.
        device: device of weight and bias.
        dtype: dtype of weight and bias.

    State dict: ``weight`` and ``bias`` ``[K]``, as in ``torch.nn.LayerNorm``.

    Example:
        >>> LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]], grad_fn=<...>)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        weight = offset = None
        if elementwise_affine:
            weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
            if bias:
                offset = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", offset)

    @classmethod
    def from_float(cls, norm: nn.LayerNorm) -> LayerNorm:
        """Create a LayerNorm that shares weight and bias of a float norm.

        Args:
            norm: a ``torch.nn.LayerNorm`` over one dimension, or a subclass that computes the same
                function.

        Raises:
            TypeError: norm is not a ``torch.nn.LayerNorm``.
            ValueError: norm normalizes several dimensions, computes a different function or takes
                more arguments than the input, or its weight is not float ``[K]`` on the CPU or a
                CUDA device.
        """
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(
                "LayerNorm.from_float: norm must be a torch.nn.LayerNorm, "
                f"got {type(norm).__name__}"
            )
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                "LayerNorm.from_float: norm must normalize one dimension, got "
                f"{list(norm.normalized_shape)}"
            )
        size = norm.normalized_shape[0]
        _check_weight("LayerNorm.from_float", norm.weight, size)
        result = cls(size, norm.eps, False)
        if type(norm) is not nn.LayerNorm:
            formula = "(x - mean(x)) / sqrt(var(x) + eps) * weight + bias"
            result.eps = _recipe("LayerNorm.from_float", norm, formula).eps
        result.weight, result.bias = norm.weight, norm.bias
        return result.train(norm.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``, or ``input + residual``, float32, bfloat16 or float16 ``[..., K]``.

        The output has the shape and dtype of the input.
        """
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if type(input) is Tensor and not torch.compiler.is_dynamo_compiling():
            return _fast_layer_norm(input, weight, bias, self.eps, residual)  # type: ignore[no-any-return]
        return ops.layer_norm(input, weight, bias, self.eps, residual)

    def extra_repr(self) -> str:
        return (
            f"{self.size}, eps={self.eps}, weight={self.weight is not None}, "
            f"bias={self.bias is not None}"
        )


def _check_weight(who: str, weight: Any, size: int) -> None:
    if weight is None:
        return
    if list(weight.shape) != [size] or weight.dtype not in _FLOAT_DTYPES:
        raise ValueError(
            f"{who}: weight must be float [{size}], got {weight.dtype} {list(weight.shape)}"
        )
    if not has_kernels(weight):
        raise ValueError(
            f"{who}: weight must be on the CPU or on a CUDA device, got one on {weight.device}"
        )


def _recipe(who: str, norm: nn.Module, formula: str) -> NormRecipe:
    """How the norm is computed; raises ValueError if not by ``formula`` in every call."""
    wanted = f"{who}: norm must compute {formula}"
    name = type(norm).__name__
    recipe = find_recipe(norm)
    if isinstance(recipe, str):
        raise ValueError(f"{wanted}, got {name}: {recipe}")
    family = "rms" if who.startswith("RMSNorm") else "layer"
    if recipe.family != family or recipe.one_plus or recipe.weight not in ("weight", None):
        raise ValueError(f"{wanted}, but {name} gives different values on a probe")
    if recipe.remark:
        raise ValueError(f"{wanted} in every call, got {name}: {recipe.remark}")
    return recipe
