"""The table of kinds: one row for each kind of layer that torchquant quantizes.

Verbs, files, reports and comparisons use this table and the two base classes of
:mod:`torchquant.nn.base`. A new kind of layer therefore needs one row here and new files for its
classes. Another package adds a row with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from torchquant.nn import float_conv, float_embedding, float_linear
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.conv import QuantizedConv1d, QuantizedConv2d
from torchquant.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from torchquant.nn.linear import QuantizedLinear
from torchquant.nn.qat_conv import QATConv1d, QATConv2d
from torchquant.nn.qat_conv_bn import QATConvBn2d
from torchquant.nn.qat_linear import QATLinear

Reason = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Args:
        name: a unique name, used in files and messages.
        float_types: the classes of float modules that can be quantized, without their subclasses.
        quantized: the class of the layer to deploy. Its ``variants`` are the further classes, and
            its ``class_for`` chooses among them.
        trained: the class of the layer that trains, or None if this kind cannot be trained.
        looks_like: takes a module; True if users expect the quantizer to take it as this kind. If
            such a module cannot be quantized, it appears in the report.
        refusal: takes a module; returns the reason why its type or structure rules it out, or None.
        value_refusal: takes a module that ``refusal`` accepts; returns the reason why its values
            rule it out, or None.
        too_small: takes a float module; True if it is too small to benefit. The result depends on
            the shape alone.
        weight_shape: takes a float, quantized or trained module of this kind; returns the shape of
            its weight, outputs first, for reports.
        unsuited: takes a float module and the configuration that it would have; returns the reason
            why the configuration does not benefit a layer of this shape, or None. None instead of a
            function stands for ``too_small``, whatever the configuration.
        only_weights: True for embeddings, which have no activations to quantize. Their float
            modules count as layers only for configurations of weights alone.
        trained_with_norm: a subclass of ``trained`` that trains a layer and the batch norm after
            it, or None. Its ``norm_refusal(layer, norm)`` gives the reason why it cannot; its
            ``from_float(layer, norm, config)`` makes it.

    Example:
        >>> LINEAR.name, LINEAR.weight_shape(nn.Linear(64, 32))
        ('linear', (32, 64))
    """

    name: str
    float_types: tuple[type[nn.Module], ...]
    quantized: type[QuantizedModule]
    trained: type[TrainedModule] | None
    looks_like: Callable[[nn.Module], bool]
    refusal: Reason
    value_refusal: Reason
    too_small: Callable[[nn.Module], bool]
    weight_shape: Callable[[nn.Module], tuple[int, ...]]
    unsuited: Callable[[nn.Module, Any], str | None] | None = None
    trained_with_norm: Any = None
    only_weights: bool = False

    @property
    def classes(self) -> tuple[type[QuantizedModule], ...]:
        """The classes of the layers to deploy."""
        return self.quantized.variants()

    def layer_class(self, config: Any, module: nn.Module | None = None) -> type[QuantizedModule]:
        """The class of the layer to deploy that has ``config``.

        Args:
            config: the configuration of a quantized layer.
            module: a float or trained layer that shall have it; None for a layer of any shape.

        Example:
            >>> from torchquant import Int8DynamicActivationIntxWeightConfig
            >>> LINEAR.layer_class(Int8DynamicActivationIntxWeightConfig(bits=4)).__name__
            'QuantizedIntxLinear'
        """
        shape = None if module is None else self.weight_shape(module)
        return self.quantized.class_for(config, shape)

    def class_with(self, format_name: Any) -> type[QuantizedModule]:
        """The class whose weights have the format of the name; ``quantized`` if there is none.

        Example:
            >>> LINEAR.class_with("intx").__name__, LINEAR.class_with("int8").__name__
            ('QuantizedIntxLinear', 'QuantizedLinear')
        """
        found = (cls for cls in self.classes if cls.weight_format.name == format_name)
        return next(found, self.quantized)

    def config_refusal(self, config: Any, module: nn.Module) -> str | None:
        """The reason why a float layer that ``refusal`` accepts cannot have ``config``, or None.

        Example:
            >>> from torchquant import Int8DynamicActivationIntxWeightConfig
            >>> LINEAR.config_refusal(Int8DynamicActivationIntxWeightConfig(), nn.Linear(16, 64))
            'group_size must be at most in_features = 16, got 32'
        """
        cls = self.layer_class(config, module)
        return cls.config_refusal(config) or cls.shape_refusal(config, self.weight_shape(module))

    def no_benefit(self, module: nn.Module, config: Any) -> str | None:
        """The reason to leave a float module as it is, although it could have ``config``, or None.

        Verbs ignore it for a layer that they were asked for by name or with a function.

        Example:
            >>> LINEAR.no_benefit(nn.Linear(64, 2), None)
            'too small to benefit'
        """
        if self.unsuited is not None:
            return self.unsuited(module, config)
        return "too small to benefit" if self.too_small(module) else None


LINEAR = Kind(
    name="linear",
    float_types=(nn.Linear,),
    quantized=QuantizedLinear,
    trained=QATLinear,
    looks_like=float_linear.looks_linear,
    refusal=float_linear.refusal,
    value_refusal=float_linear.value_refusal,
    too_small=float_linear.too_small,
    weight_shape=float_linear.weight_shape,
)

