"""calibrate: batches of every structure, limits, modes, and failures that change nothing."""

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support import floats
from support.calibrated_models import hooks_of, mlp, observer_states, rows
from support.layers import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchquant import calibrate, convert_, prepare_
from torchquant.convert.batches import structure
from torchquant.report import progress

Point = collections.namedtuple("Point", ["x", "y"])


class Two(nn.Module):
    """Takes two arguments, the second one only if ``optional`` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
        self.calls: list[tuple[Any, Any]] = []

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        self.calls.append((x, scale))
        out: Tensor = self.body(x)
        return out


class Required(Two):
    def forward(self, x: Tensor, scale: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, scale)


class Any_(Two):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


def prepared(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    model = mlp() if model is None else model
    prepare_(model)
    return model


def numbers(loader: Any, model: Any = None, **options: Any) -> tuple[int, int | None]:
    report = calibrate(model or prepared(), loader, **options)
    return report.batches, report.samples


X = floats(6, 64)
LABELS = torch.arange(6)


@pytest.mark.parametrize(
    "loader",
    [
        [X, X],
        [(X, LABELS), (X, LABELS)],
        [[X, LABELS, "name"], [X]],
        [Point(X, LABELS), Point(X, LABELS)],
        [{"input": X}, collections.OrderedDict(input=X)],
        (batch for batch in [X, X]),
        DataLoader(TensorDataset(torch.cat([X, X]), torch.cat([LABELS, LABELS])), batch_size=6),
    ],
    ids=["tensors", "pairs", "lists", "namedtuples", "dictionaries", "generator", "DataLoader"],
)
def test_loaders_of_every_structure(loader: Any) -> None:
    model = prepared()
    assert numbers(loader, model) == (2, 12)
    expected = prepared()
    calibrate(expected, [X, X])
    assert str(observer_states(model)) == str(observer_states(expected))


def test_arguments_by_position_and_by_name() -> None:
    model = prepared(Required())
    assert numbers([(X, 2.0, LABELS)], model) == (1, 6)
    assert model.calls[-1][1] == 2.0
    calibrate(model, [{"x": X, "scale": 3.0}])
    assert model.calls[-1][1] == 3.0
    model = prepared(Two())
    calibrate(model, [(X,), {"x": X}, X])
    assert [scale for _, scale in model.calls] == [None] * 3
    model = prepared(Any_())
    calibrate(model, [(X,), {"x": X}, X])
    with pytest.raises(ValueError, match="any number of arguments by position"):
        calibrate(model, [(X, 1.0)])
    calibrate(model, [(X, 1.0)], forward=lambda model, batch: model(*batch))
    assert model.calls[-1][1] == 1.0


@pytest.mark.parametrize(
    ("model", "batch", "error", "parts"),
    [
        (
            Two,
            (X, LABELS),
            ValueError,
            [
                "a tuple of (a float32 tensor [6, 64], an int64 tensor [6])",
                "1 to 2 arguments by position",
                "model(batch[0])",
            ],
        ),
        (
            Required,
            (X,),
            ValueError,
            ["forward(x, scale), ", "missing a required argument: 'scale'"],
        ),
        (
            Two,
            {"x": X, "labels": LABELS},
            ValueError,
            ["a dict of {x: a float32 tensor [6, 64], labels: an int64 tensor [6]}", "'labels'"],
        ),
        (mlp, "text", TypeError, ["a tensor, a tuple, a list or a dictionary, got a str"]),
        (mlp, None, TypeError, ["got None"]),
        (mlp, 3, TypeError, ["got an int", "forward=lambda model, batch"]),
        (mlp, np.zeros((2, 64)), TypeError, ["got a ndarray of float64 [2, 64]"]),
        (mlp, (), ValueError, ["got a tuple of ()", "missing a required argument: 'input'"]),
    ],
)
def test_batches_that_do_not_fit_show_their_structure(
    model: Any, batch: Any, error: type[Exception], parts: list[str]
) -> None:
    prepared_model = prepared(model())
    before = observer_states(prepared_model)
    with unchanged(prepared_model), pytest.raises(error) as raised:
        calibrate(prepared_model, [batch])
    assert str(raised.value).startswith("calibrate: ")
    for part in [*parts, "forward="]:
        assert part in str(raised.value)
    assert str(observer_states(prepared_model)) == str(before)


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (X, r"a float32 tensor \[6, 64\]"),
        ({"x": X}, "a dict of"),
        ("data", "a str"),
        (3, "an int"),
        (None, "None"),
        (mlp, "a function"),
    ],
)
def test_what_is_no_loader(loader: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"loader must be an iterable of batches.*got {got}"):
        calibrate(prepared(), loader)


def test_limits() -> None:
    taken: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index in range(100):
            taken.append(index)
            yield X

    assert numbers(batches(), limit=3) == (3, 18)
    assert taken == [0, 1, 2]
    assert numbers([X, X], limit=3) == (2, 12)
    for limit in (0, -1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="limit must be None or a positive number of batches"):
            calibrate(prepared(), [X], limit=limit)  # type: ignore[arg-type]


def test_streams_without_a_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X)

    assert numbers(DataLoader(Stream(), batch_size=4)) == (2, 6)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader must have batches, got none"),
        (iter([]), "an iterator can be used only once"),
        (
            [torch.zeros(3, 64)],
            "other than 0, got 1 without any (0: it saw only zeros",
        ),
        ([torch.full((3, 64), torch.nan)], "0: it saw no finite values"),
        ([torch.empty(0, 64)], "0: it saw only empty tensors"),
    ],
)
def test_calibration_without_usable_data(loader: Any, message: str) -> None:
    model = prepared()
    model[2].bias = None
    model[0].bias = None
    before = observer_states(model)
    with unchanged(model), pytest.raises(ValueError) as raised:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrate(model, loader)
    assert message in str(raised.value)
    assert str(observer_states(model)) == str(before)
    calibrate(model, [X])
    convert_(model)


def test_the_model_runs_in_evaluation_mode_without_gradients() -> None:
    model = prepared(Two()).train()
    model.body[1].eval()
    seen: list[Any] = []

    def forward(inner: nn.Module, batch: Tensor) -> None:
        seen.append((inner is model, [m.training for m in model.modules()]))
        assert not inner(batch).requires_grad

    with unchanged(model):
        calibrate(model, [X], forward=forward)
    assert seen == [(True, [False] * 5)]
    assert model.training and not model.body[1].training
    states = observer_states(model)
    model(X * 100)  # only calibrate observes
    assert str(observer_states(model)) == str(states)


def test_failures_in_the_middle_change_nothing() -> None:
    model = prepared().train()
    calibrate(model, [X])
    before = observer_states(model)

    def batches() -> Iterator[Tensor]:
        yield X * 100
        raise OSError("the disk is gone")

    with unchanged(model), pytest.raises(OSError, match="the disk is gone"):
        calibrate(model, batches())
    with unchanged(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(model, [X * 100, floats(2, 3)])
    assert str(observer_states(model)) == str(before)
    assert not any(hook.observing for hook in hooks_of(model).values())
    with pytest.raises(TypeError, match="forward must be None or a function"):
        calibrate(model, [X], forward=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shown", "bar"), [(True, True), (None, True), (False, False)])
def test_progress(
    shown: bool | None,
    bar: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: self.stderr))
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    calibrate(prepared(), (batch for batch in rows()), progress=shown)
    assert ("calibrate" in capsys.readouterr().err) is bar


def test_compiled_and_wrapped_models() -> None:
    model = prepared()
    calibrate(torch.compile(model, backend="eager"), [(X, LABELS)])
    states = observer_states(model)
    again = prepared()
    calibrate(nn.DataParallel(again), [(X, LABELS)])
    assert str(list(observer_states(again).values())) == str(list(states.values()))


def test_reports_are_data() -> None:
    report = calibrate(prepared(), [X])
    data = report.to_dict()
    assert data["layers"][0]["name"] == "0" and data["batches"] == 1
    assert "NaN" not in report.to_json()
    assert "observer" in str(report) and "Histogram" in str(report)
    assert report["2"].kind == "Linear"


def test_structures_in_words() -> None:
    deep = [[[[X]]]]
    assert structure(deep) == "a list of (a list of (a list of (a list with 1 elements)))"
    assert structure([1] * 9).endswith("an int, and 3 more)")
