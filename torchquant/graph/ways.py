"""Every place in the code of a model where some of its modules are called, or used otherwise.

A verb that changes what a module returns needs to know who sees it. The methods of all modules are
read, on all their branches (:mod:`torchquant.graph.flow`). Code outside of the modules is not read,
and the methods of torchvision's, timm's and torch's own classes are not searched: their inner
modules are called as their forward does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import nn

from torchquant.graph.flow import OUTER, Flow, flow_of
from torchquant.graph.flow_elements import ASKS
from torchquant.graph.flow_values import (
    At,
    Attribute,
    Below,
    CallOf,
    Each,
    Named,
    Result,
    Site,
    Step,
    Thing,
    parts_of,
)
from torchquant.graph.functions import functions_of
from torchquant.graph.modules import owners_by_module
from torchquant.graph.places import Place, is_present, places_at
from torchquant.graph.weight_reads import is_setup

_LIBRARIES = ("torch", "torchvision", "timm", "torchquant")
_ASKING_NAMES = """bool callable hasattr id isinstance issubclass len print repr str super type"""
_ASKING = frozenset(_ASKING_NAMES.split())
# Functions that run a module as it is, or store it.
_RUNNING_NAMES = "checkpoint checkpoint_sequential checkpoint_seq export save script summary trace"
_RUNNING = frozenset(_RUNNING_NAMES.split())
_QUESTION_NAMES = """device dim dtype get_device is_cuda is_meta layout ndim nelement numel
    requires_grad shape size"""
QUESTIONS = frozenset(_QUESTION_NAMES.split())
# Methods of modules that compute no output and give away no single tensor.
_HARMLESS_NAMES = """apply bfloat16 buffers children cpu cuda double eval extra_repr float half
    load_state_dict modules named_buffers named_children named_modules named_parameters parameters
    register_backward_hook register_forward_hook register_forward_pre_hook
    register_full_backward_hook requires_grad_ state_dict to train type zero_grad"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())


@dataclass(frozen=True)
class CallPlace:
    """A place in the code that calls a module.

    Attributes:
        where: the method, such as "Net.forward".
        owner: the module whose method it is.
        flow: what the method does; None for the forward of Sequential.
        site: the call; None for the forward of Sequential.
        path: the path to the module from the owner.
        place: where the path leads.
        position: the number of the module in the Sequential.
    """

    where: str
    owner: nn.Module
    flow: Flow | None = None
    site: Site | None = None
    path: tuple[Step, ...] = ()
    place: Place | None = None
    position: int = 0


