"""Checkpoints made by hand: the values of a loaded layer are those of the layout's description."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints as by
from support.checkpoints import Handmade, Small, handmade, small

from torchquant import CheckpointReport, Dynamic, Static, load_checkpoint

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def loaded(
    folder: Path, parts: Any, config: Any, **options: Any
) -> tuple[Small, CheckpointReport, Small]:
    """A model with layer "first" from a checkpoint, the report, and the model of the floats."""
    source = small()
    floats = by.floats_of(source, "first.weight")
    by.write(folder, {"first": parts}, config, floats)
    model = small(device="meta")
    return model, load_checkpoint(model, folder, **options), source


def check(model: Small, made: Handmade, source: Small) -> None:
    """Values bit by bit, and the forward up to rounding."""
    layer: Any = model.first
    assert torch.equal(layer.dequantized_matrix(), made.values)
    with torch.no_grad():
        source.first.weight.copy_(made.values)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, version: int) -> None:
    made = handmade(bits)
    assert made.zero.min() == 0, "the case in which versions differ most"
    form = {1: "gptq", 2: "gptq_v2"}[version]
    config = {**GPTQ, "bits": bits, "checkpoint_format": form}
    model, report, source = loaded(tmp_path, by.gptq(made, version=version), config)
    check(model, made, source)
    row = report["first"]
    assert (row.action, row.stored) == ("loaded", f"GPTQ, int{bits} in groups of 32")
    assert row.weights == f"int{bits} in groups of 32 with zero point"
    assert report["norm"].action == report["head"].action == "float"
    assert report.largest_error == 0


def test_gptq_where_a_zero_point_of_0_borrows_from_the_next(tmp_path: Path) -> None:
    made = handmade()
    parts = by.gptq(made, borrow=True)
    assert not np.array_equal(parts["qzeros"], by.gptq(made)["qzeros"])
    config = {**GPTQ, "meta": {"quantizer": ["gptqmodel:2.0.0"]}}
    with_list = loaded(tmp_path / "list", parts, config)
    check(with_list[0], made, with_list[2])
    text = loaded(tmp_path / "text", parts, {**GPTQ, "meta": {"quantizer": "gptqmodel:2.0.0"}})
    check(text[0], made, text[2])


def test_symmetric_gptq_has_no_zero_points(tmp_path: Path) -> None:
    made = handmade(symmetric=True)
    model, report, source = loaded(tmp_path, by.gptq(made), GPTQ)
    check(model, made, source)
    assert report["first"].weights == "int4 in groups of 32"


def test_gptq_per_channel_and_without_g_idx(tmp_path: Path) -> None:
    made = handmade(size=64)
    parts = by.gptq(made)
    del parts["g_idx"]
    model, report, source = loaded(tmp_path, parts, {**GPTQ, "group_size": -1})
    check(model, made, source)
    assert report["first"].weights == "int4 per channel with zero point"


def test_gptq_with_a_shorter_last_group(tmp_path: Path) -> None:
    made = handmade(size=48)
    model, report, source = loaded(tmp_path, by.gptq(made), {**GPTQ, "group_size": 48})
    check(model, made, source)
    assert report["first"].weights == "int4 in groups of 48 with zero point"


def test_groups_in_another_order_keep_their_integers(tmp_path: Path) -> None:
    made = handmade()
    made.group = np.array([1, 0, 0, 1]).repeat(16)
    model, report, source = loaded(tmp_path, by.gptq(made), GPTQ)
    check(model, made, source)
    row = report["first"]
    assert (row.action, row.weights) == ("loaded", "int4 in groups of 16 with zero point")
    assert row.stored == "GPTQ, int4 in groups of 32, activation order"


def test_activation_order_is_rounded_and_reported(tmp_path: Path) -> None:
    made = handmade()
    made.group = np.random.default_rng(3).permutation(made.group)
    model, report, _ = loaded(tmp_path, by.gptq(made), GPTQ)
    row, layer = report["first"], model.first
    assert row.action == "rounded"
    assert row.reason == "its groups are no runs of inputs (activation order)"
    error = (layer.dequantized_matrix() - made.values).norm() / made.values.norm()  # type: ignore[operator]
    assert row.error == pytest.approx(float(error), rel=1e-5)
    assert 0 < row.error < 0.01 and report.largest_error == row.error
    coarse = loaded(tmp_path / "4", by.gptq(made), GPTQ, bits=4)[1]["first"]
    assert coarse.error > 3 * row.error and coarse.weights.startswith("int4 ")


def test_scales_that_are_negative_or_0(tmp_path: Path) -> None:
    made = handmade()
    made.scale[::3] *= -1
    made.scale[1] = 0
    model, _, source = loaded(tmp_path, by.gptq(made), GPTQ)
    check(model, made, source)
    layer: Any = model.first
    assert bool((layer.qweight_scale > 0).all())


@pytest.mark.parametrize("size", [32, 64])
def test_awq(tmp_path: Path, size: int) -> None:
    made = handmade(size=size)
    model, report, source = loaded(tmp_path, by.awq(made), AWQ)
    check(model, made, source)
    where = "in groups of 32" if size == 32 else "per channel"
    assert report["first"].stored == f"AWQ, int4 {where}"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (3, 16), (8, None), (5, 64)])
def test_compressed_tensors(
    tmp_path: Path, bits: int, size: int | None, symmetric: bool, packed: bool
) -> None:
    made = handmade(bits, size=size or 64, symmetric=symmetric, dtype=np.float32)
    parts = by.compressed(made, packed=packed, zeros=not symmetric)
    form = "pack-quantized" if packed else "int-quantized"
    model, report, source = loaded(tmp_path, parts, by.scheme(bits, size, symmetric, form=form))
    check(model, made, source)
    assert report["first"].action == "loaded"


@pytest.mark.parametrize("bits", [3, 6])
def test_compressed_tensors_of_older_versions(tmp_path: Path, bits: int) -> None:
    """Words with gaps, zero points that are not packed."""
    made = handmade(bits)
    parts = by.compressed(made)
    parts["weight_packed"] = by.with_gaps(made.q, bits)
    parts["weight_zero_point"] = by.with_gaps(made.zero.T, bits).T.copy()
    config = by.scheme(bits)
    model, _, source = loaded(tmp_path / "gaps", parts, config)
    check(model, made, source)
    parts["weight_zero_point"] = (made.zero - 2 ** (bits - 1)).astype(np.int8)
    parts["weight_g_idx"] = np.full(64, -1, np.int32)
    model, _, source = loaded(tmp_path / "plain", parts, config)
    check(model, made, source)


def test_compressed_tensors_with_activation_order(tmp_path: Path) -> None:
    made = handmade()
    made.group = np.random.default_rng(4).permutation(made.group)
    parts = {**by.compressed(made), "weight_g_idx": made.group.astype(np.int32)}
    model, report, _ = loaded(tmp_path, parts, by.scheme())
    assert report["first"].action == "rounded" and report["first"].error < 0.01
    layer: Any = model.first
    torch.testing.assert_close(layer.dequantized_matrix(), made.values, rtol=0, atol=0.02)


def test_dynamic_activations_of_compressed_tensors(tmp_path: Path) -> None:
    made = handmade(8, size=64, symmetric=True, dtype=np.float32)
    made.q[0, 0] = 0  # -128
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    config = by.scheme(8, None, True, inputs, "int-quantized")
    parts = by.compressed(made, packed=False, zeros=False)
    model, _, _ = loaded(tmp_path, parts, config, activations=Dynamic(4))
    layer: Any = model.first
    assert layer.config.activations == Dynamic(8, symmetric=True), "as the checkpoint says"
    assert layer.config.weights.range == (-128, 127)
    assert torch.equal(layer.dequantized_matrix(), made.values)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, made.values, layer.bias)
    assert (layer(x) - expected).norm() / expected.norm() < 0.02


def test_static_activations_of_compressed_tensors(tmp_path: Path) -> None:
    made = handmade(8, size=64, symmetric=True, dtype=np.float32)
    inputs = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor"}
    config = by.scheme(8, None, True, inputs, "int-quantized")
    parts = by.compressed(made, packed=False, zeros=False)
    parts["input_scale"] = np.array([0.03], np.float32)
    parts["input_zero_point"] = np.array([5], np.int8)
    model, _, _ = loaded(tmp_path, parts, config)
    layer: Any = model.first
    assert isinstance(layer.config.activations, Static)
    assert (layer.input_scale.item(), layer.input_zero_point.item()) == (np.float32(0.03), 5)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    q = (x / 0.03 + 5).round().clamp(-128, 127)
    expected = torch.nn.functional.linear((q - 5) * 0.03, made.values, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_activations_of_the_argument(tmp_path: Path) -> None:
    model, _, _ = loaded(tmp_path, by.awq(handmade()), AWQ, activations=Dynamic())
    layer: Any = model.first
    assert layer.config.activations == Dynamic()


def test_the_layout_is_found_by_the_names_of_tensors(tmp_path: Path) -> None:
    made = handmade(lowest_zero=1)
    for name, parts in {"gptq": by.gptq(made), "awq": by.awq(made)}.items():
        model, report, source = loaded(tmp_path / name, parts, None)
        check(model, made, source)
        assert report.layout == name
        assert bool(report.notes) is (name == "gptq")
    plain = by.write(tmp_path / "plain", {}, None, by.floats_of(small()))
    assert load_checkpoint(small(device="meta"), plain).layout == "safetensors"


def test_zero_points_of_symmetric_weights_in_older_versions(tmp_path: Path) -> None:
    made = handmade(symmetric=True)
    parts = {**by.compressed(made, zeros=False), "weight_zero_point": np.zeros((32, 2), np.int8)}
    model, report, source = loaded(tmp_path, parts, by.scheme(symmetric=True))
    check(model, made, source)
    assert report["first"].weights == "int4 in groups of 32"


def test_weights_in_another_dtype_and_on_a_grown_scale(tmp_path: Path) -> None:
    """A scale per tensor; a model in bfloat16 keeps its dtype, and so does the report."""
    made = handmade(8, size=64, symmetric=True, dtype=np.float32)
    made.scale[:] = 0.02
    parts = by.compressed(made, packed=False, zeros=False)
    parts["weight_scale"] = np.array([0.02], np.float32)
    config = by.scheme(8, None, True, form="int-quantized")
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    by.write(tmp_path, {"first": parts}, config, by.floats_of(small(), "first.weight"))
    model: Any = small(device="meta").to(torch.bfloat16)
    load_checkpoint(model, tmp_path)
    assert torch.equal(model.first.dequantized_matrix(), made.values)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_transposed_layer_of_transformers(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [inputs, outputs]; checkpoints store its integers as for nn.Linear."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    made = handmade()
    model: Any = small()
    model.first = utils.Conv1D(32, 64)
    floats = by.floats_of(small(), "first.weight")
    by.write(tmp_path, {"first": by.gptq(made)}, GPTQ, floats)
    report = load_checkpoint(model, tmp_path)
    assert (report["first"].kind, report["first"].action) == ("Conv1D", "loaded")
    assert torch.equal(model.first.weight + 0, made.values.t())
    assert isinstance(model.first.to_float(), utils.Conv1D) and model.first.nf == 32


def test_few_bits_beside_static_activations(tmp_path: Path) -> None:
    """Such a layer is stored without gaps, because no program runs it."""
    made = handmade(4, size=64, symmetric=True, dtype=np.float32)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
    parts = {**by.compressed(made, zeros=False), "input_scale": np.array([0.03], np.float32)}
    model, _, _ = loaded(tmp_path, parts, by.scheme(4, None, True, inputs))
    layer: Any = model.first
    assert torch.equal(layer.dequantized_matrix(), made.values)
    assert layer.packed.numel() < 32 * 64
    x = torch.tensor([[-128 * 0.03, 127 * 0.03] * 32])
    expected = torch.nn.functional.linear(x, made.values, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_lists_and_hooks_get_the_new_layer(tmp_path: Path) -> None:
    made = handmade()
    by.write(tmp_path, {"first": by.gptq(made)}, GPTQ, by.floats_of(small(), "first.weight"))
    model: Any = small()
    model.again = [model.first]
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("called"))
    bias = model.first.bias
    bias.requires_grad_(False)
    model.train()
    load_checkpoint(model, tmp_path)
    assert model.again[0] is model.first and model.first.training
    assert not model.first.bias.requires_grad and model.head.bias.requires_grad
    model(torch.randn(2, 64))
    assert calls == ["called"]


def test_a_bias_that_layers_share_stays_shared(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        found = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32))
        found[1].bias = found[0].bias
        return found

    floats = {"0.bias": np.arange(32, dtype=np.float32), "1.weight": np.eye(32, dtype=np.float32)}
    by.write(tmp_path, {"0": by.gptq(handmade())}, GPTQ, floats)
    found = model()
    load_checkpoint(found, tmp_path)
    assert found[0].bias is found[1].bias
    assert torch.equal(found[0].bias, torch.arange(32.0))
