"""Files that torchquant 0.1.0 wrote can be loaded and give the same bits.

``old`` holds them: a model of four layers (see :func:`model`) in formats 1 and 2, with each of the
configuration classes that 0.1.0 had, and in ``expected.safetensors`` the outputs of 0.1.0.
"""

from pathlib import Path

import pytest
import safetensors.torch
from support import assert_same_bits
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
}


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 48, bias=False), nn.Linear(48, 16)
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
