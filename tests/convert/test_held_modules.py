"""Layers that plain Python objects hold are replaced there too, or named in a note."""

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchquant import convert_, load, prepare_qat_, quantize_, save, to_float_
from torchquant.graph.held import held_modules
from torchquant.nn import QATLinear, QuantizedLinear


class Holder(nn.Module):
    def __init__(self, hold: Callable[[nn.Linear], Any], run: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.held = hold(self.fc)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.held, self.fc(x))


REPLACED: dict[str, tuple[Callable[[nn.Linear], Any], Callable[[Any, Tensor], Tensor]]] = {
    "list": (lambda fc: [fc], lambda held, x: held[0](x)),
    "twice": (lambda fc: [nn.ReLU(), fc, fc], lambda held, x: held[2](held[1](x))),
    "tuple": (lambda fc: (fc, 3), lambda held, x: held[0](x)),
    "dict": (lambda fc: {"a": fc}, lambda held, x: held["a"](x)),
    "ordered": (lambda fc: OrderedDict(a=fc), lambda held, x: held["a"](x)),
    "deque": (lambda fc: deque([fc]), lambda held, x: held[0](x)),
    "nested": (lambda fc: {"a": [[fc]]}, lambda held, x: held["a"][0][0](x)),
    "pairs": (lambda fc: [("a", fc)], lambda held, x: held[0][1](x)),
    "method": (lambda fc: fc.forward, lambda held, x: held(x)),
    "methods": (lambda fc: [fc.forward], lambda held, x: held[0](x)),
}
NOTED: dict[str, Callable[[nn.Linear], Any]] = {
    "closure": lambda fc: lambda x: fc(x),
    "partial": lambda fc: functools.partial(nn.Module.__call__, fc),
    "object": lambda fc: SimpleNamespace(fc=fc).__class__(fc=fc, call=fc.forward),
    "set": lambda fc: {fc},
}


@pytest.mark.parametrize(("hold", "run"), REPLACED.values(), ids=REPLACED)
def test_a_held_layer_is_replaced(hold: Any, run: Any) -> None:
    model = Holder(hold, run).eval()
    x = torch.randn(3, 64)
    report = quantize_(model)
    assert isinstance(model.fc, QuantizedLinear)
    assert [held.module for held in held_modules(model)[id(model.fc)]]
    assert torch.equal(model(x), run(hold(model.fc), model.fc(x)))
    assert report.notes == ()
    to_float_(model)
    assert torch.equal(model(x), run(hold(model.fc), model.fc(x)))
    prepare_qat_(model)
    assert isinstance(model.fc, QATLinear)
    assert torch.equal(model(x), run(hold(model.fc), model.fc(x)))
    convert_(model)
    assert torch.equal(model(x), run(hold(model.fc), model.fc(x)))


@pytest.mark.parametrize("hold", NOTED.values(), ids=NOTED)
def test_what_cannot_be_replaced_is_noted(hold: Any) -> None:
    model = Holder(hold, lambda held, x: x)
    (note, *_) = quantize_(model).notes
    assert note.startswith(
        "Still computes with the old layer, because a Python object that is no module holds it: "
        "held"
    )
    assert "(fc)" in note


def test_to_float_notes_what_it_cannot_replace() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model)
    layer = model[0]
    model.call = lambda x: layer(x)
    (note,) = to_float_(model).notes
    assert note.startswith("Still computes with the old layer") and note.endswith(": call (0).")


def test_a_layer_that_stays_in_float_needs_no_note() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.again = {model[0]}
    assert quantize_(model).notes == ()


def test_modules_that_are_registered_nowhere_are_noted() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.hidden = [nn.Sequential(nn.Linear(64, 64))]
    model.scale = [nn.ReLU()]  # nothing to quantize
    assert quantize_(model).notes == (
        "Not registered as modules of the model, so left in float and not counted: hidden[0]; use "
        "nn.ModuleList or nn.ModuleDict.",
    )
    assert type(model.hidden[0][0]) is nn.Linear


def test_a_file_restores_held_layers(tmp_path: Any) -> None:
    hold, run = REPLACED["list"]
    model, other = Holder(hold, run).eval(), Holder(hold, run).eval()
    quantize_(model)
    save(model, tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", other)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))


def test_nothing_of_the_user_runs_while_looking() -> None:
    class Loud(dict[str, Any]):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("read")

        def __iter__(self) -> Any:
            raise AssertionError("iterated")

        def items(self) -> Any:
            raise AssertionError("iterated")

    model = nn.Sequential(nn.Linear(64, 64))
    model.__dict__["loud"] = Loud(a=model[0])
    model.loop = [1]
    model.loop.append(model.loop)
    assert quantize_(model).notes[0].endswith("holds it: loud['a'] (0).")


def test_containers_of_any_depth() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.deep = [[[[[[[[model[0]]]]]]]]]
    assert quantize_(model).notes == ()
    assert model.deep[0][0][0][0][0][0][0][0] is model[0]


def test_objects_of_the_library_are_left_alone() -> None:
    """Layers that are computed together know each other; that is no second use."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).transpose(-1, -2)

    model = Attention().eval()
    report = quantize_(model)
    assert report.fusions
    assert held_modules(model) == {}
    assert to_float_(model).notes == ()
