"""Observers: the range of the finite values, for all batches, dtypes and numbers of processes."""

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATS, FLT_MAX, INF, LAYOUTS, NAN, assert_same_bits, floats, in_layout
from support.processes import NoWaiting, in_processes, observe, observe_in_process
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchquant
from torchquant import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    functional,
)
from torchquant.scheme import Granularity

GRANULARITIES = {
    "per_tensor": PerTensor(),
    "per_channel": PerAxis(0),
    "last_axis": PerAxis(-1),
    "middle_axis": PerAxis(1),
    "per_group": PerGroup(4),
}
RANGES = [
    {"bits": bits, "signed": signed, "symmetric": symmetric}
    for bits in (2, 4, 8)
    for signed in (True, False)
    for symmetric in (True, False)
]


def seen(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        assert observer(batch) is batch
    return observer


# ---------------------------------------------------------------- the range


@pytest.mark.parametrize("options", RANGES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
def test_scales_are_those_of_the_data(granularity: Granularity, options: dict[str, Any]) -> None:
    x = floats(3, 5, 10)
    scale, zero_point = seen(
        MinMaxObserver(granularity=granularity, **options), x
    ).calculate_qparams()
    expected, expected_zero = functional.choose_qparams(x, granularity=granularity, **options)
    assert_same_bits(scale, expected)
    if expected_zero is None:
        expected_zero = torch.zeros_like(zero_point)
    assert_same_bits(zero_point, expected_zero)


@given(
    data=st.data(),
    dtype=st.sampled_from(FLOATS),
    granularity=st.sampled_from([PerTensor(), PerAxis(1), PerAxis(-1)]),
    layout=st.sampled_from(LAYOUTS),
)
def test_min_max_does_not_depend_on_how_the_data_comes(
    data: st.DataObject, dtype: torch.dtype, granularity: Granularity, layout: str
) -> None:
    rows = data.draw(st.integers(1, 12))
    x = floats(rows, 3, 4, seed=rows, dtype=dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))
    order = data.draw(st.permutations(range(rows)))
    whole = seen(MinMaxObserver(granularity=granularity), x)
    pieces = seen(
        MinMaxObserver(granularity=granularity),
        *(in_layout(piece, layout) for piece in x[list(order)].tensor_split(cuts)),
    )
    assert_same_bits(pieces.min_val, whole.min_val)
    assert_same_bits(pieces.max_val, whole.max_val)
    assert pieces.num_batches.item() == len(cuts) + 1


@given(
    constant=st.floats(1e-3, 1.0),
    ends=st.lists(
        st.tuples(*[st.floats(-(2.0**126), 2.0**126, width=32)] * 2), min_size=1, max_size=6
    ),
)
def test_moving_average_is_the_recursion(constant: float, ends: list[tuple[float, float]]) -> None:
    observer = seen(MovingAverageMinMaxObserver(constant), *(torch.tensor(pair) for pair in ends))
    low, high = min(ends[0]), max(ends[0])
    for pair in ends[1:]:
        low = torch.tensor(low + constant * (min(pair) - low)).item()
        high = torch.tensor(high + constant * (max(pair) - high)).item()
    assert observer.min_val.item() == low
    assert observer.max_val.item() == high


def test_moving_average_of_the_widest_ranges_does_not_overflow() -> None:
    observer = MovingAverageMinMaxObserver(0.5)
    seen(observer, torch.tensor([FLT_MAX]), torch.tensor([-FLT_MAX]), torch.tensor([FLT_MAX]))
    assert observer.min_val.isfinite().all() and observer.max_val.isfinite().all()
    constant = seen(MovingAverageMinMaxObserver(0.01), *[torch.tensor([-0.3, 0.7])] * 50)
    assert (constant.min_val.item(), constant.max_val.item()) == (
        torch.tensor(-0.3).item(),
        torch.tensor(0.7).item(),
    )


@given(
    values=st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([NAN, INF, -INF])), min_size=1, max_size=12
    ),
    moving=st.booleans(),
)
def test_what_is_not_finite_is_counted_and_nothing_else(values: list[float], moving: bool) -> None:
    observer: Observer = MovingAverageMinMaxObserver() if moving else MinMaxObserver()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen(observer, torch.tensor(values))
    finite = [value for value in values if math.isfinite(value)]
    assert observer.nonfinite.item() == len(values) - len(finite)
    assert observer.min_val.item() == min(finite, default=INF)
    assert observer.max_val.item() == max(finite, default=-INF)


