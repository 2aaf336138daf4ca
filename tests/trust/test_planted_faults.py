"""Each check of the guard is needed: without it some situation gives a wrong value.

A fault is a piece of the source of one function, and what replaces it.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.situations import ALL, Projected, Situation, X, check, check_trained, in_python, make

from torchquant import quantize_
from torchquant._extension import load
from torchquant.graph import neighbours
from torchquant.nn import call_guard, caller
from torchquant.nn.projections import ProjectionGroup

for name in ("paths", "functions", "kept", "later", "swapped", "projected", "regrouped", "running"):
    importlib.import_module(f"support.situations.{name}")  # fills the list
KINDS = {kind.__name__: kind for kind in ALL}

GUARD, GROUP = "torchquant.nn.call_guard", "torchquant.nn.projections:ProjectionGroup"
CALLER = "torchquant.nn.caller"  # in Python; csrc/caller.cpp does the same
SEGMENT, REPLACED = (
    "torchquant.graph.segment:Segment",
    "torchquant.nn.replaced_activation:ReplacedActivation",
)
# Where, the source that goes away, what replaces it, and situations that then go wrong.
FAULTS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "the frame": (
        f"{GROUP}.output",
        "kept.frame != id(frame)",
        "False",
        ("AnotherOwner",),
    ),
    "the call": (
        f"{GROUP}.output",
        "kept.calls[index] is not call",
        "False",
        ("AnotherInstruction",),
    ),
    "the version": (
        f"{GROUP}.output",
        "kept.version != _version_of(input)",
        "False",
        ("DeletedBetween",),
    ),
    "the next member": (
        f"{GROUP}.output",
        "kept.next != index",
        "False",
        ("ThreeSwapped",),
    ),
    "the place of the first member": (
        f"{GROUP}._leads",
        "return parent._modules.get(kept.calls[0].name) is first()",
        "return True",
        ("SwappedBack",),
    ),
    "calls that do not use the group": (
        f"{GROUP}.forget",
        "self._slot.kept = None",
        "pass",
        ("RetriedWithHook",),
    ),
    "weights of the group": (f"{GROUP}._intact", "return False", "continue", ("WeightsChanged",)),
    "what is read between the members": (
        f"{GUARD}:reads_run_no_code",
        "return all(_is_plain(owner, path) for path in paths)",
        "return True",
        ("PropertyBetween", "OperatorBetween"),
    ),
    "modules between the members": (
        f"{GROUP}._only_computes",
        "return all(is_quiet(module_at(owner, path)) for path in paths)",
        "return True",
        ("InsideAModuleOnTheResult", "HookOnAModuleBetween"),
    ),
    "hooks of modules between the members": (
        f"{GUARD}:is_quiet",
        "and not has_hooks(module)",
        "",
        ("HookOnAModuleBetween",),
    ),
    "code between the members": (
        f"{SEGMENT}._find_chain",
        "if isinstance(event, str) or event.argument is None:\n                break",
        "if isinstance(event, str) or event.argument is None:\n                continue",
        ("HeldAlias",),
    ),
    "objects in global variables": (
        f"{CALLER}:_calls_of",
        "call_sites(code, modules)",
        "call_sites(code, None)",
        ("GlobalObjectRead", "GlobalObjectReadBetween"),
    ),
    "classes of containers": (
        f"{CALLER}:module_at",
        "get is not cls.__getitem__",
        "False",
        ("PatchedItems",),
    ),
    "classes of operands": (
        f"{SEGMENT}._call",
        "if target.name in _METHODS_OF_TWO:",
        "if False:",
        ("SubclassOfTensorBetween",),
    ),
    "hooks of the activation": (
        f"{CALLER}:is_plain_activation",
        'state["_forward_pre_hooks"]\n        or state["_forward_hooks"]',
        "False",
        ("HookOnTheActivation", "ForwardHookOnTheActivation"),
    ),
    "backward hooks of the activation": (
        f"{CALLER}:is_plain_activation",
        'or state["_backward_hooks"]\n        or state["_backward_pre_hooks"]',
        "",
        ("BackwardHook",),
    ),
    "the forward of the activation": (
        f"{CALLER}:is_plain_activation",
        '"forward" not in state and',
        "",
        ("PatchedForward",),
    ),
    "the class of the activation": (
        f"{REPLACED}.is_patched",
        "return own.forward is not cls.original_forward or own.__call__ is not nn.Module.__call__",
        "return False",
        ("PatchedClass", "PatchedCallOfTheActivation"),
    ),
    "options of the activation": (
        f"{REPLACED}.__setattr__",
        "restore_activation_(self)",
        "pass",
        ("ActivationOptions", "OwnOption"),
    ),
    "the layer is what is called": (
        f"{CALLER}:follower",
        "module_at(owner, path) is not layer",
        "False",
        ("CachedLayer",),
    ),
    "the layer is what a Sequential calls": (
        f"{GUARD}:activation_after",
        "local(frame, 2) is not layer",
        "False",
        ("ForwardOfAnother",),
    ),
    "one activation after a shared layer": (
        f"{GUARD}:_next_in",
        "following is not None and after is not following",
        "False",
        ("SharedLayers",),
    ),
    "the order of a Sequential": (
        f"{GUARD}:_next_in",
        "type(sequential).__iter__ is not nn.Sequential.__iter__",
        "False",
        ("ReversedSequential",),
    ),
    "classes that compute attributes": (
        f"{CALLER}:module_at",
        "cls.__getattr__ is not MODULE_GETATTR",
        "False",
        ("GetattrOverridden",),
    ),
    "classes that compute every attribute": (
        f"{CALLER}:module_at",
        "cls.__getattribute__ is not OBJECT_GETATTRIBUTE",
        "False",
        ("GetattributeOverridden",),
    ),
    "modules that run after the activation is read": (
        f"{GUARD}:activation_of",
        "not all(is_quiet(module_at(owner, path)) for path in call.earlier)",
        "False",
        ("EarlierModuleSwaps",),
    ),
    "wrappers of calls": (
        f"{CALLER}:calling_frame",
        "first.f_code is not CALL_IMPL",
        "False",
        ("PatchedCall",),
    ),
    "debuggers": (
        f"{CALLER}:_watched",
        "if _trace_function() is not None:",
        "if False:",
        ("Debugger",),
    ),
    "profilers": (
        f"{CALLER}:_watched",
        "return isinstance(profiler, (FunctionType, MethodType))",
        "return False",
        ("Profiler",),
    ),
    "modes": (
        f"{CALLER}:call_at",
        "or _dispatch_modes()",
        "",
        ("DispatchMode",),
    ),
    "other uses of the output": (
        f"{SEGMENT}._find_follow",
        "value.uses != 1",
        "False",
        ("ResidualOfTheOutput",),
    ),
    "variables that hold the output": (
        f"{SEGMENT}._is_dead",
        "return returns or",
        "return True or",
        ("Loop", "HandlerReadsTheOutput"),
    ),
    "handlers of exceptions": (
        f"{SEGMENT}.run",
        'returns = last in ENDS and not getattr(self.code, "co_exceptiontable", b"")',
        "returns = last in ENDS",
        ("HandlerReadsTheOutput",),
    ),
    "attributes between layer and activation": (
        f"{SEGMENT}._reads_only",
        "return all(call.path[: len(path)] == path for path in between)",
        "return True",
        ("PropertySwaps",),
    ),
    "code between layer and activation": (
        f"{SEGMENT}._find_follow",
        "call.event != before.event + 1",
        "False",
        ("MethodSwaps",),
    ),
    "functions that look at variables": (
        "torchquant.graph.call_sites:_owner",
        "or _LOOKS_AT_VARIABLES & set(code.co_names)",
        "",
        ("LocalVariables", "FrameOfItself", "Evaluated"),
    ),
}


def forget_what_is_known() -> None:
    caller.forget()
    load().forget_calls()
    call_guard._quiet.clear()
    neighbours._known_calls.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The guard reads frames in Python, where a fault can be planted."""
    in_python(monkeypatch)
    forget_what_is_known()
    yield
    forget_what_is_known()


