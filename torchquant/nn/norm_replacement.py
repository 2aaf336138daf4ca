"""ReplacedNorm: a norm of any class whose plain calls are computed by one operator.

The norm stays the same object, with its parameters, attributes and hooks; only its class changes,
to a subclass of its own class with another ``forward``. That forward runs the operator for the
calls that :mod:`torchquant.nn.norm_probe` has compared, and the forward of the class for all
others: more arguments, other dtypes, other numbers of dimensions, tensors of other types.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torchquant._extension import load
from torchquant.nn.norm_recipe import NormRecipe, call_key

_C = load()
_fast_rms_norm, _fast_layer_norm = _C.rms_norm, _C.layer_norm
_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

_RECIPE = "_torchquant_norm_recipe"  # in the module's __dict__
_ORIGINAL = "_torchquant_original_class"  # in the class
_SERVED = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# Attributes that libraries set on any module and that no forward of a norm reads.
_HARMLESS = frozenset({"training", "__dict__", "_hf_hook", "_old_forward", "_is_hf_initialized"})
_CALLERS = frozenset({"forward", "_compiled_call_impl"})  # they take the place of a call


_replaced_classes: dict[Any, Any] = {}


class ReplacedNorm:
    """What :func:`torchquant.replace_norms_` adds to the class of a norm.

    ``isinstance(module, ReplacedNorm)`` is True for a norm that is computed by one operator, and
    for a norm whose replacement has ended because an attribute was set after it.

    Example:
        >>> import torchquant
        >>> norm = nn.LayerNorm(4)
        >>> _ = torchquant.replace_norms_(norm)
        >>> isinstance(norm, ReplacedNorm), isinstance(norm, nn.LayerNorm), norm
        (True, True, LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True))
    """

    def __init_subclass__(cls) -> None:
        """Keep the subclass out of registries that the norm's class may fill."""

    def __setattr__(self, name: str, value: Any) -> None:
        unchanged = name in _HARMLESS or name in _CALLERS or _is_like(self, name, value)
        super().__setattr__(name, value)
        if not unchanged:
            self.__dict__.pop(_RECIPE, None)  # the comparison no longer holds

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name not in _HARMLESS and name not in _CALLERS:
            self.__dict__.pop(_RECIPE, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the norm's class, because the subclass has no name of its own."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            cls, *arguments = reduced[1]
            if cls is type(self) and is_replaced_class(cls):
                return (_new, (class_of(self), *arguments), *reduced[2:])
        return reduced

    def __prepare_scriptable__(self) -> Any:
        """``torch.jit.script`` compiles the forward of the norm's class."""
        original = object.__new__(class_of(self))
        original.__dict__.update(self.__dict__)
        original.__dict__.pop(_RECIPE, None)
        return original


def replace_norm(norm: nn.Module, recipe: NormRecipe) -> None:
    """Compute the calls of ``norm`` that ``recipe`` names with one operator, in place."""
    norm.__class__ = replaced_class(class_of(norm))
    norm.__dict__[_RECIPE] = recipe


def restore_norm(norm: nn.Module) -> bool:
    """Give ``norm`` its own forward again; True if it was replaced."""
    if not isinstance(norm, ReplacedNorm):
        return False
    recipe = norm.__dict__.pop(_RECIPE, None)
    if is_replaced_class(type(norm)):  # not if parametrize, say, has derived a class from ours
        norm.__class__ = class_of(norm)
        return True
    return recipe is not None


def recipe_of(norm: nn.Module) -> NormRecipe | None:
    """The recipe of a replaced norm; None for other modules."""
    recipe: NormRecipe | None = norm.__dict__.get(_RECIPE)
    return recipe


def replaced_class(cls: Any) -> Any:
    """The subclass of ``cls`` whose forward runs an operator where it can; always the same.

    Raises:
        TypeError: Python does not allow a subclass.
    """

    def fill(namespace: dict[str, Any]) -> None:
        namespace["forward"] = _forward_over(cls.forward)
        namespace["__module__"] = cls.__module__  # tools read both names
        namespace["__qualname__"] = cls.__qualname__
        namespace["__doc__"] = cls.__doc__
        namespace[_ORIGINAL] = cls

    if cls not in _replaced_classes:
        made = types.new_class(cls.__name__, (ReplacedNorm, cls), exec_body=fill)
        _replaced_classes.setdefault(cls, made)
    return _replaced_classes[cls]


def is_replaced_class(cls: type) -> bool:
    """True for the classes that :func:`replaced_class` makes, False for those derived from them."""
    return _ORIGINAL in cls.__dict__


def class_of(norm: Any) -> Any:
    """The class of a norm before it was replaced; of other modules, their class."""
    return getattr(norm, _ORIGINAL, type(norm))


def _new(cls: Any, *arguments: Any) -> Any:
    """An empty replaced norm, for pickle and copy."""
    replaced = replaced_class(cls)
    return replaced.__new__(replaced, *arguments)


def _forward_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a replaced norm, over the forward of its class."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recipe = self.__dict__.get(_RECIPE)
        if recipe is None:
            return original(self, *args, **kwargs)
        if kwargs or len(args) != 1:
            input = _only_tensor(recipe, args, kwargs)
            if input is None:
                if recipe.residual and len(args) == 1 and kwargs.keys() == {"residual"}:
                    return _of_sum(self, recipe, args[0], kwargs["residual"])
                return original(self, *args, **kwargs)
        else:
            input = args[0]
        if type(input) is not Tensor or torch.compiler.is_dynamo_compiling():
            if isinstance(input, Tensor) and _serves(self, recipe, input):
                return recipe.compute(self._parameters, input)
            return original(self, *args, **kwargs)
        parameters = self._parameters
        weight, bias = parameters.get(recipe.weight), parameters.get(recipe.bias)
        key = (
            input.dtype,
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            input.dim(),
            self.training,
        )
        if (
            key not in recipe.calls
            or (recipe.contiguous and not input.is_contiguous())
            or (weight is None and not recipe.fits(input))
            or (_autocast_enabled() and not _autocast_allows(recipe, input, key))
        ):
            return original(self, *args, **kwargs)
        try:
            if recipe.channels_first:
                return recipe.compute(parameters, input)
            if recipe.one_plus:
                weight = recipe.multiplier(weight)
            if recipe.family == "rms":
                return _fast_rms_norm(input, weight, recipe.eps, recipe.cast_before_weight)
            return _fast_layer_norm(input, weight, bias, recipe.eps, None)
        except Exception:  # the operator refuses: sizes, devices, transforms of functions
            return original(self, *args, **kwargs)

    return forward


def _only_tensor(recipe: NormRecipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor of a call that passes it by name and nothing else; None for other calls."""
    if args or len(kwargs) != 1 or recipe.argument is None:
        return None
    return kwargs.get(recipe.argument)


def _serves(norm: nn.Module, recipe: NormRecipe, input: Tensor) -> bool:
    """True if the operator takes a call that is traced, or that is rare; see the fast path."""
    if not torch.compiler.is_dynamo_compiling() and type(input) not in _SERVED:
        return False
    weight = None if recipe.weight is None else norm._parameters.get(recipe.weight)
    bias = None if recipe.bias is None else norm._parameters.get(recipe.bias)
    sizes = [tensor.shape for tensor in (weight, bias) if tensor is not None]
    return (
        call_key(input, weight, bias, norm.training) in recipe.calls
        and all(len(size) == 1 and size[0] == recipe.length(input) for size in sizes)
        and (weight is not None or recipe.fits(input))
        and (not recipe.contiguous or input.is_contiguous())
        and not torch.is_autocast_enabled(input.device.type)
    )


def _autocast_allows(recipe: NormRecipe, input: Tensor, key: tuple[Any, ...]) -> bool:
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return True
    now = (device, torch.get_autocast_dtype(device), *key[:3], key[4])
    return now in recipe.autocast_calls


def _is_like(norm: Any, name: str, value: Any) -> bool:
    """True if setting an attribute changes nothing on which the comparison relies."""
    parameters = norm.__dict__.get("_parameters", {})
    if name in parameters:
        old = parameters[name]
        if old is None or value is None:
            return old is value
        return type(value) is nn.Parameter and value.shape == old.shape
    if name in norm.__dict__:
        old = norm.__dict__[name]
        return old is value or (type(old) is type(value) and _plain(old) and bool(old == value))
    # Libraries mark modules with attributes of their own, such as _is_torch_compile.
    return name.startswith("_") and name not in _words(class_of(norm))


def _words(cls: type) -> set[str]:
    """The names and texts in the methods of a class of norms, and the names of its attributes."""
    words: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            words.add(name)
            if isinstance(function, types.FunctionType):
                words.update(function.__code__.co_names)
                words.update(w for w in function.__code__.co_consts if isinstance(w, str))
    return words


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple))


def _of_sum(norm: nn.Module, recipe: NormRecipe, input: Any, residual: Any) -> Any:
    """``norm(input, residual=y)``: the norm of the sum, for a class without such an argument."""
    if residual is None:
        return norm.forward(input)
    if isinstance(input, Tensor) and isinstance(residual, Tensor) and _serves(norm, recipe, input):
        same = input.dtype == residual.dtype and input.shape == residual.shape
        if same and input.device == residual.device:
            return recipe.compute(norm._parameters, input, residual)
    return norm.forward(input + residual)
