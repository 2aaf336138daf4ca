"""quantize_ takes the integers and biases that an algorithm found for float layers."""

import copy

import pytest
import torch
from torch import nn

import torchquant
from torchquant import PerGroup, QuantizationConfig, Weights
from torchquant.convert.adjustment import Adjustment, adjust, adjustment_of, is_adjusted
from torchquant.convert.quantize import quantize_model

CONFIGS = {
    "int4 groups": torchquant.IntxWeightOnlyConfig(4, group_size=32),
    "int3 zero points": torchquant.IntxWeightOnlyConfig(3, group_size=32, symmetric=False),
    "int2 per channel": torchquant.IntxWeightOnlyConfig(2, group_size=None),
    "int4 beside int8": torchquant.Int8DynamicActivationIntxWeightConfig(4, group_size=48),
    "int8": torchquant.Int8DynamicActivationInt8WeightConfig(),
    "int8 zero points": QuantizationConfig(Weights(symmetric=False)),
}


def random_adjustment(layer: nn.Module, weights: Weights) -> Adjustment:
    """Integers that have nothing to do with the weight of the layer."""
    shape = layer.weight.shape
    qmin, qmax = weights.range
    scale: tuple[int, ...] = (shape[0],)
    if isinstance(weights.granularity, PerGroup):
        scale = (shape[0], -(-shape[1] // weights.granularity.group_size))
    zeros = None if weights.symmetric else torch.randint(qmin, qmax + 1, scale, dtype=torch.int8)
    qweight = torch.randint(qmin, qmax + 1, shape, dtype=torch.int8)
    return Adjustment(qweight, torch.rand(scale) + 0.5, weight_zero_point=zeros, found_by="gptq_")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_linear_layer_has_the_given_integers(config: QuantizationConfig) -> None:
    model = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 96))
    plain = copy.deepcopy(model)
    found = [random_adjustment(model[place], config.weights) for place in (0, 2)]
    adjust(model[0], found[0])
    adjust(model[2], found[1])
    report = torchquant.quantize_(model, config)
    for place, one in zip((0, 2), found, strict=True):
        layer = model[place]
        assert torch.equal(layer.integers, one.qweight)
        assert torch.equal(layer.weight_scale, one.weight_scale)
        if one.weight_zero_point is None:
            assert layer.weight_zero_point is None
        else:
            assert torch.equal(layer.weight_zero_point.to(torch.int8), one.weight_zero_point)
        assert not is_adjusted(layer)
    assert report == torchquant.quantize_(plain, config), "the report of rounding"
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_a_convolution_and_an_embedding_have_the_given_integers() -> None:
    config = torchquant.Int8DynamicActivationInt8WeightConfig()
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=2))
    found = random_adjustment(model[0], config.weights)
    adjust(model[0], found)
    torchquant.quantize_(model, config)
    assert torch.equal(model[0].integers, found.qweight)
    assert torch.equal(model[0].weight_scale, found.weight_scale)

    weights_only = torchquant.IntxWeightOnlyConfig(4, group_size=32)
    model = nn.Sequential(nn.Embedding(50, 72))
    found = random_adjustment(model[0], weights_only.weights)
    adjust(model[0], found)
    torchquant.quantize_(model, weights_only, filter_fn="0")
    assert torch.equal(model[0].integers, found.qweight)
    assert torch.equal(model[0].qweight_scale, found.weight_scale)


def test_a_corrected_bias_is_taken_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    rounded = copy.deepcopy(model)
    adjust(model[0], Adjustment(bias=torch.ones(64)))
    torchquant.quantize_(model)
    torchquant.quantize_(rounded)
    assert torch.equal(model[0].bias, torch.ones(64))
    assert torch.equal(model[0].integers, rounded[0].integers)


