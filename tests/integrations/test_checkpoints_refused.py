"""Checkpoints that are damaged or do not fit: clear errors, and the model stays as it is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints as by
from support.checkpoints import handmade, small
from support.layers import unchanged
from torch import nn

import torchquant
from torchquant import (
    IntxWeightOnlyConfig,
    PerGroup,
    Weights,
    load_checkpoint,
    quantize_,
    save_checkpoint,
)
from torchquant.integrations.checkpoints import load as loading
from torchquant.integrations.checkpoints import save as saving
from torchquant.integrations.checkpoints.gptq import tensors_of
from torchquant.integrations.checkpoints.stored import DAMAGED, MISFIT, UNKNOWN, Integers

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32}
Parts = dict[str, Any]


def refused(
    path: Path, match: str | None, model: nn.Module | None = None, error: Any = ValueError
) -> None:
    model = small() if model is None else model
    with unchanged(model), pytest.raises(error, match=match):
        load_checkpoint(model, path)


def without(name: str) -> Callable[[Parts], Any]:
    return lambda parts: parts.pop(name)


def replaced(name: str, value: Any) -> Callable[[Parts], Any]:
    return lambda parts: parts.update({name: value(parts[name])})


BAD_GPTQ: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "no scales": (without("scales"), r"first\.scales is missing"),
    "no qzeros": (without("qzeros"), r"first\.qzeros is missing"),
    "short qweight": (replaced("qweight", lambda t: t[:7]), r"qweight must be int32 .*K = 64"),
    "other dtype": (replaced("qweight", lambda t: t.astype(np.int64)), r"must be torch\.int32"),
    "groups": (replaced("scales", lambda t: t[:1]), r"qzeros must be \[1, 4\], got \[2, 4\]"),
    "short g_idx": (replaced("g_idx", lambda t: t[:63]), r"g_idx must be integers \[64\]"),
    "float g_idx": (replaced("g_idx", lambda t: t.astype(np.float32)), r"g_idx must be integers"),
    "large g_idx": (replaced("g_idx", lambda t: t + 1), r"g_idx must hold groups from 0 to 1"),
    "negative g_idx": (replaced("g_idx", lambda t: t - 1), r"g_idx must hold groups from 0 to 1"),
    "NaN": (replaced("scales", lambda t: t * np.float16("nan")), r"scales must have finite scales"),
}


@pytest.mark.parametrize("name", BAD_GPTQ)
def test_gptq(tmp_path: Path, name: str) -> None:
    edit, match = BAD_GPTQ[name]
    parts = by.gptq(handmade())
    edit(parts)
    by.write(tmp_path, {"first": parts}, GPTQ, by.floats_of(small(), "first.weight"))
    refused(tmp_path, f"load_checkpoint: '.*' cannot be loaded into the model: .*{match}")


@pytest.mark.parametrize("remedy", [DAMAGED, MISFIT, UNKNOWN])
def test_the_message_names_a_remedy(tmp_path: Path, remedy: str) -> None:
    parts, config = by.gptq(handmade()), dict(GPTQ)
    if remedy is DAMAGED:
        parts.pop("scales")
    elif remedy is UNKNOWN:
        config["checkpoint_format"] = "marlin"
    name = "other" if remedy is MISFIT else "first"
    by.write(tmp_path, {name: parts}, config, by.floats_of(small(), "first.weight"))
    refused(tmp_path, f"load_checkpoint: '.*' cannot be loaded into the model: .*; {remedy}$")


BAD_AWQ: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "no qzeros": (without("qzeros"), r"first\.qzeros is missing"),
    "shape": (replaced("qweight", lambda t: t[:, :3]), r"qweight must be int32 \[64, 4\]"),
    "groups": (
        replaced("scales", lambda t: np.concatenate([t, t[:1]])),
        r"qzeros must be int32",
    ),
}


@pytest.mark.parametrize("name", BAD_AWQ)
def test_awq(tmp_path: Path, name: str) -> None:
    edit, match = BAD_AWQ[name]
    parts = by.awq(handmade())
    edit(parts)
    by.write(tmp_path, {"first": parts}, AWQ, by.floats_of(small(), "first.weight"))
    refused(tmp_path, match)


BAD_COMPRESSED: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "no zero points": (without("weight_zero_point"), r"weight_zero_point is missing"),
    "no integers": (without("weight_packed"), r"first\.weight is missing"),
    "scale": (replaced("weight_scale", lambda t: t[:, :1]), r"weight_scale must be \[32, 2\]"),
    "stored shape": (replaced("weight_shape", lambda t: t * 2), r"weight_shape must be \[32, 64\]"),
    "words": (
        replaced("weight_packed", lambda t: t[:, 1:]),
        r"weight_packed must be int32",
    ),
}


@pytest.mark.parametrize("name", BAD_COMPRESSED)
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    edit, match = BAD_COMPRESSED[name]
    parts = by.compressed(handmade())
    edit(parts)
    by.write(tmp_path, {"first": parts}, by.scheme(), by.floats_of(small(), "first.weight"))
    refused(tmp_path, match)


def test_integers_of_too_many_bits(tmp_path: Path) -> None:
    parts = by.compressed(handmade(), packed=False)
    parts["weight"] = parts["weight"] * 2
    config = by.scheme(form="int-quantized")
    by.write(tmp_path, {"first": parts}, config, by.floats_of(small(), "first.weight"))
    refused(tmp_path, "weight must hold integers of 4 bits")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of gptq, awq, compressed"),
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format must be gptq or gptq_v2, got 'marlin'",
        ),
        ({"quant_method": "awq", "version": "GEMV"}, "version of an AWQ checkpoint must be gemm"),
        ({**by.scheme(), "format": "float-quantized"}, "must have one of the formats pack-quant"),
        ({**by.scheme(), "config_groups": {}}, "config_groups must be a table of schemes"),
        ({**by.scheme(), "transform_config": {"a": 1}}, "transform_config must be empty"),
        (by.scheme(inputs={"type": "float", "num_bits": 8}), "must have integer inputs"),
        (by.scheme(targets=["Conv2d"]), "no scheme of config_groups is for it"),
    ],
)
def test_configurations(tmp_path: Path, edit: Any, match: str) -> None:
    made = handmade()
    layout = edit.get("quant_method")
    parts = by.compressed(made) if layout == "compressed-tensors" else by.gptq(made)
    by.write(tmp_path, {"first": parts}, {**GPTQ, **edit}, by.floats_of(small(), "first.weight"))
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "meta": 3},
        {**by.scheme(), "config_groups": {"a": {"weights": {"num_bits": 4}, "targets": 3}}},
        {**by.scheme(), "transform_config": [3]},
        by.scheme(inputs=[3]),  # type: ignore[arg-type]
    ],
)
def test_values_of_other_types(tmp_path: Path, config: Any) -> None:
    made = handmade()
    parts = by.gptq(made) if config["quant_method"] == "gptq" else by.compressed(made)
    by.write(tmp_path, {"first": parts}, config, by.floats_of(small(), "first.weight"))
    refused(tmp_path, "its quantization_config is not valid")


def test_group_sizes_that_are_no_numbers(tmp_path: Path) -> None:
    parts = by.gptq(handmade())
    del parts["g_idx"]
    floats = by.floats_of(small(), "first.weight")
    by.write(tmp_path, {"first": parts}, {**GPTQ, "group_size": "many"}, floats)
    refused(tmp_path, "its quantization_config is not valid")
    by.write(tmp_path, {"first": parts}, {**GPTQ, "group_size": 16}, floats)
    refused(tmp_path, "scales must have 4 groups of 16 inputs, got 2")


def test_files(tmp_path: Path) -> None:
    refused(
        tmp_path / "nothing", "must name a folder or a file that exists", error=FileNotFoundError
    )
    refused(tmp_path, r"the folder must have \*\.safetensors or a \*\.gguf file, got neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"got pytorch_model\.bin; convert them to safetensors")
    floats = by.floats_of(small(), "first.weight")
    by.write(tmp_path, {"first": by.gptq(handmade())}, GPTQ, floats)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for size in (4, 100, len(data) - 1):
        path.write_bytes(data[:size])
        refused(tmp_path, "must be a complete safetensors file, but it is truncated")
    path.write_bytes(data)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config\.json is damaged")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    refused(tmp_path, "must be an index of safetensors files")
    index.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    refused(tmp_path, r"other\.safetensors is missing")


def test_a_file_of_torchquant_names_the_function_that_reads_it(tmp_path: Path) -> None:
    model = small()
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32))
    torchquant.save(model, tmp_path / "model.safetensors")
    refused(tmp_path, r"use torchquant\.load\(path, model\)")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    parts, floats = by.gptq(handmade()), by.floats_of(small(), "first.weight")
    cases = {
        "missing": ({"first": parts}, {**floats}, r"nothing for norm\.weight of the model"),
        "unknown": ({"first": parts}, {**floats, "more": np.zeros(3)}, "no place for more"),
        "layer": ({"other": parts}, floats, "layer that the model does not have"),
        "shape": (
            {"first": parts},
            {**floats, "norm.bias": np.zeros(3)},
            r"norm\.bias is \[3\] in",
        ),
    }
    del cases["missing"][1]["norm.weight"]
    for name, (layers, tensors, match) in cases.items():
        refused(by.write(tmp_path / name, layers, GPTQ, tensors), match)
    model = small()
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32), filter_fn="first")
    good = by.write(tmp_path / "good", {"first": parts}, GPTQ, floats)
    refused(good, "first is quantized or prepared already", model)
    refused(good, "which cannot be replaced in place", nn.Linear(4, 4))


def test_integers_without_scales_do_not_become_floats(tmp_path: Path) -> None:
    parts = by.compressed(handmade(8, size=64), packed=False)
    del parts["weight_scale"], parts["weight_zero_point"]
    config = by.scheme(8, None, form="int-quantized")
    by.write(tmp_path, {"first": parts}, config, by.floats_of(small(), "first.weight"))
    refused(tmp_path, r"first\.weight is integers in the file, float in the model")


def test_tensors_that_no_scheme_mentions(tmp_path: Path) -> None:
    parts = {**by.compressed(handmade()), "input_scale": np.ones(1, np.float32)}
    by.write(tmp_path, {"first": parts}, by.scheme(), by.floats_of(small(), "first.weight"))
    refused(tmp_path, r"no place for first\.input_scale")


@pytest.mark.parametrize(("scale", "zero"), [(np.nan, 0), (0.0, 0), (0.1, 5)])
def test_static_inputs(tmp_path: Path, scale: float, zero: int) -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
    parts = by.compressed(handmade(8, size=64, symmetric=True), packed=False, zeros=False)
    parts["input_scale"] = np.array([scale], np.float32)
    parts["input_zero_point"] = np.array([zero], np.int8)
    config = by.scheme(8, None, True, inputs, "int-quantized")
    by.write(tmp_path, {"first": parts}, config, by.floats_of(small(), "first.weight"))
    refused(tmp_path, r"first\.input_(scale must be finite|zero_point must be 0, got 5)")


def test_two_values_for_a_tied_tensor(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        found = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 16, bias=False))
        found[1].weight = found[0].weight
        return found

    weight = np.ones((16, 64), np.float32)
    equal = by.write(tmp_path / "a", {}, None, {"0.weight": weight, "1.weight": weight})
    tied = model()
    load_checkpoint(tied, equal)
    assert tied[1].weight is tied[0].weight and bool((tied[0].weight == 1).all())
    other = by.write(tmp_path / "b", {}, None, {"0.weight": weight, "1.weight": 2 * weight})
    refused(other, "are two tensors in the file, one tensor in the model", model())
    alone = by.write(tmp_path / "c", {}, None, {"0.weight": weight})
    load_checkpoint(model(), alone)


def test_what_the_model_does_without(tmp_path: Path) -> None:
    """Zeros for a bias that the layer does not have, and buffers that the model computes."""
    floats = by.floats_of(small(), "first.weight")
    model: Any = small(bias=False)
    model.register_buffer("positions", torch.arange(4), persistent=False)
    more = {**floats, "first.bias": np.zeros(32, np.float32), "positions": np.arange(4)}
    path = by.write(tmp_path / "zeros", {"first": by.gptq(handmade())}, GPTQ, more)
    report = load_checkpoint(model, path)
    assert report.notes == (
        "first.bias was not used: the layer has no bias, and this one is 0.",
        "positions was not used: the model computes this buffer.",
    )
    more["first.bias"] = more["first.bias"] + 1
    path = by.write(tmp_path / "ones", {"first": by.gptq(handmade())}, GPTQ, more)
    refused(path, r"no place for first\.bias", small(bias=False))


def test_arguments(tmp_path: Path) -> None:
    path = by.write(tmp_path, {}, None, by.floats_of(small()))
    for options, error, match in (
        ({"bits": 9}, ValueError, "bits must be an integer from 2 to 8, got 9"),
        ({"activations": torchquant.Static()}, TypeError, r"must be None or Dynamic\(\)"),
        ({"device": "meta"}, ValueError, "device must hold values"),
        ({"device": "nowhere"}, ValueError, "device must name one of torch's devices"),
    ):
        with pytest.raises(error, match=match):
            load_checkpoint(small(), path, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="load_checkpoint: model must be an nn"):
        load_checkpoint("model", path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["_layer", "_floats", "replace_module", "_assign", "_check_values"]
)
def test_an_interruption_changes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = by.floats_of(small(), "first.weight")
    path = by.write(tmp_path, {"first": by.gptq(handmade())}, GPTQ, floats)
    original = getattr(loading, name)

    def interrupted(*arguments: Any) -> Any:
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, name, interrupted)
    refused(path, None, error=KeyboardInterrupt)


def test_tensors_without_values_are_named(tmp_path: Path) -> None:
    path = by.write(tmp_path, {}, None, by.floats_of(small()))
    model: Any = small(device="meta")
    model.register_buffer("positions", torch.arange(4, device="meta"), persistent=False)
    with unchanged(model), pytest.raises(ValueError, match=r"load_checkpoint: .*positions"):
        load_checkpoint(model, path)


def test_refusals_of_save_checkpoint(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(ValueError, match="it has no quantized layer"):
        save_checkpoint(model, tmp_path / "a", layout="gptq")
    quantize_(model, IntxWeightOnlyConfig(5, group_size=32), filter_fn="first")
    with pytest.raises(ValueError, match="the layout has 2, 3, 4 or 8 bits, not 5"):
        save_checkpoint(model, tmp_path / "a", layout="gptq")
    with pytest.raises(ValueError, match="layout must be one of gptq, awq, compressed-tensors"):
        save_checkpoint(model, tmp_path / "a", layout="gguf")
    with pytest.raises(TypeError, match="scale_dtype must be"):
        save_checkpoint(model, tmp_path / "a", layout="gptq", scale_dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="must be in an existing folder"):
        save_checkpoint(model, tmp_path / "a" / "b", layout="compressed-tensors")
    assert not list(tmp_path.iterdir())
    save_checkpoint(model, tmp_path / "a", layout="compressed-tensors")
    with pytest.raises(ValueError, match=r"a folder without weights, got .*model\.safetensors"):
        save_checkpoint(model, tmp_path / "a", layout="compressed-tensors")
    trained = small()
    torchquant.prepare_qat_(trained, filter_fn="first")
    with pytest.raises(ValueError, match="first is in training"):
        save_checkpoint(trained, tmp_path / "b", layout="gptq")


class Counting(nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: Any) -> None:
        pass


def test_states_that_no_file_holds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), Counting(4, 4))
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32), filter_fn="0")
    with pytest.raises(ValueError, match="the state of 1 holds a value that is no tensor"):
        save_checkpoint(model, tmp_path / "a", layout="gptq")
    with pytest.raises(ValueError, match="0 has tensors on the meta device"):
        save_checkpoint(model.to("meta")[:1], tmp_path / "a", layout="gptq")
    assert not list(tmp_path.iterdir())


def test_scales_that_the_dtype_does_not_hold(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.first.weight *= 1e-8
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32), filter_fn="first")
    with pytest.raises(ValueError, match="scale_dtype must hold all scales, but"):
        save_checkpoint(model, tmp_path / "a", layout="gptq", scale_dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save_file", "_rename", "_config"])
def test_an_interruption_leaves_no_files(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    quantize_(model, IntxWeightOnlyConfig(4, group_size=32), filter_fn="first")
    original = getattr(saving, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        original(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, name, interrupted)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "tokenizer.json").write_text("{}")
    for folder in (tmp_path / "new", kept):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(model, folder, layout="gptq", shard_bytes=1000)
    assert [path.name for path in kept.iterdir()] == ["tokenizer.json"]
    assert not (tmp_path / "new").exists()


MEMORY = """
import resource, sys, torch, torchquant
from torch import nn
torch.set_num_threads(1)
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1536, 1536, bias=False) for _ in range(12)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = torchquant.load_checkpoint(model, sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_the_file_and_the_integers(tmp_path: Path) -> None:
    """12 layers of 9.4 MB each in float; a float copy of them all would be 113 MB."""
    side = 1536
    floats = 4 * side * side
    integers = Integers(
        torch.zeros(side, side, dtype=torch.int8),
        torch.ones(side, side // 128),
        None,
        Weights(4, granularity=PerGroup(128)),
    )
    parts = {key: tensor.numpy() for key, tensor in tensors_of(integers, 128).items()}
    by.write(tmp_path, {str(place): parts for place in range(12)}, {**GPTQ, "group_size": 128})
    size = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, packed = (int(word) for word in result.stdout.split())
    assert packed < 12 * floats / 7
    assert peak * 1024 < size + packed + 2.5 * floats, (peak, size, packed)
