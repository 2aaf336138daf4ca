"""Files with weights of few bits: round trips, sizes, formats, and damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import assert_same_state
from support.model_files import (
    TOKENS,
    LanguageModel,
    metadata_of,
    other_small,
    refused,
    rewrite,
    saved_small,
    small,
    trained,
)
from torch import nn

from torchquant import Int8DynamicActivationIntxWeightConfig as Config
from torchquant import (
    IntxActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    QuantizationConfig,
    functional,
    load,
    quantize_,
    save,
)
from torchquant.nn import QuantizedIntxLinear, QuantizedLinear

CONFIGS = {
    "int4_g32": Config(4, 32),
    "int3_g48_zero": Config(3, 48, symmetric=False),
    "int2": Config(2, None),
    "weight_only": IntxWeightOnlyConfig(5, 64),
}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trips(config: QuantizationConfig, meta: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    model = trained(tied=False)
    quantize_(model, config, filter_fn="body.*")
    save(model, path)
    with torch.device("meta" if meta else "cpu"):
        other = LanguageModel(tied=False).eval()
    load(path, other)
    assert_same_state(other, model)
    assert_same_bits(other(TOKENS).detach(), model(TOKENS).detach())
    assert isinstance(other.body[0], QuantizedIntxLinear) and other.body[3] is other.body[0]
    assert other.body[0].config == config
    header = metadata_of(path)
    assert (header["format"], header["layers"]["body.0"]["format"]) == (5, "intx")
    assert header["aliases"]["body.3.qweight_scale"] == "body.0.qweight_scale"
    load(path, model)  # a model that is quantized already
    assert_same_bits(other(TOKENS).detach(), model(TOKENS).detach())


def test_files_without_such_layers_have_the_format_of_before(tmp_path: Path) -> None:
    saved_small(tmp_path / "file")
    assert metadata_of(tmp_path / "file")["format"] == 4


@pytest.mark.parametrize("bits", range(2, 9))
def test_sizes_of_files(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2048, 256, bias=False))
    quantize_(model, Config(bits, 128))
    save(model, tmp_path / "file")
    wanted = 256 * 2048 * bits / 8 + 256 * 16 * 4
    assert wanted <= (tmp_path / "file").stat().st_size <= 1.02 * wanted
    assert wanted <= sum(b.numel() for b in model.buffers()) <= 1.02 * wanted


def test_a_file_replaces_the_class_of_a_layer(tmp_path: Path) -> None:
    """A file decides between int8 and fewer bits, whatever the model has."""
    low, int8 = tmp_path / "low", tmp_path / "int8"
    models = [saved_small(low, Config(4, 32)), saved_small(int8)]
    x = floats(3, 64)
    first, second = load(int8, load(low, other_small())), load(low, load(int8, other_small()))
    assert isinstance(first[0], QuantizedLinear) and isinstance(second[0], QuantizedIntxLinear)
    assert_same_bits(first(x).detach(), models[1](x).detach())
    assert_same_bits(second(x).detach(), models[0](x).detach())


def test_a_file_with_int8_tiles_of_four_bits(tmp_path: Path) -> None:
    """Older versions stored int8 integers for layers of fewer bits; such files stay as they are."""
    config = IntxActivationIntxWeightConfig(4)
    model = small()
    model[0] = QuantizedLinear.from_float(model[0], config)
    save(model, tmp_path / "file")
    assert metadata_of(tmp_path / "file")["format"] == 4
    for other in (other_small(), saved_small(tmp_path / "other", config)):
        load(tmp_path / "file", other)
        x = floats(3, 64)
        assert_same_bits(other(x).detach(), model(x).detach())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_int8_integers(assign: bool) -> None:
    config = IntxActivationIntxWeightConfig(5, weight_symmetric=False)
    linear, x = small()[0], floats(3, 64)
    old = QuantizedLinear.from_float(linear, config)
    layer = QuantizedIntxLinear.from_float(other_small()[0], config)
    layer.load_state_dict(old.state_dict(), assign=assign)
    assert_same_bits(layer(x).detach(), old(x).detach())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = {**old.state_dict(), "qweight": torch.full((64, 64), 16, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match=r"must be uint8 \[64, 40\], got int8"):
        layer.load_state_dict(state)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def layer_entry(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"].update(values)


def weights(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"]["config"]["weights"].update(values)


def group(size: Any) -> Callable[[dict[str, Any], Any], None]:
    return weights(granularity={"type": "PerGroup", "group_size": size})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (weights(bits=9), "bits must be an integer from 2 to 8, got 9"),
        (weights(bits=3), "0.qweight is uint8 [64, 32] in the file, uint8 [64, 24] in the model"),
        (group(0), "group_size must be a positive integer, got 0"),
        (group(-32), "group_size must be a positive integer, got -32"),
        (group("32"), "group_size must be a positive integer, got '32'"),
        (group(65), "group_size must be at most in_features = 64, got 65"),
        (group(16), "0.qweight_scale is float32 [64, 2] in the file, float32 [64, 4] in the model"),
        (weights(symmetric=True), "unknown 0.qweight_zero_point"),
        (layer_entry(format="int8"), "linear weights need PerAxis(0), not PerGroup"),
        (layer_entry(format="intx2"), "weight format must be 'int8', got 'intx2'; the file may be"),
        (layer_entry(format=None), "weight format must be 'int8', got None"),
        (layer_entry(in_features=63), "'0' has in_features=63 in the file, 64 in the model"),
        (
            lambda header, tensors: tensors["0.qweight_zero_point"].fill_(8),
            "weight_zero_point must be from -8 to 7 for bits = 4, got 8",
        ),
        (
            lambda header, tensors: tensors.update({"0.qweight": tensors["0.qweight"][:, :31]}),
            "0.qweight is uint8 [64, 31] in the file, uint8 [64, 32] in the model",
        ),
        (lambda header, tensors: tensors.pop("0.qweight_scale"), "missing 0.qweight_scale"),
    ],
)
def test_damaged_files(edit: Callable[..., Any], text: str, tmp_path: Path) -> None:
    saved_small(tmp_path / "file", Config(4, 32, symmetric=False))

    def contiguous(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        edit(header, tensors)
        tensors.update({key: value.contiguous() for key, value in tensors.items()})

    rewrite(tmp_path / "file", contiguous)
    for model in (other_small(), saved_small(tmp_path / "other", Config(4, 32, symmetric=False))):
        assert text in refused(tmp_path / "file", model)


def test_canonical_integers_are_rows_of_bits(tmp_path: Path) -> None:
    model = saved_small(tmp_path / "file", Config(3, 32))
    assert_same_bits(
        functional.unpack_integers(model.state_dict()["0.qweight"], 3, 64), model[0].integers
    )
