"""A GPU that is not there: tensors that say cuda:0 and hold their values on the CPU.

What a model does when it is moved between devices (which layout its weights have, which tensors
meet in a call) can then be tested with values, anywhere. The operators of torchquant run as
torchquant_aten, which packs weights as on CUDA. ``.to("cuda:0")`` needs its index: without one
torch asks the CUDA runtime which device that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda:0")


class Pretended(Tensor):
    """A tensor on cuda:0, as far as anybody can see."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> Pretended:
        tensor: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        tensor.values = values
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.values!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


_READING = (Tensor.__getitem__, Tensor.__int__, Tensor.item, Tensor.nonzero, Tensor.tolist)


class _Functions(TorchFunctionMode):
    """What asks the CUDA runtime before it comes to the dispatcher."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return Pretended(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        if not (args and isinstance(args[0], Pretended)):
            return func(*args, **kwargs)
        if func is Tensor.copy_:
            values(args[0].detach()).copy_(values(args[1].detach()))
            return args[0]
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), Pretended(values(tensor.detach()).clone()))
        if func in _READING:
            result = func(*tree_map_only(Pretended, lambda x: values(x.detach()), args))
            return Pretended(result) if isinstance(result, Tensor) else result
        return func(*args, **kwargs)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_cuda() -> Iterator[torch.device]:
    """cuda:0 exists while the block runs; parameters are made anew when a module moves."""
    future: Any = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch("torch.cuda._lazy_init"), _Mode(), _Functions():
            yield CUDA
    finally:
        future.set_overwrite_module_params_on_conversion(before)


def values(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, also outside the block."""
    return tensor.values if isinstance(tensor, Pretended) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs))
    here = [tensor for tensor in found if isinstance(tensor, Pretended)]
    device = kwargs.get("device")
    there = bool(here) if device is None else torch.device(device).type == "cuda"
    if device is not None:
        kwargs = {**kwargs, "device": device if not there else torch.device("cpu")}
    elif here and any(tensor.dim() and not isinstance(tensor, Pretended) for tensor in found):
        # As on a GPU: tensors of two devices do not meet, but for copies between them.
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        there = isinstance(found[0], Pretended)
    result = _on_cuda(func, there)(
        *tree_map_only(Pretended, values, args), **tree_map_only(Pretended, values, kwargs)
    )
    if func._schema.is_mutable and args and isinstance(args[0], Tensor):
        return args[0] if isinstance(result, Tensor) else result
    return tree_map_only(Tensor, Pretended, result) if there else result


def _on_cuda(func: Any, there: bool) -> Callable[..., Any]:
    """torchquant's operators as they run on CUDA."""
    if there and func.namespace == "torchquant":
        name = func._schema.name.partition("::")[2]
        packet = getattr(torch.ops.torchquant_aten, name)
        return getattr(packet, func._overloadname)  # type: ignore[no-any-return]
    return func  # type: ignore[no-any-return]