def plant(monkeypatch: pytest.MonkeyPatch, where: str, old: str, new: str) -> None:
    """Replace a piece of the source of a function."""
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    *holders, name = path.split(".")
    holder: Any = module
    for step in holders:
        holder = getattr(holder, step)
    source = textwrap.dedent(inspect.getsource(vars(holder)[name]))
    old = textwrap.dedent(old)
    indented = {old, *(old.replace("\n    ", "\n"),)}
    found = [piece for piece in indented if piece in source]
    assert found, f"{where} has no longer the piece {old!r}: change the table"
    # Methods that call super() need the cell of their class.
    changed = source.replace(found[0], new).replace("super()", "super(_class_of_fault, self)")
    monkeypatch.setattr(module, "_class_of_fault", holder, raising=False)
    namespace: dict[str, Any] = {}
    exec(compile(changed, where, "exec"), vars(module), namespace)
    original = vars(holder)[name]
    if holder is not module:
        monkeypatch.setattr(holder, name, namespace[name])
        return
    for other in [m for full, m in sys.modules.items() if full.startswith("torchquant.")]:
        if vars(other).get(name) is original:  # others have imported it by its name
            monkeypatch.setattr(other, name, namespace[name])


def goes_wrong(kind: type[Situation]) -> bool:
    """True if a mode gives a wrong value; errors of another kind are errors."""
    for mode in kind.modes:
        for run in (check, check_trained) if kind.trains else (check,):
            forget_what_is_known()
            try:
                run(kind, mode)
            except AssertionError:
                return True
    return False


@pytest.mark.parametrize(
    ("fault", "kind"), [(fault, kind) for fault, row in FAULTS.items() for kind in row[3]]
)
def test_without_a_check_a_value_is_wrong(
    fault: str, kind: str, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    where, old, new, _ = FAULTS[fault]
    assert not goes_wrong(KINDS[kind])
    plant(monkeypatch, where, old, new)
    assert goes_wrong(KINDS[kind])


@pytest.mark.parametrize("fault", [False, True])
def test_a_kept_output_is_for_one_tensor(
    fault: bool, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """No situation is known that passes another tensor and every other check."""
    if fault:
        where = f"{GROUP}.output"
        plant(monkeypatch, where, "kept.input() is not input", "False")
    original, answers = ProjectionGroup.output, []

    def output(group: Any, index: int, input: Any, frame: Any, call: Any) -> Any:
        if index == 1:
            answers.append(original(group, index, input.clone(), frame, call))
        return original(group, index, input, frame, call)

    monkeypatch.setattr(ProjectionGroup, "output", output)
    model = make(Projected)
    quantize_(model)
    with torch.no_grad():
        model(X)
    assert [answer is not None for answer in answers] == [fault]
