"""The attention modules of a transformers model, and which of them another function can serve.

What a module does with its attention function is read from the code of its class: nothing is run.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from torchquant.integrations.transformers.attention_function import REPLACES

_LOOKUP = "get_interface"  # the method of transformers' registry of attention functions
# Arguments of an attention function that the operator does not have, with what they mean.
_UNSERVED = {"position_bias": "it adds a position bias to the attention weights"}
_COMPARISON = re.compile(r"""_attn_implementation\s*(?:==|!=|not\s+in|in)[^\n]*["']sdpa["']""")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The innermost attention modules: name, module, and the transformers model around it."""
    named = dict(model.named_modules())
    models = [name for name, module in named.items() if hasattr(module, "set_attn_implementation")]
    classes = {cls: _is_attention(cls) for cls in set(map(type, named.values()))}
    found = [name for name, module in named.items() if classes[type(module)]]
    outer = {name[:end] for name in found for end in _dots(name)}
    for name in found:
        if name not in outer:
            around = [
                prefix for prefix in models if not prefix or f"{name}.".startswith(f"{prefix}.")
            ]
            yield name, named[name], named[around[-1]]


def reason_against(module: nn.Module, owner: Any) -> str:
    """Why an attention module cannot use another attention function; empty if it can."""
    if not getattr(owner, "_supports_sdpa", True):
        return f"{type(owner).__name__} does not support {REPLACES!r}, which is what is replaced"
    codes = list(_codes(type(module)))
    if not any(_LOOKUP in code.co_names for code in codes) or not hasattr(module, "config"):
        return "it computes attention itself, without looking up a function"
    for argument, meaning in _UNSERVED.items():
        if any(argument in names for code in codes for names in _keywords(code)):
            return f"{meaning}, which the operator does not do"
    for cls in (type(module), type(owner)):
        if _asks_for_the_name(cls):
            return f"its code asks whether the attention implementation is {REPLACES!r}"
    return ""


def _is_attention(cls: type) -> bool:
    if hasattr(cls, "set_attn_implementation"):  # a model, such as a PreTrainedModel
        return False
    looks_up = any(_LOOKUP in code.co_names for code in _codes(cls))
    return looks_up or "attention" in cls.__name__.lower()


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of all methods of a class and of its bases up to ``nn.Module``."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType):
                yield function.__code__


def _keywords(code: CodeType) -> Iterator[tuple[str, ...]]:
    """The names of the keyword arguments of each call in a function."""
    for constant in code.co_consts:
        if isinstance(constant, tuple) and all(isinstance(name, str) for name in constant):
            yield constant


def _asks_for_the_name(cls: type) -> bool:
    """True if the file of a class compares the implementation's name with ours."""
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):
        return True
    return _COMPARISON.search(source) is not None
