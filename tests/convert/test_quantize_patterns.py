"""quantize_ and prepare_qat_: name patterns, configurations by pattern, and strict."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from support.float_models import Classifier, LanguageModel, Subclass
from support.layers import ASYMMETRIC, outcome, unchanged
from torch import nn

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QATConfig, QuantizationReport, prepare_qat_, quantize_
from torchquant.nn import QATLinear, QuantizedLinear

Verb = Callable[..., QuantizationReport]
VERBS: dict[str, Verb] = {"quantize_": quantize_, "prepare_qat_": prepare_qat_}


def model() -> nn.ModuleDict:
    encoder = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(64, 64), "small": nn.Linear(4, 4)}) for _ in range(3)
    )
    parts = {"encoder": encoder, "stem": nn.ConvTranspose2d(3, 8, 3), "norm": nn.LayerNorm(64)}
    return nn.ModuleDict({**parts, "head": nn.Linear(64, 64), "a[0]": nn.Linear(64, 64)})


def changed(report: QuantizationReport) -> list[str]:
    return [row.name for row in report.changed]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("encoder.*.q_proj", ["encoder.0.q_proj", "encoder.1.q_proj", "encoder.2.q_proj"]),
        (["encoder.1.*", "head"], ["encoder.1.q_proj", "encoder.1.small", "head"]),
        (["encoder.*", "!*.small", "!encoder.0.*"], ["encoder.1.q_proj", "encoder.2.q_proj"]),
        # exclusions only: what None selects, without them, and so without small layers
        ("!encoder.*", ["head", "a[0]"]),
        (("!head", "!encoder.[02].q_proj"), ["encoder.1.q_proj", "a[0]"]),
        ("a[0]", ["a[0]"]),
        ("*small", ["encoder.0.small", "encoder.1.small", "encoder.2.small"]),
    ],
    ids=str,
)
def test_patterns_select(verb: Verb, patterns: Any, names: list[str]) -> None:
    assert changed(verb(model(), filter_fn=patterns, strict=True)) == names


def test_a_pattern_matches_any_name_of_a_shared_layer() -> None:
    linear = nn.Linear(64, 64)
    shared = nn.ModuleDict({"first": linear, "second": linear})
    assert changed(quantize_(shared, filter_fn="second")) == ["first"]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"filter_fn": "encoder"},
            "the pattern 'encoder' of filter_fn matches no module with parameters; the layers "
            "inside encoder are 'encoder.*'",
        ),
        (
            {"filter_fn": ["head", "encoder.*.q_prj"]},
            "the pattern 'encoder.*.q_prj' of filter_fn matches no module with parameters; did you "
            "mean 'encoder.*.q_proj'?",
        ),
        (
            {"filter_fn": "!haed"},
            "the pattern 'haed' of filter_fn matches no module with parameters; did you mean "
            "'head'?",
        ),
        ({"filter_fn": lambda module, name: name == "haed"}, "filter_fn selects no layer"),
        ({"filter_fn": ["head", "!head"]}, "filter_fn selects no layer"),
        (
            {"config": {"xyz": None, "*": Config()}},
            "the pattern 'xyz' of config matches no module with parameters",
        ),
        (
            {"config": {"*": Config(), "head": None}},
            "the pattern 'head' of config decides about no layer: earlier patterns match its "
            "layers, or they belong to no kind",
        ),
    ],
    ids=["container", "typo", "excluded", "function", "nothing left", "key", "shadowed"],
)
def test_what_matches_nothing(verb: Verb, arguments: dict[str, Any], problem: str) -> None:
    net = model()
    with unchanged(net), pytest.raises(ValueError) as raised:
        verb(net, **arguments, strict=True)
    assert str(raised.value) == (
        f"{verb.__name__}: with strict=True the arguments must select layers of the model, but "
        f"{problem}; correct them, or pass strict=False"
    )
    report = verb(net, **arguments)
    assert f"{problem[0].upper()}{problem[1:]}." in report.notes


SELECTS_A_CONVOLUTION: dict[str, Any] = {
    "type": lambda module, name: isinstance(module, nn.ConvTranspose2d),
    "types": lambda module, name: isinstance(module, (nn.Linear, nn.ConvTranspose2d)),
    "name": lambda module, name: name in ("stem", "head"),
    "pattern": "stem",
    "patterns": ["head", "ste*", "norm"],
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("chosen", SELECTS_A_CONVOLUTION.values(), ids=SELECTS_A_CONVOLUTION)
def test_a_selected_convolution(verb: Verb, chosen: Any) -> None:
    net = model()
    with unchanged(net), pytest.raises(ValueError) as raised:
        verb(net, filter_fn=chosen, strict=True)
    assert str(raised.value) == (
        f"{verb.__name__}: with strict=True every selected layer must be quantizable, got 1 that "
        "cannot be quantized (stem: ConvTranspose2d, no integer path yet; selected by filter_fn); "
        "exclude them with filter_fn, or pass strict=False to leave them in float"
    )
    report = verb(net, filter_fn=chosen)
    assert report["stem"].reason == "ConvTranspose2d, no integer path yet; selected by filter_fn"
    assert "selected" not in report["norm"].reason


@pytest.mark.parametrize(
    "chosen",
    [
        lambda module, name: True,
        lambda module, name: name != "head",
        lambda module, name: module.out_features > 10,  # no attribute of a convolution
        lambda module, name: isinstance(module, nn.Linear),
        ["*", "!head"],
        "!head",
    ],
    ids=["all", "but one", "attribute", "linear", "star", "exclusion"],
)
def test_a_filter_that_asks_for_no_convolution_in_particular(chosen: Any) -> None:
    report = quantize_(model(), filter_fn=chosen, strict=True)
    assert report["stem"].reason == "ConvTranspose2d, no integer path yet"
    assert len(report.quantized) >= 4


def test_configurations_by_pattern() -> None:
    net = model()
    configs = {"encoder.0.*": None, "encoder.*": ASYMMETRIC, "head": Config()}
    report = quantize_(net, configs, strict=True)
    assert outcome(report) == {
        "encoder.0.q_proj": "skipped: None for the pattern 'encoder.0.*'",
        "encoder.0.small": "skipped: None for the pattern 'encoder.0.*'",
        "encoder.1.q_proj": "quantized: as 'encoder.*'",
        "encoder.1.small": "skipped: too small to benefit",
        "encoder.2.q_proj": "quantized: as 'encoder.*'",
        "encoder.2.small": "skipped: too small to benefit",
        "head": "quantized: as 'head'",
        "a[0]": "skipped: no pattern of config matches",
    }
    assert net["encoder"][1]["q_proj"].config == ASYMMETRIC
    assert net["head"].config == Config()
    again = quantize_(net, {"head": ASYMMETRIC, "encoder.2.q_proj": ASYMMETRIC})
    assert outcome(again)["head"] == "skipped: already quantized, with another configuration"
    assert outcome(again)["encoder.2.q_proj"] == "skipped: already quantized"


def test_a_small_layer_named_in_full_is_quantized() -> None:
    report = quantize_(model(), {"encoder.0.small": Config()})
    assert changed(report) == ["encoder.0.small"]


def test_a_filter_and_configurations_by_pattern() -> None:
    report = quantize_(model(), {"encoder.*": Config(), "*": ASYMMETRIC}, ["*.q_proj", "head"])
    assert outcome(report)["head"] == "quantized: as '*'"
    assert outcome(report)["encoder.0.small"] == "skipped: filter_fn"


def test_training_configurations_by_pattern() -> None:
    net = Classifier()
    four = QATConfig(weight_bits=4, edge_bits=8)
    report = prepare_qat_(net, {"blocks.0.*": four, "blocks.1.mlp.up": Config()})
    assert isinstance(net.blocks[0].mlp["up"], QATLinear)
    assert net.blocks[0].mlp["down"].config.weights.bits == 4
    assert net.blocks[1].mlp["up"].config.weights.bits == 8
    assert outcome(report)["head"] == "skipped: no pattern of config matches"


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({}, ValueError, "quantize_: config must have at least one pattern, got {}"),
        (
            {"!head": Config()},
            ValueError,
            "quantize_: a pattern of config must be a name or a glob such as 'encoder.*', got "
            "'!head'; the value None leaves layers in float",
        ),
        ({"head": "int8"}, TypeError, "config must be a torchquant configuration"),
        ({3: Config()}, ValueError, "got 3; the value None leaves layers in float"),
    ],
    ids=["empty", "exclusion", "text", "number"],
)
def test_bad_configurations(config: Mapping[Any, Any], error: type[Exception], text: str) -> None:
    net = model()
    with unchanged(net), pytest.raises(error) as raised:
        quantize_(net, config)
    assert text in str(raised.value)


@pytest.mark.parametrize("patterns", [[], "", ["head", "!"]], ids=str)
def test_empty_patterns(patterns: Any) -> None:
    with pytest.raises(ValueError, match="filter_fn must have patterns that are not empty, got"):
        quantize_(model(), filter_fn=patterns)


def test_strict_lists_everything_at_once() -> None:
    net = nn.ModuleDict({"sub": Subclass(64, 64), "conv": nn.Conv3d(1, 1, 1)})
    with pytest.raises(ValueError, match=r"got 2 .*sub: Subclass.*; conv: Conv3d, no integer"):
        quantize_(net, filter_fn=["sub", "conv"], strict=True)


def test_a_filter_does_not_stop_a_second_call() -> None:
    net = LanguageModel()
    quantize_(net, filter_fn="body", strict=True)
    assert isinstance(net.body, QuantizedLinear)
    assert quantize_(net, filter_fn="body", strict=True)["body"].reason == "already quantized"
