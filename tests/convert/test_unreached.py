"""Layers that no batch reached: convert_ leaves them in float and says so."""

import copy

import pytest
import torch
from support.layers import unchanged
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    QATConfig,
    TrainingConfig,
    convert_,
    prepare_qat_,
    quantize_,
    verify,
)
from torchquant.nn import QATLinear, QuantizedLinear

STATIC = {
    "observed": QATConfig(activations="static"),
    "learned": QATConfig(activations="static", learned_activations=True),
    "w4_learned": QATConfig(
        weight_bits=4, learned_weights=True, activations="static", learned_activations=True
    ),
}
REASON = "left in float: no range, because no batch with values other than 0 reached it"


class Experts(nn.Module):
    """The router sends each batch to the experts that `used` names."""

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
            if relu
            else nn.Sequential(nn.Linear(64, 64))
            for _ in range(3)
        )
        self.used = [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.experts[i](x) for i in self.used]).sum(0)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))


def prepared(config: TrainingConfig, relu: bool = False) -> Experts:
    torch.manual_seed(1)
    model = Experts(relu)
    prepare_qat_(model, config)
    model.train()(batch()).square().mean().backward()
    return model


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_a_layer_without_a_range_is_left_in_float(config: TrainingConfig) -> None:
    model = prepared(config)
    trained = copy.deepcopy(model).eval()
    weight = model.experts[2][0].weight
    report = convert_(model)
    rows = {row.name: (row.action, row.reason) for row in report.layers}
    assert rows == {
        "experts.0.0": ("converted", ""),
        "experts.1.0": ("converted", ""),
        "experts.2.0": ("skipped", REASON),
    }
    assert report.notes == (
        "Left in float, because no batch reached them: experts.2.0. Run batches that reach them "
        "before convert_, or call quantize_(model) afterwards, which needs no ranges.",
    )
    assert type(model.experts[2][0]) is nn.Linear
    assert model.experts[2][0].weight is weight
    assert "2 converted (67 % of parameters), 1 skipped" in report.summary()
    report = verify(trained, model, [batch()])
    assert report.exact
    assert report.left_in_float == ("experts.2.0",)
    assert "Not compared, because left in float: experts.2.0" in report.summary()
    model.eval().used = [2]
    wanted = nn.functional.linear(batch(), weight, model.experts[2][0].bias)
    assert torch.equal(model(batch()), wanted)


def test_the_rest_can_be_quantized_afterwards() -> None:
    """The remedy of the note."""
    model = prepared(STATIC["observed"])
    convert_(model)
    report = quantize_(model)
    assert [row.name for row in report.quantized] == ["experts.2.0"]
    assert all(isinstance(expert[0], QuantizedLinear) for expert in model.experts)


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_strict_raises_before_anything_changes(config: TrainingConfig) -> None:
    model = prepared(config)
    with unchanged(model), pytest.raises(ValueError) as raised:
        convert_(model, strict=True)
    assert str(raised.value) == (
        "convert_: with strict=True a batch must have reached every prepared layer, got 1 without "
        "a range (experts.2.0); run batches that reach them, exclude them from prepare_qat_ with "
        "filter_fn, or pass strict=False to leave them in float"
    )
    model.used = [2]
    model.train()(batch())
    assert len(convert_(model, strict=True).changed) == 3


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_a_model_that_saw_no_batch_is_refused(config: TrainingConfig) -> None:
    """Without any range the calibration was forgotten; a float model would hide that."""
    model = Experts()
    prepare_qat_(model, config)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"convert_: experts\.0\.0 cannot be converted: .*"),
    ):
        convert_(model)


