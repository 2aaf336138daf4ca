"""What save_checkpoint writes is read again with the same integers, by us and by others."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import floats
from support.checkpoints import small
from support.layers import ASYMMETRIC
from torch import Tensor, nn

from torchquant import (
    Dynamic,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    QuantizationConfig,
    Weights,
    load_checkpoint,
    quantize_,
    save_checkpoint,
)
from torchquant.nn import QuantizedLinear

LAYOUTS = ("gptq", "awq", "compressed-tensors")
CONFIGS = {
    "int4 in groups": IntxWeightOnlyConfig(4, group_size=32),
    "int4 with zero points": IntxWeightOnlyConfig(4, group_size=32, symmetric=False),
    "int4 per channel": IntxWeightOnlyConfig(4, group_size=None),
    "int3": IntxWeightOnlyConfig(3, group_size=16),
    "int2": IntxWeightOnlyConfig(2, group_size=32, symmetric=False),
    "int8": IntxWeightOnlyConfig(8, group_size=32),
    "W4A8": Int8DynamicActivationIntxWeightConfig(4, 32),
    "W8A8": Int8DynamicActivationInt8WeightConfig(activation_symmetric=True),
    "W8A8 with zero points": ASYMMETRIC,
    "int5": IntxWeightOnlyConfig(5, group_size=32),
}
ONLY_COMPRESSED = ("int5",)
ONLY_AWQ = ("int4 in groups", "int4 with zero points", "int4 per channel", "W4A8")


def quantized(config: QuantizationConfig) -> nn.Module:
    model = small()
    with torch.no_grad():
        model.first.weight.copy_(floats(32, 64, seed=1))
        model.first.weight[:, :32] += 3.0  # zero points at the end of their range
    quantize_(model, config, filter_fn="first")
    return model


def state_of(layer: Any) -> dict[str, Tensor]:
    return {
        "integers": layer.integers,
        "scale": layer.qweight_scale,
        **({} if layer.qweight_zero_point is None else {"zero": layer.qweight_zero_point.long()}),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path: Path, layout: str, name: str) -> None:
    if name in ONLY_COMPRESSED and layout == "gptq":
        return
    if name not in ONLY_AWQ and layout == "awq":
        return
    config = CONFIGS[name]
    model = quantized(config)
    written = save_checkpoint(model, tmp_path, layout=layout)
    assert written["first"].action == "written" and written["head"].action == "float"
    assert written.bytes < 8000
    other = small(device="meta")
    report = load_checkpoint(other, tmp_path)
    assert report["first"].action == "loaded" and report.layout == layout
    ours, theirs = state_of(model.first), state_of(other.first)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key
    described = layout == "compressed-tensors"
    layer: Any = other.first
    assert layer.config.activations == (config.activations if described else None)
    assert bool(written.notes) is (config.activations is not None and not described)
    if described:
        x = floats(3, 64, seed=2)
        with torch.inference_mode():
            assert torch.equal(other(x), model(x))


def test_zero_points_of_0_are_written_as_version_2(tmp_path: Path) -> None:
    lowest = quantized(IntxWeightOnlyConfig(4, group_size=32, symmetric=False))
    layer: Any = lowest.first
    assert int(layer.qweight_zero_point.min()) == -8
    save_checkpoint(lowest, tmp_path / "2", layout="gptq")
    usual = quantized(IntxWeightOnlyConfig(4, group_size=32))
    save_checkpoint(usual, tmp_path / "1", layout="gptq")
    forms = {}
    for version in ("1", "2"):
        text = (tmp_path / version / "config.json").read_text()
        forms[version] = json.loads(text)["quantization_config"]["checkpoint_format"]
    assert forms == {"1": "gptq", "2": "gptq_v2"}
    tensors = safetensors.torch.load_file(tmp_path / "1" / "model.safetensors")
    assert {hex(word) for word in tensors["first.qzeros"].flatten().tolist()} == {"0x77777777"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_activations(tmp_path: Path, symmetric: bool) -> None:
    model = small()
    config = Int8StaticActivationInt8WeightConfig(activation_symmetric=symmetric)
    scale = torch.tensor([0.03])
    zero = None if symmetric else torch.tensor([-7], dtype=torch.int32)
    model.first = QuantizedLinear.from_float(
        model.first, config, input_scale=scale, input_zero_point=zero
    )
    report = save_checkpoint(model, tmp_path, layout="compressed-tensors")
    assert bool(report.notes) is symmetric, "ours has no -128"
    other = small(device="meta")
    load_checkpoint(other, tmp_path)
    x = floats(5, 64, seed=4).clamp(-127 * 0.03, 127 * 0.03)
    with torch.inference_mode():
        assert torch.equal(other.first(x), model.first(x))


def test_shards(tmp_path: Path) -> None:
    model = quantized(IntxWeightOnlyConfig(4, group_size=32))
    report = save_checkpoint(model, tmp_path, layout="gptq", shard_bytes=1000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    other = small(device="meta")
    load_checkpoint(other, tmp_path)
    assert torch.equal(other.first.integers, model.first.integers)
    again = small(device="meta")
    load_checkpoint(again, tmp_path / "model.safetensors.index.json")
    assert torch.equal(again.head.weight, model.head.weight)


def test_scales_of_half_precision(tmp_path: Path) -> None:
    model = quantized(IntxWeightOnlyConfig(4, group_size=32))
    save_checkpoint(model, tmp_path, layout="awq", scale_dtype=torch.float16)
    other: Any = small(device="meta")
    load_checkpoint(other, tmp_path)
    layer: Any = model.first
    assert torch.equal(other.first.integers, layer.integers)
    assert torch.equal(other.first.qweight_scale, layer.qweight_scale.half().float())


class Language(nn.Module):
    """An embedding that is tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 96, bias=False)
        self.lm_head.weight = self.embed.weight