@pytest.mark.parametrize("make", [MinMaxObserver, MovingAverageMinMaxObserver])
def test_batches_without_finite_values_change_no_range(make: Callable[..., Observer]) -> None:
    observer = make(granularity=PerAxis(0))
    seen(observer, torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        seen(observer, torch.tensor([[NAN, INF], [3.0, -4.0]]))
    seen(observer, torch.empty(2, 0))
    assert observer.min_val.tolist() == [1.0, -4.0]
    assert observer.max_val.tolist() == [2.0, 3.0]


def test_no_data_gives_scale_one_and_says_so() -> None:
    observer = MinMaxObserver()
    with pytest.warns(RuntimeWarning, match="MinMaxObserver: calculate_qparams was called before"):
        scale, zero_point = observer.calculate_qparams()
    assert scale.tolist() == [1.0] and zero_point.tolist() == [0]
    unsigned = seen(MinMaxObserver(signed=False), torch.zeros(3))
    assert [value.tolist() for value in unsigned.calculate_qparams()] == [[1.0], [0]]


def test_reset() -> None:
    observer = seen(MinMaxObserver(granularity=PerAxis(0)), torch.tensor([[5.0], [-5.0]]))
    observer.reset()
    seen(observer, torch.tensor([[1.0], [2.0]]))
    assert observer.max_val.tolist() == [1.0, 2.0]
    assert observer.num_batches.item() == 1


# ---------------------------------------------------------------- reports


def test_each_layer_warns_once_and_by_name() -> None:
    model = nn.Sequential(MinMaxObserver(), MinMaxObserver(), MinMaxObserver())
    first = model[0]
    assert isinstance(first, Observer)
    first.set_layer_name("encoder.attention.query")
    x = torch.tensor([NAN, 1.0, INF])
    with pytest.warns(RuntimeWarning) as caught:
        model(x)
        model(x)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3
    assert messages[0].startswith(
        "MinMaxObserver of encoder.attention.query: 2 values were NaN or infinite"
    )
    assert "torchquant.report_nonfinite(model)" in messages[0]
    assert torchquant.report_nonfinite(model) == {"encoder.attention.query": 4, "1": 4, "2": 4}
    assert torchquant.report_nonfinite(nn.Linear(1, 1)) == {}


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(granularity: Granularity, assign: bool) -> None:
    observer = seen(MovingAverageMinMaxObserver(granularity=granularity), floats(2, 3, 8))
    saved = io.BytesIO()
    torch.save(observer.state_dict(), saved)
    saved.seek(0)
    other = MovingAverageMinMaxObserver(granularity=granularity)
    other.load_state_dict(torch.load(saved), assign=assign)
    more = floats(2, 3, 8, seed=1)
    seen(observer, more), seen(other, more)
    for name, value in observer.state_dict().items():
        assert_same_bits(other.state_dict()[name], value, name)


def test_a_converted_state_dict_loads_as_float32() -> None:
    observer = seen(MinMaxObserver(), torch.tensor([-1.0, 3.0]))
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in observer.state_dict().items()
    }
    for assign in (False, True):
        other = MinMaxObserver()
        other.load_state_dict(state, assign=assign)
        assert other.max_val.dtype == torch.float32
        assert other.max_val.tolist() == [3.0]


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_conversions_of_the_model_leave_the_state(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    observer = seen(MinMaxObserver(), torch.tensor([0.1, 0.3]))
    model = convert(nn.Sequential(nn.Linear(2, 2), observer))
    assert observer.max_val.dtype == torch.float32
    assert observer.max_val.item() == torch.tensor(0.3).item()
    assert next(model.parameters()).dtype != torch.float32


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: torch.load(_saved(module), weights_only=False)]
)
def test_copies_are_equal_and_independent(copied: Callable[[Observer], Observer]) -> None:
    observer = seen(MinMaxObserver(), torch.tensor([1.0]))
    other = copied(observer)
    seen(other, torch.tensor([9.0]))
    assert (observer.max_val.item(), other.max_val.item()) == (1.0, 9.0)