def test_a_float_layer_that_stays_keeps_what_was_found() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = CONFIGS["int8"]
    adjust(model[1], random_adjustment(model[1], config.weights))
    torchquant.quantize_(model, config, filter_fn="0")
    assert is_adjusted(model[1])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("bits", "found integers that are not all from -4 to 3, but the weights are int3 in"),
        ("group", "found scales of shape [64, 2] instead of [64, 4], but the weights are int4 in"),
        ("zero", "found integers without zero points, but the weights are int4 in groups of 32"),
        ("weight", "the weight must be the one for which gptq_ found integers, but it has changed"),
        ("order", "the weight must be the one for which gptq_ found integers, but it has changed"),
        ("shape", "the weight must be the one for which gptq_ found integers, but it has changed"),
        ("bias", "the bias must be the one that correct_bias_ corrected, but it has changed"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_change(change: str, problem: str) -> None:
    given = torchquant.IntxWeightOnlyConfig(4, group_size=32)
    config = {
        "bits": torchquant.IntxWeightOnlyConfig(3, group_size=32),
        "group": torchquant.IntxWeightOnlyConfig(4, group_size=16),
        "zero": torchquant.IntxWeightOnlyConfig(4, group_size=32, symmetric=False),
    }.get(change, given)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    found = random_adjustment(model[2], given.weights)
    bias = Adjustment(found.qweight, found.weight_scale, torch.ones(64), found_by="gptq_")
    adjust(model[2], bias)
    with torch.no_grad():
        if change == "weight":
            model[2].weight[3, 5] += 0.01
        elif change == "order":
            model[2].weight.copy_(model[2].weight.flip(1))
        elif change == "shape":
            model[2].weight = nn.Parameter(torch.randn(64, 128))
        elif change == "bias":
            model[2].bias.add_(1)
    layers = [*model]
    with pytest.raises(ValueError, match="quantize_: 2 cannot be quantized: ") as raised:
        torchquant.quantize_(model, config, filter_fn=["0", "2"])
    assert problem in str(raised.value)
    assert [*model] == layers, "the same modules"
    assert is_adjusted(model[2])


def test_a_tied_head_with_its_own_integers_shares_nothing() -> None:
    config = torchquant.IntxWeightOnlyConfig(4, group_size=32)
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    model[1].weight = model[0].weight
    found = random_adjustment(model[1], config.weights)
    adjust(model[1], found)
    torchquant.quantize_(model, config)
    assert torch.equal(model[1].integers, found.qweight)
    assert not torch.equal(model[0].integers, found.qweight)


def test_a_verb_finds_integers_after_the_plan() -> None:
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    config = CONFIGS["int4 groups"]
    found: dict[str, Adjustment] = {}

    def find(steps: list) -> None:
        for step in steps:
            found[step.name] = random_adjustment(step.module, step.config.weights)
            adjust(step.module, found[step.name])

    quantize_model("verb", model, config, None, False, None, None, find)
    assert "self_attn.q_proj" in found
    for name, one in found.items():
        assert torch.equal(model.get_submodule(name).integers, one.qweight), name


def test_a_verb_that_fails_leaves_the_model() -> None:
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    modules = dict(model.named_modules())

    def find(steps: list) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model("verb", model, CONFIGS["int8"], None, False, None, None, find)
    assert dict(model.named_modules()) == modules


def test_a_message_starts_with_the_verb() -> None:
    with pytest.raises(TypeError, match=r"^verb: config must be a torchquant configuration"):
        quantize_model("verb", nn.Sequential(nn.Linear(4, 4)), 4, None, False, None, None)
    static = torchquant.Int8StaticActivationInt8WeightConfig()
    with pytest.raises(ValueError, match=r"^verb: config must have dynamic activations"):
        quantize_model("verb", nn.Sequential(nn.Linear(4, 4)), static, None, False, None, None)


def test_an_adjustment_of_before_stays_readable() -> None:
    layer = nn.Linear(64, 64)
    adjust(layer, random_adjustment(layer, Weights()))
    assert adjustment_of(layer).found_by == "gptq_"
    assert adjustment_of(layer).seen.shape == (64,)


class Transposed(nn.Module):
    """A linear layer of another class, whose weight is [inputs, outputs], as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_a_layer_of_another_class_has_the_given_integers() -> None:
    config = CONFIGS["int4 groups"]
    model = nn.Sequential(Transposed(64, 96))
    qweight = torch.randint(-8, 8, (96, 64), dtype=torch.int8)
    adjust(model[0], Adjustment(qweight, torch.rand(96, 2), found_by="gptq_"))
    torchquant.quantize_(model, config)
    assert torch.equal(model[0].integers, qweight)
    assert not is_adjusted(model[0])
    assert not is_adjusted(torchquant.to_float_(model) and model[0])


@pytest.mark.parametrize("alike", [True, False])
def test_tied_layers_share_a_weight_if_their_integers_are_the_same(alike: bool) -> None:
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    model[1].weight = model[0].weight
    config = CONFIGS["int4 groups"]
    found = random_adjustment(model[1], config.weights)
    adjust(model[1], found)
    if alike:
        adjust(model[0], found)
    report = torchquant.quantize_(model, config)
    assert (model[0].packed is model[1].packed) is alike
    relation = "shares its weight with" if alike else "untied from"
    for name in "01":
        assert report[name].reason.startswith(relation)
    assert any("One quantized weight" in note for note in report.notes) is alike
