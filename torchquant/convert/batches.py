"""Batches of any structure: how a model is called with one, and how one is described.

A tensor is the only argument of the model; a dictionary holds arguments by name; a tuple or a list
holds arguments by position. A tuple may be longer than the list of arguments (images and labels):
its first elements are then passed. Where the number of arguments is open, nothing is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

_MOST = 6  # elements of a structure that are described
_DEPTH = 3
_REMEDY = "pass a function that calls the model: forward=lambda model, batch: model(...)"


def call(who: str, model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch.

    Args:
        who: the name of the verb, with which messages start.
        model: the model.
        batch: a tensor, a dictionary of arguments, or a tuple or a list of arguments.

    Raises:
        TypeError: batch is none of these.
        ValueError: batch does not fit the arguments of the model's forward.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> call("calibrate", model, (torch.ones(3, 2), torch.zeros(3))).shape
        torch.Size([3, 1])
    """
    arguments, named = _arguments(who, model, batch)
    return model(*arguments, **named)


def _arguments(who: str, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        arguments: tuple[Any, ...] = (batch,)
        named: dict[str, Any] = {}
    elif isinstance(batch, Mapping):
        arguments, named = (), {str(key): value for key, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        arguments, named = tuple(batch[: _count(who, model, batch)]), {}
    else:
        raise TypeError(
            f"{who}: a batch must be a tensor, a tuple, a list or a dictionary, got "
            f"{structure(batch)}; {_REMEDY}"
        )
    signature = _signature(model)
    if signature is not None:
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:
            raise ValueError(
                f"{who}: a batch must fit the arguments of the model's {_written(signature)}, got "
                f"{structure(batch)}: {error}; {_REMEDY}"
            ) from None
    return arguments, named


def _count(who: str, model: nn.Module, batch: tuple[Any, ...] | list[Any]) -> int:
    """How many elements of a tuple are arguments of the model."""
    signature = _signature(model)
    least, most = _positions(signature)
    if len(batch) <= max(least, 1) or least == most:
        return min(len(batch), max(least, 1))
    limit = "any number of" if most is None else f"{least} to {most}"
    raise ValueError(
        f"{who}: a batch must say which of its elements are arguments, got {structure(batch)}, and "
        f"the model's forward takes {limit} arguments by position; {_REMEDY}, for example "
        "model(batch[0])"
    )


def _positions(signature: inspect.Signature | None) -> tuple[int, int | None]:
    """The least and the greatest number of arguments by position; None: no limit."""
    if signature is None:
        return 0, None
    least = most = 0
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return least, None
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    return least, most


def _signature(model: nn.Module) -> inspect.Signature | None:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    try:  # that of the class, because a replaced forward may hide its arguments
        return inspect.signature(MethodType(type(model).forward, model))
    except (TypeError, ValueError):
        return None


def _written(signature: inspect.Signature) -> str:
    """``forward(x, mask=None)``, without annotations."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    names = [str(parameter) for parameter in plain]
    return f"forward({_shortened(names)})"


def structure(value: Any, depth: int = _DEPTH) -> str:
    """The structure of a batch in words, without its values.

    Example:
        >>> import torch
        >>> structure((torch.zeros(8, 3), {"y": [1, 2]}))
        'a tuple of (a float32 tensor [8, 3], a dict of {y: a list of (an int, an int)})'
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{_article(name)} {name} tensor {list(value.shape)}"
    if value is None:
        return "None"
    article = _article(kind)
    if isinstance(value, (Mapping, tuple, list)) and depth == 0:
        return f"{article} {kind} with {len(value)} elements"
    if isinstance(value, Mapping):
        items = [f"{key}: {structure(item, depth - 1)}" for key, item in value.items()]
        return f"{article} {kind} of {{{_shortened(items)}}}"
    if isinstance(value, (tuple, list)):
        return f"{article} {kind} of ({_shortened([structure(v, depth - 1) for v in value])})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # an array of another library
        return f"{article} {kind} of {value.dtype} {list(value.shape)}"
    return f"{article} {kind}"


def samples(value: Any) -> int | None:
    """The size of the first dimension of the first tensor in a batch; None without a tensor.

    Example:
        >>> import torch
        >>> samples({"x": torch.zeros(8, 3)}), samples([torch.zeros(()), 3])
        (8, 1)
    """
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else 1
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((n for item in value if (n := samples(item)) is not None), None)
    return None


def _article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def _shortened(items: list[str]) -> str:
    rest = len(items) - _MOST
    return ", ".join(items[:_MOST]) + (f", and {rest} more" if rest > 0 else "")
