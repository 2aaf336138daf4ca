"""What holds for the sizes of the first batch does not hold for those of every batch."""

from typing import Any

import pytest
import torch
from support.forwards import (
    Forward,
    assert_close,
    assert_same,
    both,
    interpreted,
    module_with,
    region_in,
)
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.chains.operations import Flatten, Same
from torchquant.chains.recognize import depends_on_sizes
from torchquant.chains.schedule import Segment
from torchquant.convert.regions import is_leaf
from torchquant.graph.trace import trace


def squeezed(s: Any, x: Tensor) -> Any:
    return s.fc(F.adaptive_avg_pool2d(F.relu(s.a(x)), 1).squeeze())


def squeezed_last(s: Any, x: Tensor) -> Any:
    return s.fc(F.adaptive_avg_pool2d(F.relu(s.a(x)), 1).squeeze(-1).squeeze(-1))


def squeezed_both(s: Any, x: Tensor) -> Any:
    return s.fc(
        F.max_pool2d(F.relu(s.a(x)), 6).squeeze((2, 3)).mean(-1, keepdim=True).expand(-1, 8)
    )


def flat_from_0(s: Any, x: Tensor) -> Any:
    return s.fc(F.relu(s.a(x)).flatten(0).view(-1, 8))


def one_row(s: Any, x: Tensor) -> Any:
    return s.fc(F.adaptive_avg_pool2d(F.relu(s.a(x)), 1).view(-1)[:8])


def rows_of_8(s: Any, x: Tensor) -> Any:
    """Rows of eight: one pixel pooled makes them the channels, more pixels do not."""
    return s.fc(F.relu(s.fc(F.max_pool2d(F.relu(s.a(x)), 6).view(-1, 8))))


def rows_of_the_input(s: Any, x: Tensor) -> Any:
    n = x.size(0)
    h = F.adaptive_avg_pool2d(F.relu(s.a(x)), 1).reshape(n, -1)
    return s.fc(F.relu(s.fc(h)).view(n, -1))