def test_a_diverged_layer_is_still_refused() -> None:
    model = prepared(STATIC["observed"])
    with torch.no_grad():
        model.experts[1][0].weight[0, 0] = float("nan")
    with unchanged(model), pytest.raises(ValueError, match=r"experts\.1\.0 cannot be converted"):
        convert_(model)


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_a_relu_after_the_layer_is_kept(config: TrainingConfig) -> None:
    model = prepared(config, relu=True)
    floating = copy.deepcopy(model.experts[2])
    torchquant.to_float_(floating)
    wanted = floating.eval()(batch())
    trained = copy.deepcopy(model).eval()
    convert_(model)
    assert verify(trained, model, [batch()]).exact
    model.eval()
    assert torch.equal(model(batch()), trained(batch()))
    assert torch.equal(model.experts[2](batch()), wanted)


def test_an_activation_that_was_no_module_cannot_be_left_in_float() -> None:
    config = STATIC["observed"]
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, config)
    model.train()(batch())
    model.append(QATLinear.from_float(nn.Linear(64, 64), config, activation="relu"))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"1 cannot be converted: .*'relu', which was not a module"),
    ):
        convert_(model)


@pytest.mark.parametrize("zeros", [2, 5])
def test_a_layer_that_saw_only_zeros(zeros: int) -> None:
    """DETR's decoder begins with zeros, so the first v_proj has no step however long it trains."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
            output: Tensor = self.out(self.v_proj(queries) + memory)
            return output

    torch.manual_seed(0)
    model = Decoder()
    prepare_qat_(model, STATIC["learned"])
    for seed in range(zeros):
        model.train()(torch.zeros(8, 64), batch(seed)).sum().backward()
    trained = copy.deepcopy(model).eval()
    wanted = trained(torch.zeros(8, 64), batch())  # evaluation does not need the step either
    report = convert_(model)
    assert [(row.name, row.action) for row in report.layers] == [
        ("v_proj", "skipped"),
        ("out", "converted"),
    ]
    assert torch.equal(model.eval()(torch.zeros(8, 64), batch()), wanted)
    assert verify(trained, model, [(torch.zeros(8, 64), batch())]).exact
    with pytest.raises(RuntimeError, match="the step is not initialised yet"):
        trained(batch(), batch())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_weights_need_no_batch(bits: int) -> None:
    """Their first step comes from the weight, before training and for a layer never reached."""
    config = QATConfig(weight_bits=bits, learned_weights=True)
    torch.manual_seed(1)
    model = Experts()
    prepare_qat_(model, config)
    never_run = copy.deepcopy(model)
    assert len(convert_(never_run, strict=True).changed) == 3
    evaluated = copy.deepcopy(model).eval()
    wanted = evaluated(batch())
    assert torch.equal(never_run.eval()(batch()), wanted)
    assert not bool(evaluated.experts[0][0].weight_quantizer.initialized), "nothing was written"
    model.train()(batch())  # the first step of training is the same one
    assert torch.equal(convert_weight(model), never_run.experts[0][0].qweight)


def convert_weight(model: nn.Module) -> Tensor:
    copied = copy.deepcopy(model)
    convert_(copied)
    qweight: Tensor = copied.experts[0][0].qweight
    return qweight


def test_the_observing_stage_needs_no_step_of_the_weight() -> None:
    model = Experts()
    prepare_qat_(model, STATIC["w4_learned"])
    torchquant.qat.observe_(model)
    model.used = [0, 1, 2]
    model.train()(batch())
    assert len(convert_(model, strict=True).changed) == 3


def test_weights_of_zeros() -> None:
    config = QATConfig(weight_bits=4, learned_weights=True)
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    prepare_qat_(model, config)
    model.train()(batch())
    wanted = model.eval()(batch())
    convert_(model)
    assert torch.equal(model(batch()), wanted)
    assert torch.equal(wanted, model[0].bias.expand(8, 64))


def test_the_first_report_of_the_findings() -> None:
    for config in (
        QATConfig(weight_bits=4, learned_weights=True),
        Int8StaticActivationInt8WeightConfig(),
    ):
        model = nn.Sequential(Experts())
        prepare_qat_(model, config)
        model(batch()).sum().backward()
        assert len(convert_(model).changed) >= 2
