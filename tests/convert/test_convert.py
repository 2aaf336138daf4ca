"""convert_ and to_float_ of prepared models, and prepared models together with quantize_."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import outcome, unchanged
from support.qat_models import CONFIGS, LEARNED, STATIC, Classifier, tokens, train
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    QATConfig,
    TrainingConfig,
    convert_,
    prepare_qat_,
    qat,
    quantize_,
    to_float_,
    verify,
)
from torchquant.graph.modules import tensor_bytes
from torchquant.nn import QATLinear, QuantizedLinear
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import Observer


def test_layers_on_one_tensor_are_computed_together() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(64, 128), nn.Linear(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.gate(x) * self.up(x)
            return result

    for config, line in (
        (QATConfig(), "fused: gate, up: one product"),
        (STATIC, "not fused: gate, up: "),
    ):
        model = Gated()
        prepare_qat_(model, config)
        x = floats(4, 64)
        model(x).sum().backward()
        trained = copy.deepcopy(model)
        (fusion,) = convert_(model).fusions
        assert str(fusion).startswith(line)
        with torch.no_grad():
            assert_same_bits(model(x), trained.eval()(x))
        assert verify(trained, model, [x]).exact


def test_convert_without_prepared_layers() -> None:
    model = Classifier()
    with unchanged(model), pytest.raises(ValueError) as raised:
        convert_(model)
    assert str(raised.value) == (
        "convert_: model must hold layers that prepare_ or prepare_qat_ prepared, got none; call "
        "prepare_(model, config) and calibrate(model, loader), or prepare_qat_(model, config) and "
        "train, or quantize_(model, config) to quantize without both"
    )
    with pytest.raises(ValueError, match=r"a bare QATLinear, .*use its to_quantized\(\)"):
        convert_(QATLinear(64, 64))


def test_convert_before_a_range_was_observed() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    with unchanged(model), pytest.raises(ValueError, match=r"blocks\.0\.up cannot be converted: "):
        convert_(model)


def test_calibration_alone_is_static_quantization() -> None:
    model = Classifier().train()
    expected = model(tokens())
    prepare_qat_(model, Int8StaticActivationInt8WeightConfig())
    qat.observe_(model)
    for seed in range(4):
        model(tokens(seed))
    report = convert_(model)
    (note,) = report.notes
    assert note.startswith("Converted in the stage 'observe', in which layers compute in float: ")
    got = model.eval()(tokens())
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_converted_model_is_saved_and_loaded(config: TrainingConfig, tmp_path: Path) -> None:
    model = Classifier()
    prepare_qat_(model, config)
    train(model)
    convert_(model)
    torchquant.save(model, tmp_path / "model.safetensors")
    loaded = torchquant.load(tmp_path / "model.safetensors", Classifier()).eval()
    assert_same_bits(loaded(tokens()), model(tokens()))


@pytest.mark.parametrize("bits", range(2, 9))
def test_learned_steps_use_the_least_integer_too(bits: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    prepare_qat_(model, QATConfig(weight_bits=bits, learned_weights=True))
    model.train()(floats(4, 64))
    with torch.no_grad():
        model[0].weight_quantizer.step.mul_(0.01)  # now many weights are outside the range
    trained = copy.deepcopy(model)
    convert_(model)
    assert model[0].integers.min() == -(2 ** (bits - 1))
    assert verify(trained, model, [floats(4, 64)]).exact


def test_no_float_weight_remains() -> None:
    model = Classifier()
    prepare_qat_(model, LEARNED["w4a4_learned"])
    train(model)
    report = convert_(model)
    assert report.bytes_after == tensor_bytes(model)
    assert {n.rpartition(".")[2] for n, _ in model.blocks.named_parameters()} == {"weight", "bias"}
    assert not [
        m for m in model.modules() if isinstance(m, (QATLinear, ObservedQuantizer, Observer))
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_to_float_gives_the_trained_parameters(config: TrainingConfig) -> None:
    model = Classifier()
    prepare_qat_(model, config)
    train(model)
    parameters = dict(model.named_parameters())
    report = to_float_(model)
    assert set(outcome(report).values()) == {"restored"}
    assert list(model.state_dict()) == list(Classifier().state_dict())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert type(model.blocks[0].relu) is nn.ReLU
    assert type(model.blocks[0].up) is nn.Linear
    assert not model.blocks[0].up.training


def test_to_float_of_a_quantized_model() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = floats(3, 64)
    expected = model(x)
    quantize_(model)
    to_float_(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.nn.functional.cosine_similarity(model(x), expected, dim=-1).min() > 0.99


def test_to_float_of_an_activation_that_was_never_a_module() -> None:
    layer = QuantizedLinear.from_float(nn.Linear(64, 64), activation="relu")
    model = nn.Sequential(nn.Linear(64, 64), layer)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="got 1, which was created with activation 'relu'"),
    ):
        to_float_(model)


def test_to_float_without_prepared_or_quantized_layers() -> None:
    model = Classifier()
    with unchanged(model):
        report = to_float_(model)
    assert report.notes == ("The model has no prepared or quantized layers; none was restored.",)
    with pytest.raises(ValueError, match=r"a bare QATLinear, .*use its to_float\(\)"):
        to_float_(QATLinear(64, 64))


def test_quantize_names_the_verbs_of_calibration_and_training() -> None:
    model = Classifier()
    with unchanged(model):
        three = r"prepare_\(model, config\), calibrate\(model, loader\) and convert_\(model\)"
        with pytest.raises(
            ValueError, match=rf"{three}, or train with prepare_qat_\(model, config"
        ):
            quantize_(model, Int8StaticActivationInt8WeightConfig())
        with pytest.raises(TypeError, match=r"prepare_qat_\(model, config\).*convert_\(model\)"):
            quantize_(model, QATConfig())  # type: ignore[arg-type]


def test_quantize_does_not_change_prepared_layers() -> None:
    model = Classifier()
    prepare_qat_(model)
    assert outcome(quantize_(model))["blocks.0.up"] == (
        "skipped: prepared for training; convert_(model) quantizes it"
    )
    convert_(model)
    assert outcome(prepare_qat_(model))["blocks.0.up"] == (
        "skipped: already quantized; to_float_(model) makes it trainable again"
    )


def test_without_training_the_result_is_that_of_quantize() -> None:
    model, other = Classifier().eval(), Classifier().eval()
    other.load_state_dict(model.state_dict())
    prepare_qat_(model)
    convert_(model)
    quantize_(other)
    assert_same_bits(model(tokens()), other(tokens()))


def test_a_copy_and_a_pickle_of_a_prepared_model(tmp_path: Path) -> None:
    model = Classifier()
    prepare_qat_(model, CONFIGS["w4a4_learned"])
    train(model)
    torch.save(model, tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert_same_bits(twin(tokens()), model(tokens()))


def test_the_public_names() -> None:
    names = {"prepare_qat_", "convert_", "to_float_", "verify", "VerifyReport", "QATSchedule"}
    assert names <= set(torchquant.__all__)