def unpacked(s: Any, x: Tensor) -> Any:
    n, _, h, w = x.shape
    y = F.relu(s.a(x)).view(n, 8, h * w).mean(-1)
    return s.fc(y) * (h // 2)


def half_of_the_height(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y[:, :, : x.shape[2] // 2, ::2])


def same_sizes(s: Any, x: Tensor) -> Any:
    y = s.b(F.max_pool2d(F.relu(s.a(x)), 2))
    return s.c(F.interpolate(y, size=x.shape[2:]) + x)


def mean_of_all(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y + y.mean())


def gates(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y * torch.sigmoid(F.adaptive_avg_pool2d(s.c(y), 1)))


def gate_first(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(torch.sigmoid(y.mean((-1, -2), True)) * y)


def gains(s: Any, x: Tensor) -> Any:
    return s.b(F.relu(s.a(x)) * s.gain + s.gain)


def across_the_batch(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.b(y + y[:1])


SHAPES = {"1": (1, 8, 6, 6), "n": (3, 8, 6, 6), "small": (2, 8, 4, 6), "large": (1, 8, 12, 6)}
FORWARDS = (
    *(squeezed, squeezed_last, squeezed_both, flat_from_0, one_row, rows_of_8, rows_of_the_input),
    *(unpacked, half_of_the_height, same_sizes, mean_of_all, gates, gate_first, gains),
    across_the_batch,
)


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first", ["1", "n"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_batches_of_other_sizes(forward: Forward, first: str) -> None:
    shape = SHAPES[first]
    model, real = both(forward, [batch(shape, seed) for seed in range(4)])
    region_in(model)
    for name in (*SHAPES, first):
        x = batch(SHAPES[name])
        with torch.no_grad():
            try:
                wanted = real(x)
            except (RuntimeError, IndexError):  # the float model does not take these sizes
                with pytest.raises((RuntimeError, IndexError, ValueError)):
                    model(x)
                continue
            got = model(x)
        assert_close(got, wanted, 0.98)
        assert_same(got, interpreted(model, x))


def test_calls_that_depend_on_sizes() -> None:
    found = {
        forward.__name__: [
            record.calls[index].target
            for index in range(len(record.calls))
            if depends_on_sizes(index, record)
        ]
        for forward in (squeezed, rows_of_8, rows_of_the_input, gates)
        for record in [trace(module_with(forward), is_leaf)]
    }
    assert found == {
        "squeezed": ["squeeze"],
        "rows_of_8": ["view"],
        "rows_of_the_input": ["reshape", "view"],
        "gates": [],
    }


def flat_by_size(s: Any, x: Tensor) -> Any:
    y = F.max_pool2d(F.relu(s.a(x)), 6)
    return s.fc(y.view(y.size(0), -1))


def flat_by_shape(s: Any, x: Tensor) -> Any:
    y = F.max_pool2d(F.relu(s.a(x)), 6)
    return s.fc(y.view(y.shape[0], -1))


def flat_by_sizes(s: Any, x: Tensor) -> Any:
    y = F.max_pool2d(F.relu(s.a(x)), 6)
    return s.fc(y.reshape(y.size()[0], -1))


def flat_from_1(s: Any, x: Tensor) -> Any:
    return s.fc(F.max_pool2d(F.relu(s.a(x)), 6).flatten(1))


FLAT = (flat_by_size, flat_by_shape, flat_by_sizes, flat_from_1)


@pytest.mark.parametrize("forward", FLAT, ids=lambda f: f.__name__)
def test_flattening_by_the_own_size_is_never_looked_at_again(forward: Forward) -> None:
    model, _ = both(forward, [batch(SHAPES["n"])])
    with torch.no_grad():
        model(batch(SHAPES["n"]))
    region = region_in(model)
    assert region.plan is not None and region._programs is not None
    assert any(isinstance(operation, Flatten) for operation in region.plan.operations)
    assert region._programs.sizes.open == []


def test_programs_run_for_sizes_that_were_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = both(squeezed, [batch(SHAPES["n"])])
    region = region_in(model)
    calls = []
    monkeypatch.setattr(type(region), "_interpreted", lambda *args: calls.append(args))
    with torch.no_grad():
        for name in ("n", "small", "n", "small"):
            model(batch(SHAPES[name]))
        assert not calls
        model(batch(SHAPES["1"]))
        assert len(calls) == 1


def test_a_tensor_of_the_model_is_not_the_batch() -> None:
    """A batch of one image does not make a program that others cannot use."""
    model, _ = both(gains, [batch(SHAPES["1"])])
    region = region_in(model)
    with torch.no_grad():
        model(batch(SHAPES["n"]))
    assert region._programs is not None
    for item, program in region._programs.items:
        assert isinstance(item, int) or program is not None
    segments = [item for item, _ in region._programs.items if isinstance(item, Segment)]
    assert len(segments) == 1  # the tensor is one number for each channel
    with torch.no_grad():
        x = batch(SHAPES["n"])
        assert region._programs.run([x]) is not None
        assert_same(region._programs.run([x]), interpreted(model, x))


# ---------------------------------------------------------------- without a batch


def plain_image(s: Any, x: Tensor) -> Any:
    return s.b(F.avg_pool2d(F.relu(s.a(x)), 3, 2, 1))


def adaptive(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return (
        s.b(F.adaptive_avg_pool2d(y, (4, 2)))
        + s.c(F.max_pool2d(y, (2, 3), (2, 4)))[..., :3, :2].sum()
    )


def joined(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.wide(torch.cat([y, F.max_pool2d(y, 3, 1, 1)], -3))


def means(s: Any, x: Tensor) -> Any:
    return s.fc(F.relu(s.a(x)).mean((-1, -2)))


def flat(s: Any, x: Tensor) -> Any:
    return s.fc(F.adaptive_avg_pool2d(s.b(F.relu(s.a(x))), 1).flatten(-3))


def added(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x))
    return s.c(F.hardswish(s.b(y) + y) * y)


IMAGES = (plain_image, adaptive, joined, means, flat, added)


@pytest.mark.parametrize("calibrated", ["batches", "images", "both"])
@pytest.mark.parametrize("forward", IMAGES, ids=lambda f: f.__name__)
def test_images_without_a_batch(forward: Forward, calibrated: str) -> None:
    x = batch((3, 8, 6, 7))
    given = {"batches": [x], "images": list(x), "both": [x, *x]}[calibrated]
    model, real = both(forward, given)
    for one in (x[0], x, x[:1], x[1], batch((8, 8, 8))):
        with torch.no_grad():
            got, wanted = model(one), real(one)
        assert_close(got, wanted)
        assert_same(got, interpreted(model, one))


def sequence(s: Any, x: Tensor) -> Any:
    y = F.relu(s.p(x))
    return s.q(F.max_pool1d(s.q(y) + y, 2)) + s.q(F.avg_pool1d(y, 2))


def sequence_means(s: Any, x: Tensor) -> Any:
    return s.fc(F.adaptive_avg_pool1d(F.relu(s.p(x)), 1).squeeze(-1))


@pytest.mark.parametrize("calibrated", ["batches", "sequences", "both"])
@pytest.mark.parametrize("forward", [sequence, sequence_means], ids=lambda f: f.__name__)
def test_sequences_without_a_batch(forward: Forward, calibrated: str) -> None:
    x = batch((3, 8, 10))
    given = {"batches": [x], "sequences": list(x), "both": [x, *x]}[calibrated]
    model, real = both(forward, given)
    for one in (x[0], x, x[:1], batch((8, 8)), batch((8, 8, 8))):
        with torch.no_grad():
            got, wanted = model(one), real(one)
        assert_close(got, wanted)
        assert_same(got, interpreted(model, one))


def test_images_without_a_batch_are_no_sequences() -> None:
    """A convolution of images and one of sequences in one region, both without a batch."""

    def forward(s: Any, x: Tensor) -> Any:
        y = F.adaptive_avg_pool2d(F.relu(s.a(x)), (1, 4))
        return s.q(F.relu(s.p(y.squeeze(-2))))

    x = batch((3, 8, 6, 6))
    for given in ([x], list(x)):
        model, real = both(forward, given)
        for one in (x, x[0]):
            with torch.no_grad():
                got, wanted = model(one), real(one)
            assert_close(got, wanted)
            assert_same(got, interpreted(model, one))


def test_linear_layers_take_any_rank() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        return s.fc(F.relu(s.fc(x)) + x)

    shapes = ((8,), (5, 8), (2, 5, 8), (2, 1, 5, 8))
    for first in shapes:
        model, real = both(forward, [batch(first, seed) for seed in range(8)])
        for shape in shapes:
            x = batch(shape)
            with torch.no_grad():
                got, wanted = model(x), real(x)
            assert_close(got, wanted, 0.97)
            assert_same(got, interpreted(model, x))


def test_identities_by_size_are_looked_at() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = F.relu(s.fc(x)).view(-1, 8)
        return s.fc(y)

    model, real = both(forward, [batch((5, 8))])
    plan = region_in(model).plan
    assert plan is not None and any(isinstance(operation, Same) for operation in plan.operations)
    for shape in ((5, 8), (2, 5, 8), (8,), (1, 8)):
        x = batch(shape)
        with torch.no_grad():
            got, wanted = model(x), real(x)
        assert_close(got, wanted)
        assert_same(got, interpreted(model, x))


def test_other_types_of_numbers() -> None:
    """Integers and booleans inside of a forward, and an input of another type than the first."""

    def forward(s: Any, x: Tensor) -> Any:
        y = F.relu(s.a(x.float() / 4))
        mask = (y > 0.1) & (y < 2)
        whole = F.relu(y.to(torch.int32) - 1)
        y = torch.where(mask, y, y.double().clamp(0, 1).float()) + whole
        return s.b(torch.add(y, y, alpha=2)), whole, y.argmax(1)

    x = torch.randint(0, 9, (3, 8, 6, 6))
    model, real = both(forward, [x.float()])
    for given in (x.float(), x, x.to(torch.uint8), x.double()):
        with torch.no_grad():
            got, wanted = model(given), real(given)
        assert_close(got, wanted)
        assert_same(got, interpreted(model, given))


def test_a_double_value_between_int8_steps() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = F.relu(s.a(x))
        return s.b((y.double() + y.double()).float()), s.c(y.half().float() + y)

    x = batch((2, 8, 6, 6))
    model, real = both(forward, [x])
    with torch.no_grad():
        got, wanted = model(x), real(x)
    assert_close(got, wanted)
    assert_same(got, interpreted(model, x))


def above_a_maximum(s: Any, x: Tensor) -> Any:
    return s.a(F.max_pool2d(x, 3)), x * 2


def below_a_maximum(s: Any, x: Tensor) -> Any:
    return s.a(F.max_pool2d(x, 3)) + s.b(F.interpolate(x, scale_factor=2)).mean()


def summed_above_a_maximum(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return s.b(F.max_pool2d(y, 3)).sum((2, 3), True) + s.c(F.interpolate(y, scale_factor=2) + 0)


MAXIMA = (above_a_maximum, below_a_maximum, summed_above_a_maximum)


@pytest.mark.parametrize("forward", MAXIMA, ids=lambda f: f.__name__)
def test_the_range_of_a_value_is_not_that_of_its_maxima(forward: Forward) -> None:
    """Maxima are seldom negative; what else reads the values needs all of them."""
    x = batch((4, 8, 9, 9))
    model, real = both(forward, [x])
    region_in(model)
    with torch.no_grad():
        got, wanted = model(x), real(x)
    assert_close(got, wanted, 0.999)
    assert_same(got, interpreted(model, x))


class Report(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def test_the_report_of_images_without_a_batch() -> None:
    model = Report().eval()
    torchquant.prepare_(model, filter_fn=lambda module, name: True)
    torchquant.calibrate(model, list(batch((4, 8, 6, 6))), progress=False)
    (region,) = torchquant.convert_(model).regions
    assert any("3 dimensions" in one.reason for one in region.breaks)
