"""Files and state dicts that older versions wrote can be loaded and give the same bits.

``old`` holds them: a model of four layers (see :func:`model`) in formats 1 and 2, with each of the
configuration classes that 0.1.0 had, and in format 3: quantized in float32 and in bfloat16, and
prepared for training with learned steps. ``format3_state_dict`` is a plain state dict.
``expected.safetensors`` holds the outputs of the versions that wrote them.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import assert_same_bits
from support.model_files import rewrite
from torch import nn

import torchquant
from torchquant import Dynamic, QuantizationConfig, Static, Weights

OLD = Path(__file__).parent / "old"
CONFIGS = {
    "format1": [QuantizationConfig(Weights(8, False), Dynamic(8, True))] * 3,
    "format2": [QuantizationConfig(Weights(3), Dynamic(6))] * 3,
    "format2_static": [
        QuantizationConfig(Weights(8), Static(8, True, False)),
        QuantizationConfig(Weights(4), Static(5)),
        QuantizationConfig(Weights(8, False), Static(8)),
    ],
    "format3": [QuantizationConfig(Weights(4, False), Dynamic(8))] * 3,
}


def model(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(48, 32),
        activation or nn.ReLU(),
        nn.Linear(32, 48, bias=False),
        nn.Linear(48, 16),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_old_file_loads_with_the_same_bits(name: str, tmp_path: Path) -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    loaded = torchquant.load(OLD / f"{name}.safetensors", model())
    assert [layer.config for layer in loaded if hasattr(layer, "config")] == CONFIGS[name]
    assert_same_bits(loaded(expected["input"]).detach(), expected[name])
    torchquant.save(loaded, tmp_path / "new")  # in the current format
    again = torchquant.load(tmp_path / "new", model())
    assert_same_bits(again(expected["input"]).detach(), expected[name])


def test_a_bfloat16_model_of_format_3_keeps_its_float32_biases(tmp_path: Path) -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    loaded = torchquant.load(OLD / "format3_bfloat16.safetensors", model().bfloat16())
    x = expected["input"].bfloat16()
    assert_same_bits(loaded(x).detach(), expected["format3_bfloat16"])
    assert [layer.dtype for layer in loaded if hasattr(layer, "config")] == [
        torch.float32,
        torch.bfloat16,  # has no bias: the dtype is that of the model
        torch.float32,
    ]
    torchquant.save(loaded, tmp_path / "new")
    again = torchquant.load(tmp_path / "new", model().bfloat16())
    assert_same_bits(again(x).detach(), expected["format3_bfloat16"])


def test_a_prepared_model_of_format_3(tmp_path: Path) -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    prepared = model(nn.Tanh())
    config = torchquant.QATConfig(weight_bits=4, learned_weights=True)
    torchquant.prepare_qat_(prepared, config, filter_fn=lambda *_: True)
    torchquant.load(OLD / "format3_trained.safetensors", prepared.eval())
    x = expected["input"]
    assert_same_bits(prepared(x).detach(), expected["format3_trained"])
    torchquant.save(prepared, tmp_path / "new")
    assert "0.qweight_quantizer.step" in safetensors.torch.load_file(tmp_path / "new")
    torchquant.convert_(prepared)
    assert_same_bits(prepared(x).detach(), expected["format3_trained"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_the_old_names(assign: bool) -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    state = safetensors.torch.load_file(OLD / "format3_state_dict.safetensors")
    before = dict(state)
    quantized = model()
    torchquant.quantize_(quantized, CONFIGS["format3"][0], filter_fn=lambda *_: True)
    quantized.load_state_dict(state, assign=assign)
    assert_same_bits(quantized(expected["input"]).detach(), expected["format3"])
    assert state.keys() == before.keys(), "the caller's dict does not change"
    assert "0.weight_scale" in state and "0.qweight_scale" in quantized.state_dict()


def test_a_state_dict_of_a_prepared_model_with_the_old_names() -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    state = safetensors.torch.load_file(OLD / "format3_trained.safetensors")
    prepared = model(nn.Tanh()).eval()
    config = torchquant.QATConfig(weight_bits=4, learned_weights=True)
    torchquant.prepare_qat_(prepared, config, filter_fn=lambda *_: True)
    prepared.load_state_dict(state)
    assert_same_bits(prepared(expected["input"]).detach(), expected["format3_trained"])


def test_a_relu_of_an_old_prepared_model_stays(tmp_path: Path) -> None:
    """Formats up to 3 called it absorbed; prepared layers leave it in its place now."""
    prepared = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    torchquant.prepare_qat_(prepared)
    torchquant.save(prepared, tmp_path / "new")

    def as_before(header: dict[str, Any], tensors: Any) -> None:
        header.update(format=3, absorbed=header.pop("activations"))

    rewrite(tmp_path / "new", as_before)
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    torchquant.prepare_qat_(other)
    torchquant.load(tmp_path / "new", other)
    x = torch.randn(5, 64)
    assert_same_bits(other(x), prepared(x))
