"""Records of forwards: what they hold, what refuses them, and that they run like the forward."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.chain_models import (
    IMAGE_MODELS,
    Decides,
    Functional,
    Plain,
    Shared,
    images,
    with_statistics,
)
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant.chains.interpreter import Interpreter
from torchquant.convert.regions import is_leaf
from torchquant.graph.in_place import without_in_place
from torchquant.graph.regions import find_regions
from torchquant.graph.trace import Untraceable, refs, trace

LOG: list[Any] = []


def recorded(model: nn.Module) -> Interpreter:
    record = without_in_place(trace(model, is_leaf), model)
    return Interpreter(record, model)


@pytest.mark.parametrize("cls", [cls for cls in IMAGE_MODELS if cls is not Decides])
def test_a_record_runs_like_the_forward(cls: Callable[[], nn.Module]) -> None:
    model, x = with_statistics(cls()), images(2)
    run = recorded(model)
    got, wanted = run([x]), model(x)
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        got, wanted = got["out"], wanted["out"]
    assert torch.equal(got, wanted)


def test_a_record_can_be_pickled() -> None:
    record = trace(Functional().eval(), is_leaf)
    assert pickle.loads(pickle.dumps(record)) == record


def test_modes_are_restored() -> None:
    model = Functional().train()
    model.fc.eval()
    trace(model, is_leaf)
    assert model.training and not model.fc.training


def test_readers_and_scopes() -> None:
    record = trace(Shared().eval(), is_leaf)
    names = [call.target for call in record.calls]
    assert names == ["x", "stem", "relu", "conv", "relu", "conv", "relu", "mean", "fc"]
    assert record.readers()[2] == [3]
    assert record.readers()[8] == [9]
    assert list(refs(record.result)) == [8]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return self.conv(x)


class Prints(Counts):
    def forward(self, x: Tensor) -> Tensor:
        print(x.shape)
        return self.conv(x)


class Logs(Counts):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(x)
        return self.conv(x)


class Makes(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.arange(3.0).reshape(1, 3, 1, 1)


class Branches(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class Any_(Counts):
    def forward(self, *x: Tensor) -> Tensor:
        return self.conv(x[0])


class OnInput(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x, inplace=True))


class OnView(Counts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        first, second = y.chunk(2, 1)
        return torch.cat([first.relu_(), second, y], 1)


REFUSED = {
    Counts: "may do more than compute",
    Prints: r"may do more than compute its result \(print\)",
    Logs: r"may do more than compute its result \(LOG\)",
    Makes: "its forward makes a tensor",
    Branches: "depends on values or shapes",
    Any_: r"its forward takes \*x",
    OnInput: "in place on its input",
    OnView: "in place on a view",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_forwards_that_are_not_recorded(cls: type[Counts]) -> None:
    model = cls()
    before = dict(vars(model))
    with pytest.raises(Untraceable, match=REFUSED[cls]):
        recorded(model)
    assert vars(model) == before and LOG == []


class Mutates(nn.Module):
    """The sum reads the convolution's result after relu_ has changed it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.relu(y)
        return y + z * 2


def test_readers_after_work_in_place_read_its_result() -> None:
    model, x = Mutates().eval(), images(2)
    record = without_in_place(trace(model, is_leaf), model)
    addition = next(call for call in record.calls if call.target == "operator:add")
    assert record.calls[addition.reads()[0]].target == "relu"
    assert torch.equal(Interpreter(record, model)([x]), model(x))


class Defaults(nn.Module):
    """Arguments that no record knows: tuples, numbers, None, texts; some by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int] = (2, 3),
        nested: Any = ((1, "a"), None),
        *,
        y: Tensor,
        scale: float = 2.0,
        mode: str | None = None,
    ) -> Any:
        h = F.adaptive_avg_pool2d(self.conv(x), size) * scale
        return {"h": h if mode is None else -h, "n": nested[0][0]}, (y, size)


def test_arguments_with_defaults_of_any_type() -> None:
    model, x = Defaults(), images(2)
    record = trace(model, is_leaf)
    assert record.inputs == ("x", "y")
    assert dict(record.defaults) == {
        "size": (2, 3),
        "nested": ((1, "a"), None),
        "scale": 2.0,
        "mode": None,
    }
    got, (y, size) = Interpreter(record, model)([x, x])
    assert torch.equal(got["h"], model(x, y=x)[0]["h"]) and got["n"] == 1
    assert y is x and size == (2, 3)


def test_a_default_that_can_change_is_refused() -> None:
    class Lists(Counts):
        def forward(self, x: Tensor, sizes: list[int] = [2, 2]) -> Tensor:  # noqa: B006
            return F.adaptive_avg_pool2d(self.conv(x), sizes)

    with pytest.raises(Untraceable, match="the default of its argument sizes can change"):
        trace(Lists(), is_leaf)


class Pair(NamedTuple):
    first: Tensor
    second: Any


def test_results_keep_their_types() -> None:
    class Tables(Counts):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return OrderedDict(pair=Pair(y, [x, None]), y={"z": y})

    model, x = Tables(), images(2)
    got = recorded(model)([x])
    assert type(got) is OrderedDict and list(got) == ["pair", "y"]
    assert type(got["pair"]) is Pair and type(got["pair"].second) is list
    assert got["pair"].second[0] is x and type(got["y"]) is dict


def test_plain_python_is_followed() -> None:
    model, x = Plain().eval(), images(2)
    for got, wanted in zip(recorded(model)([x]), model(x), strict=True):
        assert torch.equal(got, wanted)


def test_children_are_tried_where_a_root_is_refused() -> None:
    model = Decides().eval()
    regions, refusals = find_regions(
        model, lambda module: isinstance(module, (nn.Conv2d, nn.Linear)), is_leaf
    )
    assert [region.path for region in regions] == ["body", "head"]
    assert [(one.path, "values or shapes" in one.reason) for one in refusals] == [("", True)]


def test_hooks_of_inner_modules_run() -> None:
    model, x = with_statistics(IMAGE_MODELS[2]()), images(2)
    seen: dict[str, list[Tensor]] = {}
    names = {module: name for name, module in model.named_modules() if name}
    for module in names:
        module.register_forward_hook(
            lambda module, args, output: seen.setdefault(names[module], []).append(output.clone())
        )
    model(x)
    wanted = {name: [t.clone() for t in outputs] for name, outputs in seen.items()}
    seen.clear()
    recorded(model)([x])
    assert seen.keys() == wanted.keys() == set(names.values())
    for name, outputs in wanted.items():
        assert all(map(torch.equal, seen[name], outputs)), name


def test_a_hook_can_replace_the_output_of_an_inner_module() -> None:
    model, x = with_statistics(IMAGE_MODELS[2]()), images(2)
    run = recorded(model)
    handle = model[1].register_forward_hook(lambda module, args, output: output * 2)
    changed = run([x])
    assert torch.equal(changed, model(x))
    handle.remove()
    assert not torch.equal(changed, model(x))