def test_a_tied_table_is_written_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Language()
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32))
    assert model.embed.shared_weight is not None
    written = save_checkpoint(model, tmp_path, layout="compressed-tensors")
    assert written["lm_head"].bytes == 0
    with torch.device("meta"):
        other: Any = Language()
    report = load_checkpoint(other, tmp_path)
    assert other.embed.packed is other.lm_head.packed
    assert report["lm_head"].bytes == 0
    assert report["lm_head"].reason == "shares the weight of embed"
    for name in ("embed", "body", "lm_head"):
        ours, theirs = getattr(model, name), getattr(other, name)
        assert torch.equal(ours.integers, theirs.integers), name


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_tied_table_becomes_float_where_the_layout_has_none(tmp_path: Path, layout: Any) -> None:
    torch.manual_seed(0)
    model: Any = Language()
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32))
    written = save_checkpoint(model, tmp_path, layout=layout)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    if layout == "gptq":
        assert config["lm_head"] is False
        assert {*config["dynamic"]} == {"-:^embed$", "-:^lm_head$"}
    else:
        assert config["modules_to_not_convert"] == ["embed", "lm_head"]
    assert (written["lm_head"].action, written["lm_head"].bytes) == ("float", 0)
    assert (written["embed"].action, written["embed"].reason) == (
        "float",
        "the layout has no embedding layers",
    )
    other: Any = Language()
    load_checkpoint(other, tmp_path)
    assert other.lm_head.weight is other.embed.weight
    assert torch.equal(other.embed.weight, model.embed.dequantized())
    assert torch.equal(other.body.integers, model.body.integers)


def test_several_configurations(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    configs = {
        "0": IntxWeightOnlyConfig(4, group_size=32),
        "1": IntxWeightOnlyConfig(8, group_size=64),
        "2": QuantizationConfig(Weights(4, granularity=PerGroup(48)), Dynamic()),
        "3": None,
    }
    quantized = model()
    quantize_(quantized, configs)
    for layout in LAYOUTS:
        report = save_checkpoint(quantized, tmp_path / layout, layout=layout)
        other = model()
        load_checkpoint(other, tmp_path / layout)
        for row in report:
            if row.action == "written":
                place = int(row.name)
                assert torch.equal(other[place].integers, quantized[place].integers)
        actions = "".join(row.action[0] for row in report)
        assert actions == {"gptq": "wwwf", "awq": "wfff"}.get(layout, "wwff")
    text = (tmp_path / "gptq" / "config.json").read_text()
    config = json.loads(text)["quantization_config"]
    assert config["dynamic"]["+:^1$"] == {"bits": 8, "group_size": 64}
    assert config["dynamic"]["-:^3$"] == {}
    text = (tmp_path / "awq" / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["modules_to_not_convert"] == ["3", "1", "2"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_tensors_decompresses_our_files(tmp_path: Path, name: str) -> None:
    """And what it compresses again from these values has the same integers."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    model = quantized(CONFIGS[name])
    save_checkpoint(model, tmp_path, layout="compressed-tensors")
    text = (tmp_path / "config.json").read_text()
    values = json.loads(text)["quantization_config"]
    config = schemes.QuantizationConfig.model_validate(values)
    assert "head" in config.ignore
    scheme = config.config_groups["group_0"]
    assert scheme.targets == ["Linear"]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    prefix = "first."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    layer: Any = model.first
    decompressed = compressor.decompress(own, scheme)
    assert torch.equal(decompressed["weight"], layer.dequantized_matrix())
    again = compressor.compress(decompressed, scheme)
    again.pop("bias")
    for key, tensor in again.items():
        assert torch.equal(tensor, own[key]), key


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
@pytest.mark.parametrize("name", ["int4 in groups", "W8A8"])
def test_transformers_loads_our_folder_and_writes_the_same_integers(
    tmp_path: Path, name: str
) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    linear = [f"*.{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    quantize_(model, CONFIGS[name], filter_fn=linear)
    save_checkpoint(model, tmp_path / "ours", layout="compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.arange(16).reshape(2, 8)
    with torch.inference_mode():
        expected, found = model(tokens).logits, theirs.eval()(tokens).logits
    # The activations of W8A8 are rounded with other scales there.
    assert (found - expected).norm() / expected.norm() < (0.02 if name == "W8A8" else 1e-5)
    again = transformers.LlamaForCausalLM(config)
    report = load_checkpoint(again, tmp_path / "theirs")
    assert sum(row.action == "loaded" for row in report) == 7
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            ours = state_of(module)
            for key, tensor in state_of(again.get_submodule(path)).items():
                assert torch.equal(tensor, ours[key]), (path, key)


def test_reading_safetensors_needs_no_other_package(tmp_path: Path) -> None:
    """Neither compressed_tensors nor gguf is imported."""
    assert importlib.util.find_spec("torchquant.integrations.checkpoints")
    for layout in LAYOUTS:
        save_checkpoint(quantized(CONFIGS["int4 in groups"]), tmp_path / layout, layout=layout)
    before = set(sys.modules) & {"gguf", "compressed_tensors"}
    for layout in LAYOUTS:
        load_checkpoint(small(), tmp_path / layout)
    assert set(sys.modules) & {"gguf", "compressed_tensors"} == before
