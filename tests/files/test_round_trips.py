"""A model that is saved and loaded has the same state and computes the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import floats
from support.layers import ASYMMETRIC, CONFIGS, assert_same_state
from support.model_files import TOKENS, LanguageModel, metadata_of, trained
from torch import nn
from torch.nn.utils import parametrizations

from torchquant import Int8DynamicActivationInt8WeightConfig as Config
from torchquant import QuantizationConfig, cpu, load, quantize_, save
from torchquant.nn import QuantizedLinear


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_into_a_float_model(path: Path, config: QuantizationConfig) -> None:
    model = trained()
    quantize_(model, config)
    save(model, path)
    other = LanguageModel().eval()
    assert load(path, other) is other
    assert_same_state(other, model)
    assert repr(other) == repr(model)
    assert isinstance(other.body[0], QuantizedLinear)
    assert other.body[0].config == config
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_into_a_model_on_the_meta_device(path: Path) -> None:
    model = nn.Sequential(trained().body[:3], nn.BatchNorm1d(64))
    quantize_(model, ASYMMETRIC)
    save(model, path)
    with torch.device("meta"):
        other = nn.Sequential(LanguageModel().body[:3], nn.BatchNorm1d(64))
    load(path, other)
    assert_same_state(other, model)
    assert {t.device.type for t in [*other.parameters(), *other.buffers()]} == {"cpu"}


def test_round_trip_into_a_model_that_is_quantized(path: Path) -> None:
    model = trained()
    quantize_(model)
    save(model, path)
    for config in CONFIGS.values():
        other = LanguageModel().eval()
        quantize_(other, config)
        body = other.body[0]
        load(path, other)
        assert_same_state(other, model)
        assert (other.body[0] is body) is (config == Config()), "replaced only where it must be"
        assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_of_a_float_model(path: Path) -> None:
    model = trained()
    save(model, path)
    other = load(path, LanguageModel().eval())
    assert_same_state(other, model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert metadata_of(path)["layers"] == {}


def test_round_trip_of_one_layer_alone(path: Path) -> None:
    layer = QuantizedLinear.from_float(nn.Linear(64, 32), ASYMMETRIC, "gelu")
    save(layer, path)
    other = QuantizedLinear(64, 32, config=ASYMMETRIC, activation="gelu")
    load(path, other)
    assert_same_state(other, layer)
    with pytest.raises(ValueError, match="layer at the root in the file, Linear in the model"):
        load(path, nn.Linear(64, 32))
    with pytest.raises(ValueError, match="layer at the root in the file"):
        load(path, QuantizedLinear(64, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_trip_of_a_model_in_low_precision(path: Path, dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    quantize_(model)
    save(model, path)
    for other in (LanguageModel().eval(), LanguageModel().eval().to(dtype)):
        load(path, other)
        assert_same_state(other, model)
        assert other.embedding.weight.dtype == dtype
        assert other.body[0].weight_scale.dtype == torch.float32
    other.positions = other.positions.to(dtype)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_round_trip_between_instruction_sets(path: Path, isa: str) -> None:
    model = trained()
    quantize_(model)
    save(model, path)
    with cpu.use_isa("scalar"):
        other = load(path, LanguageModel().eval())
        expected = other(TOKENS)
        content = path.read_bytes()
        save(other, path)
        assert path.read_bytes() == content, "a file does not depend on the CPU"
    assert torch.equal(other(TOKENS), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(64, 32, 2),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 2),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64)),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 64)),
        lambda: nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 2)),
        lambda: nn.Sequential(nn.Linear(64, 64, bias=False)),
        lambda: nn.Sequential(nn.ParameterList([torch.zeros(0, 3), torch.zeros(3, 0)])),
        lambda: nn.Sequential(nn.ReLU()),
    ],
    ids=["lstm", "encoder", "parametrized", "spectral", "norm", "no_bias", "empty", "nothing"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_round_trip_of_other_modules(path: Path, make: Callable[[], nn.Module]) -> None:
    model, other = make().eval(), make().eval()
    quantize_(model)
    save(model, path)
    load(path, other)
    assert_same_state(other, model)
    if isinstance(model, nn.LSTM):
        x = floats(3, 2, 64)
        assert torch.equal(other(x)[0], model(x)[0])


class Exotic(nn.Module):
    """Tensors that are not contiguous, conjugated, or negated views."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24.0).reshape(4, 6)
        self.whole = nn.Parameter(base)
        self.register_buffer("rows", base[1:3])
        self.register_buffer("transposed", base.t())
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("scalar", torch.tensor(3.0))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("complex", torch.tensor([1 + 2j]))
        self.register_buffer("conjugate", self.complex.conj())
        self.register_buffer("absent", None)


def test_round_trip_of_exotic_tensors(path: Path) -> None:
    model, other = Exotic(), Exotic()
    with torch.no_grad():
        model.whole += 1
        other.whole.zero_()
    save(model, path)
    load(path, other)
    assert {key: value.tolist() for key, value in other.state_dict().items()} == {
        key: value.tolist() for key, value in model.state_dict().items()
    }


class WithExtraState(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state(path: Path) -> None:
    model = WithExtraState(torch.tensor([1.0, 2.0]))
    quantize_(model)
    save(model, path)
    other = WithExtraState(torch.zeros(5))
    load(path, other)
    assert torch.equal(other.extra, model.extra)
    with pytest.raises(ValueError) as raised:
        save(WithExtraState({"a": 1}), path)
    assert str(raised.value) == (
        "save: the state dict must hold tensors only, got dict at '_extra_state'; modules with "
        "get_extra_state() cannot be stored in safetensors"
    )
    assert load(path, WithExtraState(None))
