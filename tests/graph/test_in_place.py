"""Work in place in a forward: the record gives its values, changes nothing else, or is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant.chains.interpreter import Interpreter
from torchquant.convert.regions import is_leaf
from torchquant.graph.in_place import without_in_place
from torchquant.graph.randomness import is_random
from torchquant.graph.sharing import numbers
from torchquant.graph.trace import Call, Ref, Untraceable, trace

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu, self.elu = nn.ReLU(inplace=True), nn.ELU(inplace=True)
        self.same, self.drop, self.copying = nn.Identity(), nn.Dropout(inplace=True), nn.Dropout()
        self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 3.0))
        self.register_buffer("count", torch.ones(1))
        self.plain = torch.ones(1)


def made(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    return type("Made", (Net,), {"forward": forward, "__module__": __name__})(forward).eval()


def twice(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h.add_(1)
    h.mul_(2)
    return h


def twice_by_modules(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    s.elu(h)
    s.relu(h)
    return s.b(h) + h


def by_functions(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    F.hardtanh(h, -0.5, 0.4, True)
    F.mish(input=h, inplace=True)
    torch.neg_(h)
    return h.exp_() + h


def two_names(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    other = h
    h += s.gain
    other *= 2
    h -= x
    return h, other


def read_between(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    before = s.b(h)
    h += 1
    after = s.b(h)
    h.relu_()
    return before, after, h


def through_an_identity(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    same = s.drop(s.same(h))
    h.neg_()
    return s.b(same)


def dropout_in_place(s: Any, x: Tensor) -> Any:
    h = s.a(s.drop(x))
    s.drop(h)
    h.add_(1)
    return s.b(s.copying(h))


def on_a_view(s: Any, x: Tensor) -> Any:
    h = s.a(x).flatten(2).transpose(1, 2)
    h += 1
    return h.relu_()


def view_read_before(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    v = h.flatten(1).mean()
    h.relu_()
    return h, v


def sizes_read_after(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    v = h.flatten(1)
    h.relu_()
    return h.view(v.size(0), v.shape[1])


def whole_numbers(s: Any, x: Tensor) -> Any:
    n = x.size(1)
    m = n
    m += 2
    m *= n
    return s.a(x) * (m - n)


def of_masks(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    mask = h > 0
    mask &= x > 0
    mask |= h > 1
    return h.masked_fill_(mask, 0.0)


def mixed_dtypes(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h += x.double()
    return h


RUNS = (
    *(twice, twice_by_modules, by_functions, two_names, read_between, through_an_identity),
    dropout_in_place,
    *(on_a_view, view_read_before, sizes_read_after, whole_numbers, of_masks, mixed_dtypes),
)


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in tensors(item)]


@pytest.mark.parametrize("forward", RUNS, ids=lambda f: f.__name__)
def test_the_record_has_the_values_of_the_forward(forward: Forward) -> None:
    model, x = made(forward), torch.randn(2, 4, 6, 6)
    record = without_in_place(trace(model, is_leaf), model)
    with torch.no_grad():
        wanted = model(x.clone())
        got = Interpreter(record, model)([x])
    for mine, real in zip(tensors(got), tensors(wanted), strict=True):
        assert mine.dtype == real.dtype and torch.equal(mine, real)


@pytest.mark.parametrize("forward", [dropout_in_place, through_an_identity])
def test_the_record_holds_in_training(forward: Forward) -> None:
    model, x = made(forward).train(), torch.randn(2, 4, 6, 6)
    record = without_in_place(trace(model, is_leaf), model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wanted = model(x.clone())
        torch.manual_seed(1)
        got = Interpreter(record, model)([x.clone()])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("forward", RUNS, ids=lambda f: f.__name__)
def test_calls_of_a_record_change_none_of_their_arguments(forward: Forward) -> None:
    """So a program may read a value after a call that works in place on it."""
    model, x = made(forward), torch.randn(2, 4, 6, 6)
    record = without_in_place(trace(model, is_leaf), model)
    results: list[tuple[Tensor, Tensor]] = []

    def seen(index: int, value: Any) -> None:
        if isinstance(value, Tensor):
            results.append((value, value.clone()))

    with torch.no_grad():
        Interpreter(record, model, seen=seen)([x])
    assert len(results) > 2 and all(torch.equal(*pair) for pair in results)


def on_the_input(s: Any, x: Tensor) -> Any:
    x += s.gain
    return s.a(x)


def on_a_view_of_the_input(s: Any, x: Tensor) -> Any:
    return s.a(s.same(x).transpose(2, 3).relu_())


def on_a_parameter(s: Any, x: Tensor) -> Any:
    s.gain.mul_(2)
    return s.a(x)


def on_a_buffer(s: Any, x: Tensor) -> Any:
    s.count.add_(1)
    return s.a(x)


def on_a_tensor_of_the_object(s: Any, x: Tensor) -> Any:
    s.plain.add_(1)
    return s.a(x)


def view_read_after(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    v = h.flatten(1).view(-1, 4, 6, 6)
    h.neg_()
    return s.b(v)


def dropout_read_after(s: Any, x: Tensor) -> Any:
    """In evaluation, the dropout returns its argument; in training it does not."""
    h = s.a(x)
    v = s.copying(h)
    h.neg_()
    return s.b(v)


def half_of_it(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h[:, :2].mul_(0)
    return s.b(h)


def its_data(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    data = h.data
    data += 1
    return s.b(h)


def items(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    h[:, :2] = 0
    return s.b(h)


def written_elsewhere(s: Any, x: Tensor) -> Any:
    h = s.a(x)
    torch.add(h, 1, out=h)
    return s.b(h)


def keeps_statistics(s: Any, x: Tensor) -> Any:
    return F.batch_norm(s.a(x), s.count.expand(4), s.count.expand(4), training=True)


REFUSED = {
    on_the_input: "in place on its input",
    on_a_view_of_the_input: "in place on its input",
    on_a_parameter: "in place on its input or on a parameter",
    on_a_buffer: "in place on its input or on a parameter",
    on_a_tensor_of_the_object: "may do more than compute",
    view_read_after: "in place on a view",
    dropout_read_after: "in place on a view",
    half_of_it: "in place on a view",
    its_data: "in place on a view",
    items: "may do more than compute",
    written_elsewhere: "may do more than compute",
    keeps_statistics: "changes a tensor of the model",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_a_record_cannot_hold(forward: Forward) -> None:
    model = made(forward)
    before = [t.clone() for t in (*model.state_dict().values(), model.plain)]
    with pytest.raises(Untraceable, match=REFUSED[forward]):
        without_in_place(trace(model, is_leaf), model)
    after = [*model.state_dict().values(), model.plain]
    assert all(map(torch.equal, before, after))


def test_sizes_are_numbers() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        _, c, h, w = x.shape
        return s.a(x).reshape(x.size(0), c * (h // 2), -1) * w

    record = trace(made(forward), is_leaf)
    tensors = {"input", "module"}
    expected = {
        index
        for index, call in enumerate(record.calls)
        if call.kind not in tensors and call.target != "reshape"
    }
    assert numbers(record) == expected - {len(record.calls) - 1}


@pytest.mark.parametrize(
    ("call", "random"),
    [
        (Call("function", "torch.nn.functional:dropout", (Ref(0),)), True),
        (Call("function", "torch.nn.functional:dropout", (Ref(0), 0.5, False)), False),
        (Call("function", "torch.nn.functional:dropout", (Ref(0),), {"training": False}), False),
        (Call("function", "torch:rand_like", (Ref(0),)), True),
        (Call("method", "bernoulli_", (Ref(0),)), True),
        (Call("method", "relu_", (Ref(0),)), False),
        (Call("module", "dropout", (Ref(0),)), False),
    ],
)
def test_random_calls(call: Call, random: bool) -> None:
    assert is_random(call) == random