CONV1D, CONV2D = (
    Kind(
        name=f"conv{dimensions}d",
        float_types=(float_conv.float_class(dimensions),),
        quantized=quantized,
        trained=trained,
        looks_like=partial(float_conv.looks_like, dimensions=dimensions),
        refusal=float_conv.refusal,
        value_refusal=float_conv.value_refusal,
        too_small=float_conv.too_small,
        weight_shape=float_conv.weight_shape,
        unsuited=float_conv.unsuited,
        trained_with_norm=with_norm,
    )
    for dimensions, quantized, trained, with_norm in (
        (1, QuantizedConv1d, QATConv1d, None),
        (2, QuantizedConv2d, QATConv2d, QATConvBn2d),
    )
)

EMBEDDING, EMBEDDING_BAG = (
    Kind(
        name=name,
        float_types=(quantized.float_class,),
        quantized=quantized,
        trained=None,
        looks_like=partial(float_embedding.looks_like, float_class=quantized.float_class),
        refusal=partial(float_embedding.refusal, float_class=quantized.float_class),
        value_refusal=float_embedding.value_refusal,
        too_small=float_embedding.too_small,
        weight_shape=float_embedding.weight_shape,
        only_weights=True,
    )
    for name, quantized in (
        ("embedding", QuantizedEmbedding),
        ("embedding_bag", QuantizedEmbeddingBag),
    )
)

KINDS: tuple[Kind, ...] = (LINEAR, CONV1D, CONV2D, EMBEDDING, EMBEDDING_BAG)
_added: list[Kind] = []


def kinds() -> tuple[Kind, ...]:
    """All kinds; kinds that were added with :func:`register` come last.

    Example:
        >>> [kind.name for kind in kinds()]
        ['linear', 'conv1d', 'conv2d', 'embedding', 'embedding_bag']
    """
    return (*KINDS, *_added)


def register(kind: Kind) -> None:
    """Add a kind of layer, which all verbs, files and reports then support.

    Raises:
        TypeError: kind is not a :class:`Kind`.
        ValueError: another kind has the same name or one of its classes.

    Example:
        >>> register(LINEAR)
        Traceback (most recent call last):
        ValueError: register: the name of a kind must be unique, got 'linear' twice
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"register: kind must be a Kind, got {kind!r}")
    for other in kinds():
        if other.name == kind.name:
            raise ValueError(
                f"register: the name of a kind must be unique, got {kind.name!r} twice"
            )
        shared = set(_types(other)) & set(_types(kind))
        if shared:
            names = ", ".join(sorted(cls.__name__ for cls in shared))
            raise ValueError(
                f"register: a type of module must belong to one kind, got {names} in {kind.name!r} "
                f"and {other.name!r}"
            )
    _added.append(kind)


@contextmanager
def registered(kind: Kind) -> Iterator[Kind]:
    """Add a kind until the end of a ``with`` block.

    Example:
        >>> from dataclasses import replace
        >>> class Special(nn.Linear): ...
        >>> class QuantizedSpecial(QuantizedLinear): ...
        >>> special = replace(
        ...     LINEAR, name="special", float_types=(Special,), quantized=QuantizedSpecial,
        ...     trained=None)
        >>> with registered(special):
        ...     print(kind_of(Special(8, 8)).name)
        special
    """
    register(kind)
    try:
        yield kind
    finally:
        _added.remove(kind)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a float, quantized or trained module, or None if it belongs to no kind.

    Example:
        >>> kind_of(QuantizedLinear(64, 32)) is LINEAR, kind_of(nn.ReLU())
        (True, None)
    """
    for cls in type(module).__mro__:  # the nearest class decides: a subclass can be a kind
        for kind in kinds():
            if cls in (*kind.classes, kind.trained) or (
                cls is type(module) and cls in kind.float_types
            ):
                return kind
    return next((kind for kind in kinds() if kind.looks_like(module)), None)


def kind_named(name: str) -> Kind:
    """The kind with the given name.

    Raises:
        ValueError: no kind has this name.

    Example:
        >>> kind_named("linear") is LINEAR
        True
    """
    for kind in kinds():
        if kind.name == name:
            return kind
    known = ", ".join(kind.name for kind in kinds())
    raise ValueError(
        f"kind of layer must be one of {known}, got {name!r}; the file may be from a newer "
        "torchquant, or the module that registers this kind is not imported"
    )


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, outputs first.

    Raises:
        ValueError: the module belongs to no kind.

    Example:
        >>> weight_shape(nn.Linear(64, 32))
        (32, 64)
    """
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"weight_shape: module must be of a kind, got {type(module).__name__}")
    return kind.weight_shape(module)


def _types(kind: Kind) -> tuple[type[nn.Module], ...]:
    trained = () if kind.trained is None else (kind.trained,)
    return (*kind.float_types, *kind.classes, *trained)


__all__ = [
    "CONV1D",
    "CONV2D",
    "EMBEDDING",
    "EMBEDDING_BAG",
    "KINDS",
    "LINEAR",
    "Kind",
    "kind_named",
    "kind_of",
    "kinds",
    "register",
    "registered",
    "weight_shape",
]
