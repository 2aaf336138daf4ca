"""Histograms: the counts are those of the values, for any order and division of the batches."""

import copy
import io
import pickle
import random
import tracemalloc
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FLOATS, INF, NAN, assert_same_bits, floats, threads
from support.calibration_data import DISTRIBUTIONS, divisions
from support.calibration_processes import OBSERVERS, observed, reduced_in_process, state
from support.processes import in_processes
from torch import Tensor, nn

from torchquant import (
    MovingAverageMinMaxObserver,
    ObservedQuantizer,
    PerAxis,
    PerGroup,
    PerToken,
    Static,
)
from torchquant.configs import Calibration, config_from_dict, config_to_dict
from torchquant.observers import (
    CountingObserver,
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    Observer,
    PercentileObserver,
    observer_for,
    register_observer,
)
from torchquant.training import calibration
from torchquant.training.counts import FINEST, bins_per_sign

COUNTING = {
    "percentile": PercentileObserver,
    "histogram": HistogramObserver,
    "entropy": EntropyObserver,
}


def per_channel() -> PercentileObserver:
    return PercentileObserver(granularity=PerAxis(0))


def same_state(got: Observer, expected: Observer) -> None:
    for (name, value), other in zip(
        got.named_buffers(), dict(expected.named_buffers()).values(), strict=True
    ):
        if name != "num_batches":
            assert_same_bits(value, other, name)
    for value, other in zip(got.calculate_qparams(), expected.calculate_qparams(), strict=True):
        assert_same_bits(value, other)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_value_is_counted_in_its_bin(name: str, dtype: torch.dtype) -> None:
    x = DISTRIBUTIONS[name].to(dtype)
    x = x[x.isfinite()]
    observer = CountingObserver(bins=50)
    for piece in divisions(x, seed=1):
        observer(piece)
    per_sign = bins_per_sign(50)
    assert per_sign == 256
    greatest = float(x.float().abs().max())
    exponent = int(observer.exponent)
    # The least exponent whose bins reach beyond the greatest magnitude.
    assert greatest < per_sign * 2.0**exponent
    assert exponent == FINEST or greatest >= per_sign * 2.0 ** (exponent - 1)
    expected = [0] * (2 * per_sign - 1)
    for value in x.tolist():
        expected[int(value / 2.0**exponent) + per_sign - 1] += 1
    assert observer.counts.tolist() == [expected]


