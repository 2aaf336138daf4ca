"""quantize_: layers that stay in float, and the reasons in the report."""

import warnings
from collections.abc import Callable

import pytest
from support.float_models import Classifier, Conv1D, LanguageModel, Subclass, with_nan
from support.layers import outcome, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from torchquant import quantize_
from torchquant.nn.float_linear import too_small


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 64))


def with_forward() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


COMPUTED = "weight computed from other tensors (weight_norm, spectral_norm, pruning)"

UNQUANTIZABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (
        lambda: Subclass(64, 64),
        "Subclass (subclass of nn.Linear: it does not compute x @ weight.T + bias)",
    ),
    "lazy": (
        lambda: nn.LazyLinear(64),
        "LazyLinear (subclass of nn.Linear: its parameters have no values yet)",
    ),
    "conv1d": (
        lambda: Conv1D(128, 64),
        "Conv1D (not an nn.Linear: its forward takes (*input) instead of one tensor)",
    ),
    "float64": (lambda: nn.Linear(64, 64).double(), "weight of dtype float64"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
        "ParametrizedLinear (parametrized)",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(64, 64)),
        "ParametrizedLinear (parametrized)",
    ),
    "old_weight_norm": (old_weight_norm, COMPUTED),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(64, 64)), COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), COMPUTED),
    "forward": (with_forward, "forward replaced on the instance"),
    "nan": (
        with_nan,
        "its weight holds NaN or infinity; check the checkpoint",
    ),
    "meta": (
        lambda: nn.Linear(64, 64, device="meta"),
        "on the meta device, without values; load its weights first",
    ),
    "empty": (lambda: nn.Linear(64, 0), "weight of shape [0, 64]"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), UNQUANTIZABLE.values(), ids=UNQUANTIZABLE)
def test_what_cannot_be_quantized_is_reported(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": make()})
    kept = model["bad"]
    report = quantize_(model)
    assert outcome(report) == {"good": "quantized", "bad": f"skipped: {reason}"}
    assert model["bad"] is kept
    (bad,) = report.skipped
    assert bad.bytes_before == bad.bytes_after


def test_another_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    monkeypatch.setattr(Tensor, "is_cpu", False)  # simulates another device
    report = quantize_(model)
    monkeypatch.undo()
    assert outcome(report) == {"0": "skipped: on cpu; move it to the CPU or to a CUDA device first"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("make", "reason"), UNQUANTIZABLE.values(), ids=UNQUANTIZABLE)
def test_strict_raises_before_any_change(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": make(), "last": nn.Linear(64, 64)})
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as raised:
        quantize_(model, strict=True)
    assert str(raised.value) == (
        "quantize_: with strict=True every selected layer must be quantizable, got 1 that cannot "
        f"be quantized (bad: {reason}); exclude them with filter_fn, or pass strict=False to leave "
        "them in float"
    )
    assert dict(model.named_modules()) == modules
    report = quantize_(model, filter_fn=lambda _, name: name != "bad", strict=True)
    assert [layer.name for layer in report.quantized] == ["good", "last"]


def test_strict_does_not_change_results() -> None:
    model = nn.Sequential(Classifier(), LanguageModel(), Subclass(64, 64))
    with unchanged(model), pytest.raises(ValueError, match=r"2: Subclass \(subclass"):
        quantize_(model, strict=True)


def test_strict_accepts_layers_that_are_too_small() -> None:
    report = quantize_(Classifier(), strict=True)
    assert outcome(report)["head"] == "skipped: too small to benefit"


@pytest.mark.parametrize(
    ("out_features", "in_features", "small"),
    [
        (16, 256, False),
        (15, 4096, True),
        (128, 32, False),
        (4096, 31, True),
        (64, 64, False),
        (64, 63, True),
        (1, 1, True),
    ],
)
def test_too_small_depends_on_the_shape(out_features: int, in_features: int, small: bool) -> None:
    assert too_small(nn.Linear(in_features, out_features, device="meta")) is small
    model = nn.Sequential(nn.Linear(in_features, out_features))
    expected = "skipped: too small to benefit" if small else "quantized"
    assert outcome(quantize_(model)) == {"0": expected}
