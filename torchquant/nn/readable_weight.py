"""ReadableWeight: what ``layer.weight`` of a quantized layer returns.

Models read the weight of a linear layer outside of the layer: for its dtype or shape (T5), to
multiply with it (Swin), to initialise or tie it (transformers). A quantized layer holds integers
only, so its ``weight`` is a tensor that answers questions about shape, dtype and device at once and
dequantizes the integers for each other use. It is made anew by each access and belongs to no state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

_REMEDY = (
    "to change it, convert the layer back with torchquant.to_float_(model), change the weight, "
    "and quantize again"
)


class Readable(Protocol):
    """The attributes of a layer that :class:`ReadableWeight` uses."""

    @property
    def float_shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def is_table(self) -> bool:
        """True for an embedding."""

    def dequantized(self) -> Tensor:
        """A new float tensor with the values that the integers represent."""

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """``F.linear`` on the layer's integers, or None."""


class ReadableWeight(Tensor):
    """The float weight of a quantized layer, for reading only.

    Shape, dtype, device and the like are those of the dequantized weight and cost nothing.
    ``F.linear(x, weight, bias)`` runs the layer's own kernels: it has the bits of the layer's
    forward with this bias and without activation. Each other operation dequantizes the integers
    and returns ordinary tensors. In-place changes raise a RuntimeError.

    Args:
        layer: the quantized layer.

    Example:
        >>> from torchquant.nn import QuantizedLinear
        >>> layer = QuantizedLinear(64, 32)
        >>> layer.weight.shape, layer.weight.dtype, type(layer.weight.t())
        (torch.Size([32, 64]), torch.float32, <class 'torch.Tensor'>)
    """

    _layer: Any
    _is_param: bool

    @staticmethod
    def __new__(cls, layer: Readable) -> ReadableWeight:
        weight: ReadableWeight = Tensor._make_wrapper_subclass(
            cls, layer.float_shape, dtype=layer.dtype, device=layer.device
        )
        weight._layer = layer
        if layer.is_table:  # transformers' tie_weights() takes a parameter from an embedding
            weight._is_param = True
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear:
            output = _linear(*args, **kwargs)
            if output is not None:
                return output
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, cls) and func in _ALIASES:
            return first
        if _changes(func, first, args, kwargs):
            raise read_only(_name(func))
        if func is Tensor.requires_grad_:
            return first
        args, kwargs = tree_map_only(cls, cls._read, (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.detach.default:
            return ReadableWeight(args[0]._layer)
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(t, cls) for t in _tensors(value)):
                raise read_only(func._schema.name.partition("::")[2])
        args, kwargs = tree_map_only(cls, cls._read, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _read(self) -> Tensor:
        weight: Tensor = self._layer.dequantized()
        return weight


def read_only(what: str) -> RuntimeError:
    """The error for an operation ``what`` that would change the weight of a quantized layer."""
    return RuntimeError(
        f"{what}: weight must not be changed, it is the read-only weight of a quantized layer, "
        f"which holds integers; {_REMEDY}"
    )


def refuse_assignment(layer: Any, value: Any) -> bool:
    """Refuse ``layer.weight = value``; True if the assignment is to be ignored.

    transformers' ``tie_weights()`` assigns the embedding's parameter to the output layer. The layer
    keeps its integers, which a warning says. It cannot have a weight of another shape.

    Raises:
        ValueError: value is a parameter of another shape.
        TypeError: value is not a parameter.
    """
    if _shares_weight(value, layer):
        return True
    kind = type(layer).__name__
    if not isinstance(value, nn.Parameter):
        raise TypeError(
            f"{kind}: weight must not be assigned, it is read-only, got {type(value).__name__}; "
            f"{_REMEDY}"
        )
    if value.numel() == 0:  # the placeholder
        return False
    if tuple(value.shape) != layer.float_shape:
        raise ValueError(
            f"{kind}: weight must keep its shape {list(layer.float_shape)}, got a parameter of "
            f"shape {list(value.shape)}; convert the layer back with torchquant.to_float_(model) "
            "before the model is resized, and quantize again"
        )
    warnings.warn(
        f"{kind}: weight is read-only, so the parameter that was assigned to it is ignored; the "
        f"layer keeps its own integers, which are tied to no other layer; {_REMEDY}",
        stacklevel=3,
    )
    return True


def _shares_weight(value: Any, layer: Any) -> bool:
    """True for the weight of a layer that has the same packed weight as ``layer``."""
    shared = layer.__dict__.get("shared_weight")
    return (
        isinstance(value, ReadableWeight)
        and shared is not None
        and value._layer.shared_weight is shared
    )


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """F.linear on the integers of the weight's layer; None if its values must be read."""
    if not isinstance(weight, ReadableWeight):
        return None
    if isinstance(input, ReadableWeight) or isinstance(bias, ReadableWeight):
        return None
    if not isinstance(input, Tensor) or input.dtype not in _KERNEL_DTYPES or input.dim() == 0:
        return None
    output: Tensor | None = weight._layer.linear(input, bias)
    return output


def _changes(
    func: Callable[..., Any], first: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """True if a function of torch would change a ReadableWeight."""
    if any(isinstance(t, ReadableWeight) for t in _tensors(kwargs.get("out"))):
        return True
    if not any(isinstance(t, ReadableWeight) for t in _tensors(first)):
        return False
    name = _name(func)
    if func in _GRADIENT_SWITCHES:
        return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    if name == "__set__":
        return not (func == _SET_GRADIENT and args[1] is None)
    if name == "__setitem__" or name in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__")


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or")
) | {"__ixor__", "__ilshift__", "__irshift__"}
# Answered from the wrapper, which has the shape, dtype and device of the dequantized weight.
_ATTRIBUTES = (
    "device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized "
    "is_sparse is_sparse_csr is_xpu itemsize layout names nbytes ndim output_nr requires_grad "
    "retains_grad shape"
)
_METHODS = (
    "__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_inference "
    "is_signed nelement ndimension numel size storage_offset stride"
)
_FUNCTIONS = "is_complex is_floating_point numel"
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split() if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS.split()]
)
# These return the weight itself, so that a change through the result raises, too.
_ALIASES: frozenset[Any] = frozenset(
    [getattr(Tensor, "data").__get__, Tensor.detach, torch.detach]  # noqa: B009
)
_SET_GRADIENT = getattr(Tensor, "grad").__set__  # noqa: B009
_GRADIENT_SWITCHES: tuple[Any, ...] = (
    Tensor.requires_grad_,
    getattr(Tensor, "requires_grad").__set__,  # noqa: B009
)


__all__ = ["ReadableWeight"]
