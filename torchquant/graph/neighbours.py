"""Which modules of a model call which layers next to each other, from bytecode alone.

A verb uses this to choose activations and layers that are worth computing together. It need not be
complete or certain: what holds in a call is decided in that call
(:mod:`torchquant.nn.call_guard`). No user code runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

import torch
from torch import nn

from torchquant.graph.call_sites import CallSites
from torchquant.graph.calls import Call, Item, Path
from torchquant.graph.functions import codes_of


@dataclass(frozen=True)
class Neighbours:
    """A call of a module, with what is called next to it.

    Attributes:
        caller: the module whose method makes the call.
        method: the name of the method.
        module: the module that is called.
        follow: the module that alone receives the result, or None.
        obstacle: why ``follow`` is None although a module receives the result; or empty.
        receiver: the module that receives the result, alone or not; or None.
        function: the name of a function that receives the result, or empty.
        chain: the modules that are called on the same variable, ``module`` first; or empty.
    """

    caller: nn.Module
    method: str
    module: nn.Module
    follow: nn.Module | None = None
    obstacle: str = ""
    receiver: nn.Module | None = None
    function: str = ""
    chain: tuple[nn.Module, ...] = ()


def neighbours(model: nn.Module) -> Iterator[Neighbours]:
    """The calls of all modules of a model that its methods make, in the order of the modules.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> [(n.module, n.follow) for n in neighbours(net)]
        [(Linear(in_features=4, out_features=4, bias=True), ReLU())]
    """
    for caller in model.modules():
        if not caller._modules or isinstance(caller, torch.jit.ScriptModule):
            continue
        if type(caller).forward is nn.Sequential.forward:
            children = [child for child in caller._modules.values() if child is not None]
            for module, after in itertools.pairwise(children):
                yield Neighbours(caller, "forward", module, after, receiver=after)
            continue
        for method, code in codes_of(caller):
            for call in _calls(code):
                found = _found(caller, method, call)
                if found is not None:
                    yield found


@functools.lru_cache(maxsize=4096)
def _known_calls(key: _ById) -> list[Call]:
    return CallSites(key.code).calls


@dataclass(frozen=True, eq=False)
class _ById:
    """A code object that is compared by identity; comparing its contents is slow."""

    code: CodeType

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.code is self.code

    def __hash__(self) -> int:
        return id(self.code)


def _calls(code: CodeType) -> list[Call]:
    return _known_calls(_ById(code))


def _found(caller: nn.Module, method: str, call: Call) -> Neighbours | None:
    module = _module_at(caller, call.path)
    if module is None:
        return None
    chain = [_module_at(caller, later.path) for later in call.chain]
    return Neighbours(
        caller,
        method,
        module,
        None if call.follow is None else _module_at(caller, call.follow),
        call.obstacle,
        _module_at(caller, call.receiver) if call.receiver else None,
        call.function,
        tuple(m for m in chain if m is not None) if all(m is not None for m in chain) else (),
    )


def _module_at(module: nn.Module | None, path: Path) -> nn.Module | None:
    for step in path:
        if module is not None:
            module = module._modules.get(str(step.key) if isinstance(step, Item) else step)
    return module