class Ways:
    """The places where modules of a model are called, and the reasons not to change them.

    Args:
        model: the model.
        modules: the modules of interest.

    Attributes:
        calls: by the module's id, the places in the code that call it.
        problems: by the module's id, what else the code does with it, in words.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> [call.where for call in Ways(net, [net[0]]).calls[id(net[0])]]
        ['Sequential.forward']
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.calls: dict[int, list[CallPlace]] = {id(module): [] for module in modules}
        self.problems: dict[int, str] = {}
        self.owners = owners_by_module(model)
        self.names = {id(module): name for name, module in model.named_modules()}
        self._flows: dict[int, list[tuple[dict[tuple[Step, ...], bool | None], Flow]]] = {}
        self._codes: list[CodeType] = []  # keeps their ids valid
        self._below: dict[int, list[nn.Module]] = {}
        for owner in model.modules():
            if id(owner) in self.calls:
                continue  # what a module does with itself is no other path
            if not isinstance(owner, torch.jit.ScriptModule) and (owner._modules or owner is model):
                self._read(owner)

    def of_library(self, module: nn.Module) -> bool:
        """True if a library's class holds the module, directly or in containers of torch."""
        if _library(type(module).__module__) and not _of_torch(module):
            return True
        owners = [owner for owner, _ in self.owners.get(id(module), ())]
        return bool(owners) and all(
            self.of_library(owner) if _of_torch(owner) else _library(type(owner).__module__)
            for owner in owners
        )

    def chain(self, owner: nn.Module) -> list[nn.Module]:
        """The modules that a Sequential calls one after the other."""
        return [child for child in owner._modules.values() if child is not None]

    def forward_flow(self, module: nn.Module) -> Flow | None:
        """What the forward of a module does; None if it is no single function of the user."""
        found = [
            (function, owned)
            for name, function, owned in functions_of(module)
            if name == "forward" and _is_of_user(function)
        ]
        if len(found) != 1 or not found[0][1]:
            return None
        flow = self._flow(module, found[0][0].__code__)
        return flow if flow.complete else None

    # ------------------------------------------------------------ reading

    def _read(self, owner: nn.Module) -> None:
        functions = [found for found in functions_of(owner) if _is_of_user(found[1])]
        inherits = any("super" in one.__code__.co_names for _, one, _ in functions)
        runs = type(owner).forward is nn.Sequential.forward or inherits
        if isinstance(owner, nn.Sequential) and runs and not self.of_library(owner):
            for position, child in enumerate(self.chain(owner)):
                if id(child) in self.calls:
                    where = f"{type(owner).__name__}.forward"
                    self.calls[id(child)].append(CallPlace(where, owner, position=position))
        for name, function, owned in functions:
            if name != "__init__" and owned:
                self._read_method(owner, name, function.__code__)

    def _read_method(self, owner: nn.Module, name: str, code: CodeType) -> None:
        where = f"{type(owner).__name__}.{name}"
        flow = self._flow(owner, code)
        if not flow.complete:
            self._escaped(owner, At(()), f"{where} is too long to be read and may use")
        for site, call in flow.calls.items():
            for thing in call.callee:
                if isinstance(thing, At):
                    self._called(CallPlace(where, owner, flow, site), thing)
            if not is_setup(name):
                self._passed(owner, where, call)
        if is_setup(name):
            return
        for thing, how in flow.uses:
            if isinstance(thing, At):
                self._escaped(owner, thing, f"{where} {how}")

    def _flow(self, owner: nn.Module, code: CodeType) -> Flow:
        """What a method does; methods of equal modules are read once."""
        known = self._flows.setdefault(id(code), [])
        for answers, flow in known:
            if all(is_present(owner, path) is there for path, there in answers.items()):
                return flow
        asked: dict[tuple[Step, ...], bool | None] = {}

        def present(path: tuple[Step, ...]) -> bool | None:
            asked[path] = is_present(owner, path)
            return asked[path]

        flow = flow_of(code, present)
        self._codes.append(code)
        known.append((asked, flow))
        return flow

    def _called(self, call: CallPlace, thing: At) -> None:
        for place in places_at(call.owner, thing.path):
            if thing.part:
                for child in self.chain(place.module):
                    self._problem(child, f"{call.where} calls a part of {self._name(place.module)}")
            elif place.rest:
                self._attribute(place, call.where)
            elif id(place.module) in self.calls:
                new = CallPlace(call.where, call.owner, call.flow, call.site, thing.path, place)
                self.calls[id(place.module)].append(new)

    def _passed(self, owner: nn.Module, where: str, call: CallOf) -> None:
        """What happens to modules that are arguments of a call."""
        names = {thing.name if isinstance(thing, Named) else "" for thing in call.callee}
        if names <= _ASKING:
            return
        for argument in (*call.arguments, call.others):
            for thing in parts_of(argument):
                if not isinstance(thing, At) or (names == {OUTER} and not thing.path):
                    continue
                if names <= _RUNNING and not thing.part:
                    for place in places_at(owner, thing.path):
                        if not place.rest:
                            self._problem(place.module, f"{where} passes it to {min(names)}")
                    continue
                self._escaped(owner, thing, f"{where} passes to {called_name(call)}")

    def _escaped(self, owner: nn.Module, thing: At, how: str) -> None:
        """A module goes where the code that uses it cannot be followed."""
        for place in places_at(owner, thing.path):
            if place.rest:
                if place.rest != ("weight",) or not how.endswith(ASKS):
                    self._attribute(place, how.partition(" ")[0])
                continue
            if how.endswith(ASKS):
                continue
            inside = self.chain(place.module) if thing.part else self._modules(place.module)
            for module in inside:
                self._problem(module, f"{how} {self._name(place.module)}")

    def _modules(self, module: nn.Module) -> list[nn.Module]:
        """The modules of interest below a module, and itself."""
        if id(module) not in self._below:
            self._below[id(module)] = [one for one in module.modules() if id(one) in self.calls]
        return self._below[id(module)]

    def _attribute(self, place: Place, where: str) -> None:
        """A method reads an attribute of a module, or calls a method of it."""
        module, name = place.module, str(place.rest[0])
        if name == "get_submodule":
            for one in self._modules(module):
                self._problem(one, f"{where} reads modules by name")
        if id(module) not in self.calls or name in _HARMLESS:
            return
        tensor = name in module._parameters or name in module._buffers
        if tensor:
            if len(place.rest) > 1 and place.rest[1] in QUESTIONS:
                return
            self._problem(module, f"{where} reads its {name}")
        elif not isinstance(module.__dict__.get(name), (int, float, str, tuple, type(None))) or (
            name not in module.__dict__
        ):
            self._problem(module, f"{where} uses its {name}")

    def _problem(self, module: nn.Module, words: str) -> None:
        if id(module) in self.calls:
            self.problems.setdefault(id(module), words)

    def _name(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or "the model"


def is_exact(call: CallPlace) -> bool:
    """True if the place in the code calls one module only, in each run through its loops.

    Example:
        >>> is_exact(CallPlace("Sequential.forward", nn.Sequential()))
        True
    """
    if call.flow is None or call.site is None:
        return True
    steps = [step for step in call.path if not isinstance(step, str)]
    known = all(
        not isinstance(step, Below) and (not isinstance(step, Each) or step.loop > 0)
        for step in steps
    )
    return known and len(call.flow.calls[call.site].callee) == 1


def readers(flow: Flow, site: Site) -> Iterator[tuple[Thing, str, Site | None]]:
    """What a method does with the result of a call, of any age.

    Yields:
        The result or an attribute of it, the verb, and the call that gets it, if it is a call.

    Example:
        >>> [*readers(Flow(), (0, 0))]
        []
    """
    return _readers(flow, lambda thing: isinstance(thing, Result) and thing.site == site)


def readers_of(flow: Flow, thing: Thing) -> Iterator[tuple[Thing, str, Site | None]]:
    """The same for an argument of the method; a result counts at any age."""
    if isinstance(thing, Result):
        return readers(flow, thing.site)
    return _readers(flow, lambda other: other == thing)


def _readers(
    flow: Flow, wanted: Callable[[Thing], bool]
) -> Iterator[tuple[Thing, str, Site | None]]:
    for other, call in flow.calls.items():
        for thing in parts_of(
            [*call.callee, *call.others, *(t for a in call.arguments for t in a)]
        ):
            if wanted(thing.of if isinstance(thing, Attribute) else thing):
                yield thing, f"passes to {called_name(call)}", other
    for thing, how in flow.uses:
        if wanted(thing.of if isinstance(thing, Attribute) else thing):
            yield thing, how, None


def called_name(call: CallOf) -> str:
    """The name of what a call calls, as a report shows it."""
    for thing in call.callee:
        if isinstance(thing, (Named, Attribute)):
            return thing.name
        if isinstance(thing, At):
            texts = [
                str(getattr(step, "key", step))
                for step in thing.path
                if not isinstance(step, (Each, Below))
            ]
            return ".".join(texts) or "itself"
    return "a function"


def _is_of_user(function: FunctionType) -> bool:
    return not _library(str(function.__globals__.get("__name__")))


def _library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


__all__ = ["QUESTIONS", "CallPlace", "Ways", "is_exact", "readers"]