def _saved(module: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_another_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        observer = seen(MinMaxObserver(granularity=PerAxis(0)), torch.randn(2, 3))
    finally:
        torch.set_default_dtype(before)
    assert observer.min_val.dtype == torch.float32


def test_used_in_inference_mode_first() -> None:
    observer = MinMaxObserver(granularity=PerAxis(0))
    with torch.inference_mode():
        seen(observer, torch.ones(2, 2))
    seen(observer, torch.full((2, 2), 3.0))
    assert observer.max_val.tolist() == [3.0, 3.0]


# ---------------------------------------------------------------- inside training


def test_nothing_waits_for_the_device() -> None:
    observers = [MovingAverageMinMaxObserver(), MinMaxObserver(granularity=PerAxis(0))]
    for observer in observers:
        seen(observer, floats(4, 8))
        with NoWaiting():
            seen(observer, floats(4, 8, seed=1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_observes_once(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), MovingAverageMinMaxObserver(0.5), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    for seed in range(3):
        x = floats(2, 4, seed=seed).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        plain(x).sum().backward()
    for name, value in plain.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
    assert model.state_dict()["1.num_batches"].item() == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1)], ids=str)
def test_compiled(backend: str, granularity: Granularity) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Flatten(), MovingAverageMinMaxObserver(granularity=granularity))
    plain = copy.deepcopy(model)
    call = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        x = floats(2, 4, 2, seed=seed)
        assert_same_bits(call(x), plain(x))
    for name, value in plain.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


def test_compiled_inside_a_checkpoint_observes_once() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), MinMaxObserver())
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = floats(2, 4).requires_grad_()
    checkpoint(call, x, use_reentrant=False).sum().backward()
    assert model.state_dict()["1.num_batches"].item() == 1


# ---------------------------------------------------------------- processes


def test_two_processes_hold_the_range_of_the_whole_batch() -> None:
    batches = [floats(6, 5, seed=seed) for seed in range(4)]
    batches[2][0, 1] = NAN
    batches[3][5, 4] = -INF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = observe(batches)
    for rank, (results, grouped) in enumerate(in_processes(observe_in_process, batches)):
        for kind, state in whole.items():
            for name, value in state.items():
                assert_same_bits(results[kind][name], value, (rank, kind, name))
        mine = batches[0].chunk(2)[rank]
        for got, data in zip(grouped, (batches[0], mine), strict=True):
            assert got.tolist() == [data.min().item(), data.max().item()]


# ---------------------------------------------------------------- errors


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "bits": (
        lambda: MinMaxObserver(bits=9),
        ValueError,
        r"bits must be an integer from 2 to 8, got 9",
    ),
    "per_token": (
        lambda: MinMaxObserver(granularity=PerToken()),
        ValueError,
        r"MinMaxObserver: granularity must be PerTensor\(\), PerAxis\(axis\) or "
        r"PerGroup\(group_size\), got PerToken\(\); tokens differ .* inside the operators",
    ),
    "granularity": (
        lambda: MinMaxObserver(granularity="tensor"),  # type: ignore[arg-type]
        TypeError,
        r"MinMaxObserver: granularity must be .*, got str 'tensor'",
    ),
    "averaging_constant": (
        lambda: MovingAverageMinMaxObserver(0.0),
        ValueError,
        r"averaging_constant must be a number above 0 and at most 1, got 0.0; 0.01 averages",
    ),
    "process_group": (
        lambda: MinMaxObserver(process_group=3),
        TypeError,
        r"process_group must be None \(the default group\) or .*, got int 3",
    ),
    "integers": (
        lambda: MinMaxObserver()(torch.ones(2, dtype=torch.int64)),
        TypeError,
        r"MinMaxObserver: input must be float32, bfloat16 or float16, got int64 \[2\]; convert",
    ),
    "no_tensor": (
        lambda: MinMaxObserver()([1.0]),
        TypeError,
        r"MinMaxObserver: input must be a torch.Tensor, got list",
    ),
    "device": (
        lambda: MinMaxObserver()(torch.ones(2, device="meta")),
        ValueError,
        r"MinMaxObserver: input must be on the module's device cpu, got meta; move one of them",
    ),
    "other_channels": (
        lambda: seen(MinMaxObserver(granularity=PerAxis(0)), torch.ones(2, 3), torch.ones(3, 3)),
        ValueError,
        r"input must have ranges of shape \[2\] as before, got \[3, 3\], .* shape \[3\]; use one",
    ),
    "report": (
        lambda: torchquant.report_nonfinite(None),  # type: ignore[arg-type]
        TypeError,
        r"report_nonfinite: model must be an nn.Module, got NoneType",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
