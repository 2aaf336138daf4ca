"""Results of any type, their gradients, random numbers, and inputs that a forward changes."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from support.forwards import (
    Forward,
    Net,
    assert_close,
    assert_same,
    both,
    interpreted,
    module_with,
    region_in,
    tensors,
)
from torch import Tensor
from torch.nn import functional as F

import torchquant
from torchquant.convert.regions import regions_in


class Pair(NamedTuple):
    first: Any
    second: Any


def named(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return Pair(s.b(y), [Pair(y, None), (3, "text")])


def maxima(s: Any, x: Tensor) -> Any:
    return s.b(F.relu(s.a(x))).max(1)


def table(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return OrderedDict(y=y, z={"b": s.b(y), "n": y.argmax(1)}, none=None)


def twice(s: Any, x: Tensor) -> Any:
    y = s.b(F.relu(s.a(x)))
    return y, {"again": y}


def detached(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y), y.detach(), y.detach() * s.gain


def detached_inside(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y) + s.c(y.detach())


def only_detached(s: Any, x: Tensor) -> Any:
    return s.b(F.relu(s.a(x))).detach()


def input_itself(s: Any, x: Tensor) -> Any:
    return s.b(F.relu(s.a(x))), x, x.flatten(1), s.gain


def masks(s: Any, x: Tensor) -> Any:
    y = s.b(F.relu(s.a(x)))
    return y > 0, y, (y > 0).float(), torch.zeros_like(y), y.to(torch.complex64)


RESULTS = (
    *(named, maxima, table, twice, detached, detached_inside, only_detached, input_itself, masks),
)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.requires_grad
    if isinstance(value, dict):
        return type(value), [(key, structure(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [structure(item) for item in value]
    return value


@pytest.mark.parametrize("needs", [(False, True), (True, True), (True, False), (False, False)])
@pytest.mark.parametrize("forward", RESULTS, ids=lambda f: f.__name__)
def test_results_and_gradients(forward: Forward, needs: tuple[bool, bool]) -> None:
    """Types, values, what requires gradients, and the gradients themselves, in several calls."""
    x, parameters = images(), needs[1]
    model, real = both(forward, [x])
    region_in(model)
    x.requires_grad_(needs[0])
    model.requires_grad_(parameters)
    real.requires_grad_(parameters)
    with torch.no_grad():
        wanted = model(x)
    gradients = []
    for run in (model, model, model, region_in(model)._interpreted, real):
        for module in (model, real):
            module.zero_grad()
        x.grad = None
        got = run([x]) if run not in (model, real) else run(x)
        if run is not real:
            assert_same(got, wanted)
        assert structure(got) == structure(real(x))
        losses = [t.abs().sum() for t in tensors(got) if t.requires_grad]
        if not losses:
            continue
        torch.autograd.backward(losses)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append({"x": x.grad, **found})
    if not gradients:
        return
    *ours, _ = gradients
    for other in ours:
        assert other.keys() == ours[0].keys()
        assert_same(list(other.values()), list(ours[0].values()))
    if needs[0] and forward is not detached_inside:
        assert_close(ours[0]["x"], gradients[-1]["x"], 0.9)


def test_the_input_is_returned_itself() -> None:
    x = images()
    model, _ = both(input_itself, [x])
    for _ in range(3):
        assert model(x)[1] is x


def test_programs_give_the_values_and_the_interpreter_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = images()
    model, _ = both(twice, [x])
    model(x)
    region, calls = region_in(model), []
    original = type(region)._interpreted
    monkeypatch.setattr(
        type(region), "_interpreted", lambda *args: calls.append(1) or original(*args)
    )
    y, _ = model(x)
    assert not calls
    y.sum().backward()
    assert calls == [1]


def test_a_backward_pass_under_autocast() -> None:
    x = images().requires_grad_()
    model, _ = both(twice, [images()])
    grads = []
    for autocast in (False, False, True):
        x.grad = None
        y, _ = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.sum().backward()
        grads.append(x.grad)
    assert_same(grads[2], grads[0])
    assert_same(grads[1], grads[0])


# ---------------------------------------------------------------- random numbers


def dropped(s: Any, x: Tensor) -> Any:
    return F.dropout(s.b(F.relu(s.a(x))), 0.5, True)


def noisy(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y + torch.rand_like(y)) * torch.bernoulli(torch.full_like(y, 0.5))


def noise_in_place(s: Any, x: Tensor) -> Any:
    y = s.b(F.relu(s.a(x)))
    return y * torch.zeros_like(y).normal_()


def drawn_for_nothing(s: Any, x: Tensor) -> Any:
    torch.rand_like(x)
    y = F.relu(s.a(x))
    torch.randn_like(y)
    return s.b(y * torch.rand_like(y))


RANDOM = (dropped, noisy, noise_in_place, drawn_for_nothing)


@pytest.mark.parametrize("forward", RANDOM, ids=lambda f: f.__name__)
def test_random_numbers(forward: Forward) -> None:
    """The same numbers as the float model draws, and the same ones in the backward pass."""
    x = images()
    model, real = both(forward, [x])
    region_in(model)
    for _ in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            wanted, after = real(x), torch.get_rng_state()
            torch.manual_seed(5)
            with torch.no_grad():
                fast = model(x)
            assert torch.equal(torch.get_rng_state(), after)
            torch.manual_seed(5)
            slow = interpreted(model, x)
            torch.manual_seed(5)
            model.zero_grad()
            got = model(x)
            torch.manual_seed(6)
            got.sum().backward()
        assert_same(fast, slow)
        assert_same(got, slow)
        assert_close(got, wanted)
        real.zero_grad()
        wanted.sum().backward()
        assert_close(model.b.bias.grad, real.b.bias.grad)


# ---------------------------------------------------------------- arguments


class Arguments(Net):
    def forward(
        self, x: Tensor, size: tuple[int, int] = (2, 3), *, y: Tensor, scale: float = 1.0
    ) -> Any:
        h = F.adaptive_avg_pool2d(F.relu(self.a(x)), size) * scale
        return self.b(h), self.c(y)


def test_arguments_by_position_and_by_name() -> None:
    model, real = module_with(Arguments.forward), module_with(Arguments.forward)
    torchquant.prepare_(model, filter_fn=["a", "b", "c"])
    x = images()
    torchquant.calibrate(model, [{"x": x, "y": x}], progress=False)
    torchquant.convert_(model)
    region, runs = region_in(model), []
    region.original = lambda *a, **k: runs.append(1) or type(region).original(region, *a, **k)  # type: ignore[method-assign]
    calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = [
        ((x,), {"y": x}, True),
        ((x, (2, 3)), {"y": x}, True),
        ((), {"y": x, "x": x, "size": (2, 3), "scale": 1.0}, True),
        ((x, (1, 3)), {"y": x}, False),
        ((x, (4, 4)), {"y": x, "scale": 0.5}, False),
        ((x, [2, 3]), {"y": x}, False),
    ]
    with torch.no_grad():
        for args, kwargs, recorded in calls:
            runs.clear()
            got = model(*args, **kwargs)
            assert_close(got, real(*args, **kwargs))
            assert (not runs) == recorded
        for args, kwargs, _ in (((x, x), {}, True), ((x, x), {"x": x}, True), ((), {}, True)):
            with pytest.raises(TypeError):
                model(*args, **kwargs)


def test_the_reason_of_a_region_whose_arguments_were_no_tensors() -> None:
    def forward(s: Any, x: Tensor, t: Any) -> Any:
        return s.b(F.relu(s.a(x)) * t)

    model = module_with(forward)
    torchquant.prepare_(model, filter_fn=["a", "b"])
    torchquant.calibrate(model, [(images(), 2.0)], progress=False)
    (region,) = torchquant.convert_(model).regions
    assert region.reason == "its argument t was no tensor but float"
    with torch.no_grad():
        assert_close(model(images(), 2.0), module_with(forward)(images(), 2.0))


# ---------------------------------------------------------------- changed inputs


def changes_its_input(s: Any, x: Tensor) -> Any:
    x += s.gain
    return s.b(F.relu(s.a(x)))


def changes_a_view_of_its_input(s: Any, x: Tensor) -> Any:
    x[:, :4].mul_(2)
    return s.b(F.relu(s.a(x)))


def changes_by_a_module(s: Any, x: Tensor) -> Any:
    return s.b(F.relu(s.a(F.relu(x, inplace=True))))


@pytest.mark.parametrize(
    "forward",
    [changes_its_input, changes_a_view_of_its_input, changes_by_a_module],
    ids=lambda f: f.__name__,
)
def test_an_input_that_is_changed(forward: Forward) -> None:
    model, real = both(forward, [images()])
    assert not regions_in(model)
    given, wanted = images(), images()
    with torch.no_grad():
        assert_close(model(given), real(wanted))
    assert torch.equal(given, wanted) and not torch.equal(given, images())


def test_values_changed_in_place_reach_every_reader() -> None:
    """Two changes, a reader between them, and one by a second name."""

    def forward(s: Any, x: Tensor) -> Any:
        h = s.a(x)
        same = h
        h.add_(1)
        before = s.b(h)
        h.mul_(2)
        same += x
        return s.c(h) + before, same

    x = images()
    model, real = both(forward, [x])
    with torch.no_grad():
        got = model(x)
        assert_close(got, real(x))
    assert_same(got, interpreted(model, x))