@given(seed=st.integers(0, 1000), name=st.sampled_from([*OBSERVERS]))
@settings(max_examples=40)
def test_no_order_and_no_division_changes_the_result(seed: int, name: str) -> None:
    x = floats(4, 500, seed=seed)
    pick = random.Random(seed)
    columns = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
    cuts = sorted(pick.randrange(501) for _ in range(5))
    pieces = list(x[:, columns].tensor_split(cuts, 1))
    whole = observed(name, [x])
    same_state(observed(name, pieces), whole)
    # Observers of one piece each, merged as a random tree.
    parts = [observed(name, [piece]) for piece in pieces]
    while len(parts) > 1:
        first = parts.pop(pick.randrange(len(parts)))
        second = parts.pop(pick.randrange(len(parts)))
        first.merge(second)
        parts.append(first)
    same_state(parts[0], whole)
    assert parts[0].num_batches.item() == len(pieces)


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("data", DISTRIBUTIONS)
def test_batches_of_any_shape_and_order(name: str, data: str) -> None:
    x = DISTRIBUTIONS[data]
    whole = COUNTING[name]()
    whole(x)
    pieces = COUNTING[name]()
    for piece in divisions(x, seed=2):
        pieces(piece)
    same_state(pieces, whole)
    scale = whole.calculate_qparams()[0]
    assert scale.isfinite().all() and (scale > 0).all()
    low, high = whole.calculate_range()
    assert min(x.min(), 0) <= low <= high <= max(x.max(), 0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_observed_on_their_own(axis: int) -> None:
    x = floats(3, 4, 5, 6)
    x.movedim(axis, 0)[1] *= 1000
    together = PercentileObserver(90.0, 32, granularity=PerAxis(axis))
    together(x[:1] if axis else x), together(x[1:] if axis else x[:, :0])
    for index, channel in enumerate(x.movedim(axis, 0)):
        alone = PercentileObserver(90.0, 32)
        alone(channel.contiguous())
        assert_same_bits(together.counts[index], alone.counts[0])
        for all_ends, end in zip(together.calculate_range(), alone.calculate_range(), strict=True):
            assert_same_bits(all_ends[index : index + 1], end)


@pytest.mark.parametrize(
    "make", [*COUNTING.values(), lambda: PercentileObserver(granularity=PerAxis(0))]
)
def test_what_is_not_finite_is_counted_apart(make: type[CountingObserver]) -> None:
    x = floats(2, 400)
    spoilt = torch.cat([x, torch.tensor([[NAN, INF], [-INF, NAN]])], 1)
    clean, other = make(), make()
    clean(x)
    with pytest.warns(RuntimeWarning, match=r"Observer: 4 values were NaN or infinite"):
        other(spoilt[:, torch.randperm(402, generator=torch.Generator().manual_seed(0))])
    assert other.nonfinite.item() == 4
    other.nonfinite.zero_()
    same_state(other, clean)
    empty = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty(torch.full((2, 3), NAN))
    assert empty.calculate_range()[0].isinf().all()
    assert empty.calculate_qparams()[0].tolist() == [1.0] * empty.min_val.numel()


@pytest.mark.parametrize("make", COUNTING.values())
def test_zeros_empty_batches_and_no_data(make: type[CountingObserver]) -> None:
    observer = make()
    observer(torch.empty(0, 3))
    with pytest.warns(RuntimeWarning, match="before any data"):
        make().calculate_qparams()
    observer(torch.zeros(5, 5))
    assert observer.calculate_qparams()[0].tolist() == [1.0]
    observer(torch.tensor([1.5]))
    assert observer.calculate_range()[1].item() == 1.5
    observer.reset()
    observer(torch.tensor([0.25]))
    fresh = make()
    fresh(torch.tensor([0.25]))
    same_state(observer, fresh)


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    observer = HistogramObserver()
    batches = [floats(64, 64, seed=seed) for seed in range(5)]

    def observe(count: int) -> tuple[int, int]:
        for index in range(count):
            observer(batches[index % 5] * (1 + index))
        tensors = sum(b.numel() * b.element_size() for b in observer.buffers())
        return tensors, tracemalloc.get_traced_memory()[0]

    observe(2)
    tracemalloc.start()
    first, traced = observe(5)
    last, traced_later = observe(100)
    tracemalloc.stop()
    assert first == last == 8 * (2 * 8192 - 1) + 8 + 8 + 16
    assert traced_later < traced + 10_000


@pytest.mark.parametrize("name", OBSERVERS)
def test_copies_and_state_dicts_go_on(name: str) -> None:
    x = floats(2, 300)
    observer = observed(name, [x])
    saved = io.BytesIO()
    torch.save(observer.state_dict(), saved)
    saved.seek(0)
    loaded = OBSERVERS[name]()
    loaded.load_state_dict(torch.load(saved))
    others = [loaded, copy.deepcopy(observer), pickle.loads(pickle.dumps(observed(name, [x])))]
    more = floats(2, 300, seed=1) * 7
    observer(more)
    for other in others:
        other(more)
        same_state(other, observer)
    assert all(b.dtype in (torch.float32, torch.int64) for b in observer.half().buffers())
    assert observer.reduced() is not observer
    same_state(observer.reduced(), observer)


def test_two_processes_have_the_result_of_one() -> None:
    x = floats(4, 600)
    x[:, 300:] *= 50
    pieces = list(x.split([100, 200, 250, 50], 1))
    expected = {name: state(observed(name, [x])) for name in OBSERVERS}
    # The first process sees less than the second; then the second sees nothing.
    for states, messages in in_processes(
        reduced_in_process, [[pieces[:1], pieces[1:]], [pieces, []]]
    ):
        for of_division in states:
            for name, got in of_division.items():
                assert got.pop("num_batches").item() == 4
                for key, value in got.items():
                    assert_same_bits(value, expected[name][key], (name, key))
        assert "all processes must hold observers with the same arguments" in messages[0]
        assert "must have ranges of one shape, got [2], [3]" in messages[1]


def test_moving_averages_merge_by_their_numbers_of_batches() -> None:
    first, second = MovingAverageMinMaxObserver(0.5), MovingAverageMinMaxObserver(0.5)
    first(torch.tensor([-1.0, 2.0]))
    for _ in range(3):
        second(torch.tensor([-5.0, 6.0]))
    first.merge(second)
    assert (first.min_val.item(), first.max_val.item()) == (-4.0, 5.0)
    assert first.num_batches.item() == 4
    first.merge(MovingAverageMinMaxObserver(0.5))
    assert first.max_val.item() == 5.0


def test_merging_refuses_what_does_not_fit() -> None:
    observer = HistogramObserver(64)
    with pytest.raises(TypeError, match="other must be a HistogramObserver, got MinMaxObserver"):
        observer.merge(MinMaxObserver())
    with pytest.raises(ValueError, match=r"other must have the same arguments .*bins=64"):
        observer.merge(HistogramObserver(32))
    two, three = (PercentileObserver(granularity=PerAxis(0)) for _ in range(2))
    two(floats(2, 5)), three(floats(3, 5))
    before = two.counts.clone()
    with pytest.raises(ValueError, match=r"ranges of shape \[2\], got \[3\]"):
        two.merge(three)
    assert torch.equal(two.counts, before)


def test_compiled_graphs_count_the_same() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = HistogramObserver(64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.observer(x * 2)
            return out + 1

    eager, compiled = Net(), Net()
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    for seed in range(2):
        x = floats(8, 8, seed=seed)
        assert torch.equal(eager(x), run(x))
    same_state(compiled.observer, eager.observer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HistogramObserver(1), "bins must be an integer from 2 to 1048576, got 1"),
        (lambda: HistogramObserver(True), "bins must be an integer"),
        (lambda: HistogramObserver(2.5), "bins must be an integer"),  # type: ignore[arg-type]
        (lambda: HistogramObserver(granularity=PerAxis(0)), "granularity must be PerTensor()"),
        (lambda: EntropyObserver(granularity=PerAxis(1)), "granularity must be PerTensor()"),
        (lambda: PercentileObserver(granularity=PerGroup(4)), "must be PerTensor() or PerAxis"),
        (lambda: PercentileObserver(granularity=PerToken()), "never observed"),
        (lambda: PercentileObserver(50), "above 50 and at most 100, got 50"),
        (lambda: PercentileObserver(100.1), "above 50 and at most 100"),
        (lambda: PercentileObserver(NAN), "above 50 and at most 100"),
        (lambda: EntropyObserver(64, 65), "levels must be an integer from 2 to bins = 64, got 65"),
        (lambda: EntropyObserver(64, 1), "levels must be an integer from 2"),
    ],
)
def test_arguments_are_checked(make: type[Observer], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("make", COUNTING.values(), ids=COUNTING)
def test_threads_change_nothing(make: type[CountingObserver]) -> None:
    x = floats(40, 10_000, seed=5)
    one, two = make(), make()
    with threads(1):
        one(x)
        expected = one.calculate_range()
    with threads(2):
        two(x)
        for got, end in zip(two.calculate_range(), expected, strict=True):
            assert_same_bits(got, end)
    same_state(two, one)


def test_an_observer_that_searches_for_its_range_is_not_for_training() -> None:
    with pytest.raises(TypeError, match=r"got EntropyObserver, which searches all batches"):
        ObservedQuantizer(EntropyObserver())


def test_configurations_can_name_another_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Fixed(Calibration):
        high: float = 1.0

    class FixedObserver(MinMaxObserver):
        def __init__(self, high: float, **options: Any) -> None:
            super().__init__(**options)
            self.high = high

        def calculate_range(self) -> tuple[Tensor, Tensor]:
            return torch.zeros(1), torch.full((1,), self.high)

    with pytest.raises(TypeError, match=r"observer must be one of MinMax, .*got .*Fixed"):
        observer_for(Static(observer=Fixed()))
    with pytest.raises(TypeError, match=r"must be a subclass of torchquant\.configs.Calibration"):
        register_observer(FixedObserver, FixedObserver)  # type: ignore[arg-type]
    monkeypatch.setattr(calibration, "_OBSERVERS", dict(calibration._OBSERVERS))
    register_observer(Fixed, FixedObserver)
    config = Static(observer=Fixed(2.55))
    assert config_from_dict(config_to_dict(config)) == config
    observer = observer_for(config)
    observer(torch.ones(3))
    scale, zero_point = observer.calculate_qparams()
    assert (round(float(scale), 6), int(zero_point)) == (0.01, -128)
