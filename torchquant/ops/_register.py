"""Registers fake kernels, bound by the schema of their operator.

A new operator needs a schema and kernels in C++, and here, in the file of its family, a fake kernel
and a wrapper. The schema is the only list of its arguments: :func:`fake` compares the fake kernel's
parameters with it, and checks the devices of all tensors in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchquant._extension import load

load()  # registers the operators

KERNELS: dict[str, Callable[..., Any]] = {}  # the fake kernels by the names of their operators


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake kernel of operator ``name``.

    The function computes shapes, dtypes and devices of the results only. Before it runs, every
    tensor among the arguments is checked to be on the device of ``input``, or of the first tensor
    where no argument has that name. The dispatcher prefers the meta device over the CPU: a CPU
    tensor among meta tensors arrives here, and without the check the result would be memory that
    nobody wrote.

    Raises:
        TypeError: the function's parameters are not the schema's arguments, in the same order and
            with a default for the same ones.
    """
    schema = getattr(torch.ops.torchquant, name).default._schema.arguments
    names = tuple(argument.name for argument in schema)
    tensors = tuple(argument.name for argument in schema if "Tensor" in str(argument.type))
    reference = "input" if "input" in tensors else tensors[0]
    optional = sum(argument.has_default_value() for argument in schema)

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        code = kernel.__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if parameters != names or len(kernel.__defaults__ or ()) != optional:
            raise TypeError(
                f"the fake kernel of torchquant::{name} must have the parameters of its schema, "
                f"({', '.join(names)}), the last {optional} with a default, "
                f"got ({', '.join(parameters)})"
            )

        def checked(*args: Any, **kwargs: Any) -> Any:
            values = dict(zip(names, args, strict=False)) | kwargs
            given = {key: value for argument in tensors for key, value in _flat(argument, values)}
            require_one_device(name, reference, given)
            return kernel(*args, **kwargs)

        torch.library.register_fake(f"torchquant::{name}", checked)
        KERNELS[name] = kernel
        return kernel

    return register


def _flat(name: str, values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one argument with their names: a tensor, or each tensor of a list."""
    value = values.get(name)
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        for index, tensor in enumerate(value):
            if tensor is not None:
                yield f"{name}[{index}]", tensor


def require_one_device(who: str, reference: str, tensors: dict[str, Tensor]) -> None:
    """Raise unless all tensors are on the device of ``tensors[reference]``.

    The text is that of the kernels (csrc/common/device.h).
    """
    device = tensors[reference].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(
                f"{who}: {name} must be on the {reference}'s device {device}, "
                f"got {tensor.device}; move it with .to(device)"
            )
