"""Calls a module's hooks around a function that computes what the module's forward computes.

The module itself does not change meanwhile: other threads may call it. The order of the hooks and
what they are given is that of ``nn.Module.__call__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import BackwardHook

Hook = Callable[..., Any]


def run_as(
    module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with its hooks and those of all modules, and with another forward.

    Example:
        >>> run_as(nn.ReLU(), torch.relu, (torch.tensor([-1.0]),), {})
        tensor([0.])
    """
    call = _Call(module, args, kwargs)
    if torch.compiler.is_compiling():
        return call.run(forward)
    try:
        return call.run(forward)
    except Exception:
        call.run_always_called()
        raise


class _Call:
    """One call of a module."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.args, self.kwargs = args, kwargs
        self.result: Any = None
        self.called: set[int] = set()  # hooks after the forward

    def run(self, forward: Callable[..., Any]) -> Any:
        """The result of the function, after all hooks."""
        module: Any = self.module
        self._run_before()
        full, other, before = [], [], []
        if module._backward_pre_hooks or global_hooks._global_backward_pre_hooks:
            before = module._get_backward_pre_hooks()
        if module._backward_hooks or global_hooks._global_backward_hooks:
            full, other = module._get_backward_hooks()
        backward = BackwardHook(module, full, before) if full or before else None
        if backward is not None:
            self.args = backward.setup_input_hook(self.args)
        self.result = forward(*self.args, **self.kwargs)
        for key, hook, with_kwargs in self._after():
            self.called.add(key)
            self._run_after(hook, with_kwargs)
        if backward is not None:
            self.result = backward.setup_output_hook(self.result)
        self._watch_output(other)
        return self.result

    def run_always_called(self) -> None:
        """After an error: run the hooks that are always called and were not called yet."""
        own, common = (
            self.module._forward_hooks_always_called,
            _global("forward_hooks_always_called"),
        )
        for key, hook, with_kwargs in self._after():
            if key not in self.called and (key in own or key in common):
                try:
                    self._run_after(hook, with_kwargs)
                except Exception:  # the error of the forward is raised
                    continue

    def _run_before(self) -> None:
        module = self.module
        hooks = (*_global("forward_pre_hooks").items(), *module._forward_pre_hooks.items())
        for key, hook in hooks:
            if key in module._forward_pre_hooks_with_kwargs:
                given = hook(module, self.args, self.kwargs)
                if given is not None and not (isinstance(given, tuple) and len(given) == 2):
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {given}."
                    )
                self.args, self.kwargs = (self.args, self.kwargs) if given is None else given
            else:
                given = hook(module, self.args)
                if given is not None:
                    self.args = given if isinstance(given, tuple) else (given,)

    def _after(self) -> Iterator[tuple[int, Hook, bool]]:
        module, with_kwargs = self.module, _global("forward_hooks_with_kwargs")
        for key, hook in tuple(_global("forward_hooks").items()):
            yield key, hook, key in with_kwargs
        for key, hook in tuple(module._forward_hooks.items()):
            yield key, hook, key in module._forward_hooks_with_kwargs

    def _run_after(self, hook: Hook, with_kwargs: bool) -> None:
        kwargs = (self.kwargs,) if with_kwargs else ()
        changed = hook(self.module, self.args, *kwargs, self.result)
        if changed is not None:
            self.result = changed

    def _watch_output(self, hooks: list[Hook]) -> None:
        """Register the hooks of the older kind, which see the gradients of one function."""
        value = self.result if hooks else None
        while isinstance(value, (tuple, list, dict)) and value:
            value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        node = getattr(value, "grad_fn", None)
        if node is None:
            return
        for hook in hooks:
            node.register_hook(
                lambda inputs, outputs, hook=hook: hook(self.module, inputs, outputs)
            )


def _global(name: str) -> Any:
    return getattr(global_hooks, f"_global_{name}")
