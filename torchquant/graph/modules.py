"""A model as a tree of modules: owners of a module, tied tensors, replacement of a module."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

# The attributes in which a module keeps the hooks of a call. State-dict hooks are not among them:
# they expect the keys of the module that they were registered on.
_HOOKS_BEFORE_FORWARD = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS_FROM_FORWARD_ON = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
HOOKS = (*_HOOKS_BEFORE_FORWARD, *_HOOKS_FROM_FORWARD_ON, "_is_full_backward_hook")


def owners_by_module(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For each submodule's id, every (parent, attribute) under which it is registered."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, attribute))
    return owners


def is_container(module: nn.Module) -> bool:
    """True if a module only holds other modules and has no forward of its own.

    Example:
        >>> is_container(nn.ModuleList()), is_container(nn.Sequential())
        (True, False)
    """
    return isinstance(module, _CONTAINERS) and type(module).forward in (
        nn.Module.forward,
        nn.ModuleList.forward,
        nn.ModuleDict.forward,
    )


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; shared memory counts once.

    Example:
        >>> tensor_bytes(nn.Linear(10, 10))
        440
    """
    tensors = [t for t in [*model.parameters(), *model.buffers()] if not is_lazy(t)]
    return sum(t.numel() * t.element_size() for t in {memory_key(t): t for t in tensors}.values())


def memory_key(tensor: torch.Tensor) -> Hashable:
    """A key that is equal for tensors with the same memory and layout, also for distinct objects.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4))
        >>> memory_key(weight) == memory_key(weight.detach())
        True
    """
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), *layout


def has_hooks(module: nn.Module, *, before_forward: bool = True) -> bool:
    """True if a call of the module runs hooks; ``before_forward=False`` leaves out pre-hooks.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> handle = layer.register_forward_pre_hook(lambda module, args: None)
        >>> has_hooks(layer), has_hooks(layer, before_forward=False)
        (True, False)
    """
    hooks = (*(_HOOKS_BEFORE_FORWARD if before_forward else ()), *_HOOKS_FROM_FORWARD_ON)
    return any(getattr(module, name) for name in hooks)


def replace_module(owners: list[tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    """Register ``new`` in place of ``old`` at the (parent, attribute) pairs of ``owners``.

    ``new`` gets the same dictionaries of hooks, so the handles that remove hooks keep working.
    """
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    for parent, attribute in owners:
        parent._modules[attribute] = new
