"""Guards notice when Python objects are not what they were."""

import gc
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchquant._extension import load

Guard: Any = load().Guard


class Owner:
    def __init__(self) -> None:
        self.number = 0.5
        self.tensor = torch.zeros(3)
        self.child = nn.ReLU()


def guard_of(owner: Any) -> Any:
    place = vars(owner)
    return Guard([(place, name, value) for name, value in place.items()])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "replaced": lambda owner: setattr(owner, "child", nn.ReLU()),
    "deleted": lambda owner: delattr(owner, "number"),
    "another number": lambda owner: setattr(owner, "number", 0.25),
    "another tensor": lambda owner: setattr(owner, "tensor", owner.tensor.clone()),
    "in place": lambda owner: owner.tensor.add_(1),
    "an element": lambda owner: owner.tensor.__setitem__(1, 5.0),
    "through a view": lambda owner: owner.tensor[1:].zero_(),
    "other memory": lambda owner: setattr(owner.tensor, "data", torch.zeros(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    owner = Owner()
    guard = guard_of(owner)
    assert guard.holds() and guard.broken() == []
    CHANGES[change](owner)
    assert not guard.holds()
    assert len(guard.broken()) == 1


def test_every_assignment_is_noticed() -> None:
    """Python's interpreter has instructions of its own for assignments that are frequent."""
    owner = Owner()
    guard = guard_of(owner)

    def assign(value: object) -> None:
        owner.number = value  # type: ignore[assignment]

    usual = owner.number
    for _ in range(300):
        assign(object())
        assert not guard.holds()
        assign(usual)
        assert guard.holds()
        object.__setattr__(owner, "number", 5.5)
        assert not guard.holds()
        owner.__dict__["number"] = usual
        assert guard.holds()


def test_what_classes_define() -> None:
    class Base:
        number = 1

    class Derived(Base):
        pass

    absent = Guard.ABSENT
    guard = Guard([(Base, "number", Base.number), (Derived, "number", absent)])
    assert guard.holds()
    Derived.number = 2
    assert guard.broken() == [1]
    del Derived.number
    assert guard.holds()
    Base.number = 3
    assert guard.broken() == [0]
    Base.other = 4  # type: ignore[attr-defined]
    Base.number = 1
    assert guard.holds()


def test_contents_and_classes() -> None:
    owner, items, table = Owner(), [1, "a"], {"x": 1, "y": "b"}
    entries = [
        (items, None, tuple(items)),
        (table, None, ("x", table["x"], "y", table["y"])),
        (owner, None, Owner),
    ]
    guard = Guard(entries)
    assert guard.holds()
    items.append(2)
    table["x"] = table.pop("x")  # another order
    assert guard.broken() == [0, 1]
    items.pop()
    table["y"] = table.pop("y")
    assert guard.holds()
    own, owner.__dict__ = owner.__dict__, dict(owner.__dict__)
    assert guard.broken() == [2]
    owner.__dict__ = own
    owner.__class__ = type("Other", (Owner,), {})
    assert guard.broken() == [2]


def test_dictionaries_outlive_their_guards() -> None:
    """A dictionary that several guards watch, some of which are gone."""
    place: dict[str, Any] = {"key": 1}
    first, second = (Guard([(place, "key", 1)]) for _ in range(2))
    assert first.holds() and second.holds()
    del first
    gc.collect()
    place["key"] = 2
    assert not second.holds()
    del second
    gc.collect()
    place["key"] = 3
    third = Guard([(place, "key", 3)])
    assert third.holds()
    place.clear()
    assert not third.holds()


def test_what_was_put_back_is_as_it_was() -> None:
    owner = Owner()
    guard, child = guard_of(owner), owner.child
    owner.child = nn.Tanh()
    assert not guard.holds()
    owner.child = child
    assert guard.holds()
    del owner.child, owner.number  # the entries of the dictionary move
    assert guard.broken() == [0, 2]
    owner.child, owner.number = child, 0.5
    assert guard.broken() in ([], [0])  # equal numbers may be two objects
    owner.added = 1
    assert guard.holds() or guard.broken() == [0]


def test_dictionaries_keep_their_number_of_entries() -> None:
    module = nn.Linear(2, 2)
    hooks = module.__dict__["_forward_hooks"]
    assert type(hooks) is OrderedDict
    guard = Guard([(module.__dict__, "_forward_hooks", hooks)])
    assert guard.holds()
    handle = module.register_forward_hook(lambda *_: None)
    assert not guard.holds()
    handle.remove()
    assert guard.holds()


def test_absent_keys() -> None:
    module = nn.ReLU()
    guard = Guard([(module.__dict__, "forward", Guard.ABSENT)])
    assert guard.holds()
    module.forward = lambda x: x
    assert not guard.holds()
    del module.forward
    assert guard.holds()


def test_parameters_of_modules() -> None:
    module = nn.Linear(2, 2)
    guard = Guard([(module._parameters, name, p) for name, p in module._parameters.items()])
    assert guard.holds()
    module.bfloat16()
    assert not guard.holds()


def test_tensors_of_inference_mode() -> None:
    """They have no version; small ones are compared by value."""
    with torch.inference_mode():
        small, large, ordinary = torch.zeros(3), torch.zeros(10_000), torch.zeros(3)
    place = {"small": small, "large": large, "ordinary": torch.zeros(3)}
    guard = guard_of_place = Guard([(place, name, value) for name, value in place.items()])
    assert guard.holds()
    with torch.inference_mode():
        small[1] = 1.0
    assert guard.broken() == [0]
    with torch.inference_mode():
        small[1] = 0.0
    assert guard_of_place.holds()
    place["ordinary"] = ordinary
    assert guard.broken() == [2]


def test_tensors_without_memory() -> None:
    place = {"meta": torch.zeros(3, device="meta"), "sparse": torch.zeros(3).to_sparse()}
    with torch._subclasses.FakeTensorMode():
        place["fake"] = torch.zeros(3)
    guard = Guard([(place, name, value) for name, value in place.items()])
    assert guard.holds()
    place["meta"].add_(1)
    assert guard.broken() == [0]


def test_keys_that_are_equal_but_not_the_same_object() -> None:
    key = "".join(["a key of", " several words"])
    place = {key: 1.5}
    guard = Guard([(place, "a key of several words", place[key])])
    assert guard.holds()
    place[key] = 2.5
    assert not guard.holds()


@pytest.mark.parametrize(
    "entries",
    [
        *([1], [(1, 2, 3)], [({}, "key")], [({}, 5, None)], [[{}, "key", None]]),
        *([(5, "key", 1)], [([], None, [])], [(5, None, ())], [(int, None, type)]),
    ],
    ids=str,
)
def test_wrong_entries(entries: Any) -> None:
    with pytest.raises(TypeError, match=r"^Guard: entries must be tuples"):
        Guard(entries)
    with pytest.raises(TypeError, match="entries must be a sequence"):
        Guard(5)
    with pytest.raises(TypeError):
        Guard()


def test_cycles_are_collected() -> None:
    module = nn.Linear(2, 2)
    module.guard = guard_of(module)
    seen = weakref.ref(module)
    assert module.guard.holds()
    del module
    gc.collect()
    assert seen() is None


@pytest.mark.slow
def test_time() -> None:
    owners = [nn.Linear(2, 2) for _ in range(15)]
    entries = [
        (place, name, value)
        for owner in owners
        for place in (vars(owner), owner._parameters)
        for name, value in place.items()
    ][:300]
    assert len(entries) == 300
    guard = Guard(entries)
    best = 1.0
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            guard.holds()
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 3e-6
