"""quantize_: filter_fn, arguments that are refused, and models without layers to convert."""

from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.float_models import Classifier, Conv1D, Subclass
from support.layers import ASYMMETRIC, expected_output, outcome, unchanged
from torch import nn

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import quantize_
from torchquant.nn import QuantizedLinear


def test_filter_fn_is_called_with_every_linear_like_layer() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(64, 64),
            "b": Subclass(64, 64),
            "c": Conv1D(64, 64),
            "d": nn.ReLU(),
            "e": nn.Linear(2, 2),
        }
    )
    seen: dict[str, nn.Module] = {}
    report = quantize_(model, filter_fn=lambda module, name: bool(seen.update({name: module})))
    assert seen == {name: model[name] for name in "abce"}
    assert set(outcome(report).values()) == {"skipped: filter_fn"}


def test_filter_fn_overrides_too_small() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1, bias=False))
    report = quantize_(model, filter_fn=lambda module, name: True)
    assert set(outcome(report).values()) == {"quantized"}
    x = floats(5, 4)
    assert_same_bits(model(x), expected_output(model[1], expected_output(model[0], x)))


def test_filter_fn_does_not_override_refusals() -> None:
    model = nn.Sequential(Subclass(64, 64))
    report = quantize_(model, filter_fn=lambda module, name: True)
    assert outcome(report) == {
        "0": "skipped: Subclass (subclass of nn.Linear: it does not compute x @ weight.T + bias)"
    }


@pytest.mark.parametrize(
    ("answer", "quantized"),
    [(1, True), ("yes", True), (None, False), (0, False), (torch.tensor(True), True)],
    ids=["one", "text", "none", "zero", "tensor"],
)
def test_filter_fn_may_return_any_truth_value(answer: Any, quantized: bool) -> None:
    report = quantize_(nn.Sequential(nn.Linear(64, 64)), filter_fn=lambda module, name: answer)
    assert bool(report.quantized) is quantized


def test_filter_fn_is_called_with_each_name_of_a_shared_layer() -> None:
    linear = nn.Linear(64, 64)
    for wanted in ("first", "second"):
        model = nn.ModuleDict({"first": linear, "second": linear})
        report = quantize_(model, filter_fn=lambda module, name, wanted=wanted: name == wanted)
        assert outcome(report) == {"first": "quantized: also at second"}


def test_a_filter_fn_that_raises_does_not_change_the_model() -> None:
    def raise_at_last(module: nn.Module, name: str) -> bool:
        if name == "head":
            raise RuntimeError("mine")
        return True

    model = Classifier()
    with unchanged(model), pytest.raises(RuntimeError, match="mine"):
        quantize_(model, filter_fn=raise_at_last)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (nn.Linear(64, 64),),
            ValueError,
            "quantize_: model must contain layers, got a bare Linear, which cannot be replaced in "
            "place; use torchquant.nn.QuantizedLinear.from_float(linear, config)",
        ),
        (
            (QuantizedLinear(64, 64),),
            ValueError,
            "quantize_: model must contain layers, got a bare QuantizedLinear, which is quantized "
            "already; use it as it is",
        ),
        (({},), TypeError, "quantize_: model must be an nn.Module, got dict"),
        (
            (nn.Sequential(), "int8"),
            TypeError,
            "quantize_: config must be a torchquant configuration such as "
            "Int8DynamicActivationInt8WeightConfig(), got 'int8'",
        ),
        (
            (nn.Sequential(), Config),
            TypeError,
            "quantize_: config must be a torchquant configuration such as "
            f"Int8DynamicActivationInt8WeightConfig(), got {Config.__name__} without parentheses; "
            f"call it: {Config.__name__}()",
        ),
        (
            (nn.Sequential(), None, [3]),
            TypeError,
            "quantize_: filter_fn must be a function of (module, name), a name pattern such as "
            "'encoder.*', or a list of patterns, got [3]",
        ),
        (
            (nn.Sequential(), None, lambda module: True),
            TypeError,
            "quantize_: filter_fn must be a function of (module, name), got one of (module)",
        ),
    ],
    ids=["linear", "quantized", "dict", "text", "class", "list", "lambda"],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        quantize_(*arguments)
    assert str(raised.value) == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_is_refused() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(TypeError, match="quantize the model from which it was made"):
        quantize_(model)
    report = quantize_(nn.Sequential(model, nn.Linear(64, 64)))
    assert outcome(report) == {"1": "quantized"}


def test_a_model_without_layers_of_a_kind() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU())
    with unchanged(model):
        report = quantize_(model, strict=True)
    assert report.layers == ()
    assert report.bytes_before == report.bytes_after == (8 * 3 * 9 + 8) * 4
    assert report.notes == (
        "The model has no linear, conv1d or conv2d layers; there was nothing to quantize.",
    )


def test_quantizing_twice_changes_nothing_and_is_reported() -> None:
    model = Classifier()
    first = quantize_(model)
    with unchanged(model):
        second = quantize_(model, strict=True)
        other = quantize_(model, ASYMMETRIC, filter_fn=lambda module, name: name != "head")
    assert outcome(second) == {
        name: "skipped: too small to benefit" if name == "head" else "skipped: already quantized"
        for name in outcome(first)
    }
    assert second.bytes_before == second.bytes_after == first.bytes_after
    assert outcome(other)["blocks.0.mlp.up"] == (
        "skipped: already quantized, with another configuration"
    )
