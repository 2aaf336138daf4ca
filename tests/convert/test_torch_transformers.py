"""torch's own transformers: projections of nn.MultiheadAttention become layers."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import floats
from support.layers import outcome
from torch import nn

import torchquant
from torchquant import prepare_qat_, quantize_, to_float_
from torchquant.files.format import read
from torchquant.nn import MultiheadAttention, QuantizedModule

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    # Attention over rows of very different magnitudes depends strongly on the random weights.
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, **options)


def padding() -> torch.Tensor:
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    return mask


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.99)


@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_encoder_is_quantized(nested: bool, mode: Any) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2) if nested else encoder_layer()
    model = nn.Sequential(encoder, nn.Linear(64, 64)).eval()
    x, mask = floats(3, 7, 64), padding()
    with mode():
        expected = [encoder(x), encoder(x, src_key_padding_mask=mask)]
        report = quantize_(model)
        got = [encoder(x), encoder(x, src_key_padding_mask=mask)]
    layers = 2 if nested else 1
    assert len(report.quantized) == 6 * layers + 1
    assert not any(name.endswith("in_proj_weight") for name, _ in model.named_parameters())
    kept = ~mask
    assert close(got[0], expected[0]) and close(got[1][kept], expected[1][kept])
    # A layer with a mask gives the kept tokens what they get without the masked ones.
    with mode():
        assert close(encoder(x[1:2, :4]), got[1][1:2, :4])
    model.train()(x).sum().backward()


def test_names_notes_and_rows() -> None:
    model = nn.Sequential(encoder_layer(), nn.MultiheadAttention(64, 4))
    report = quantize_(model)
    expected = [f"0.self_attn.{name}" for name in PROJECTIONS] + ["0.linear1", "0.linear2"]
    expected += [f"1.{name}" for name in PROJECTIONS]
    assert outcome(report) == dict.fromkeys(expected, "quantized")
    assert report.notes[-1] == (
        "Projections of nn.MultiheadAttention became layers of their own "
        "(torchquant.nn.MultiheadAttention): 0.self_attn, 1."
    )
    assert sum(row.parameters for row in (*report.layers, *report.others)) == sum(
        p.numel() for p in nn.Sequential(encoder_layer(), nn.MultiheadAttention(64, 4)).parameters()
    )


@pytest.mark.parametrize("kdim", [None, 96], ids=["self", "cross"])
def test_results_are_those_of_the_layers(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True, kdim=kdim, vdim=kdim).eval()
    model = nn.ModuleList([attention])
    keys = 64 if kdim is None else kdim
    query, memory = floats(3, 7, 64), floats(3, 5, keys)
    if kdim is None:
        memory = query
    quantize_(model)
    ours = model[0]
    assert isinstance(ours, MultiheadAttention)
    got = ours(query, memory, memory, need_weights=False)[0]
    q, k, v = ours.q_proj(query), ours.k_proj(memory), ours.v_proj(memory)
    heads = [t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v)]
    mixed = nn.functional.scaled_dot_product_attention(*heads)
    assert torch.equal(got, ours.out_proj(mixed.transpose(1, 2).flatten(2)))
    assert all(isinstance(getattr(ours, name), QuantizedModule) for name in PROJECTIONS)


def test_a_decoder_and_a_whole_transformer() -> None:
    layer = nn.TransformerDecoderLayer(64, 4, 256, batch_first=True).eval()
    model = nn.Sequential(layer)
    target, memory = floats(2, 5, 64), floats(2, 6, 64)
    with torch.inference_mode():
        before = layer(target, memory)
        report = quantize_(model)
        after = layer(target, memory)
    assert len(report.quantized) == 2 * 4 + 2
    assert close(before, after)
    whole = nn.Transformer(64, 4, 1, 1, 256, batch_first=True).eval()
    assert len(quantize_(whole).quantized) == 6 + 10
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.inference_mode():
        got = whole(floats(2, 5, 64), floats(2, 6, 64), tgt_mask=mask, tgt_is_causal=True)
    assert got.isfinite().all()


@pytest.mark.parametrize("kdim", [None, 12], ids=["one_size", "other_sizes"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extended", [False, True])
def test_the_float_module_computes_what_torch_computes(
    kdim: int | None, bias: bool, batch_first: bool, extended: bool
) -> None:
    original = nn.MultiheadAttention(16, 4, 0.0, bias, extended, extended, kdim, kdim, batch_first)
    if bias:
        nn.init.normal_(original.in_proj_bias)
    ours = MultiheadAttention.from_float(original)
    shapes = ((3, 5, 16), (3, 7, kdim or 16), (3, 7, kdim or 16))
    inputs = [floats(*shape) for shape in shapes]
    if not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    single = [floats(*shape[1:]) for shape in shapes]
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    blocked = torch.ones(5, 7, dtype=torch.bool).triu(1)
    each = floats(12, 5, 7)
    calls: list[tuple[list[torch.Tensor], dict[str, Any]]] = [
        (inputs, {}),
        (inputs, {"need_weights": False}),
        (inputs, {"average_attn_weights": False, "attn_mask": each}),
        (inputs, {"key_padding_mask": padding, "attn_mask": blocked, "need_weights": False}),
        (inputs, {"key_padding_mask": padding.float(), "attn_mask": blocked.float()}),
        (single, {"key_padding_mask": padding[0], "average_attn_weights": False}),
        (single, {"attn_mask": each[:4], "need_weights": False}),
    ]
    for tensors, options in calls:
        expected, weights = original(*tensors, **options)
        got, our_weights = ours(*tensors, **options)
        torch.testing.assert_close(got, expected)
        assert (weights is None) == (our_weights is None)
        if weights is not None:
            torch.testing.assert_close(our_weights, weights)
    back = ours.to_float()
    for name, value in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    if kdim is None:
        assert back.in_proj_weight.data_ptr() == original.in_proj_weight.data_ptr()


def test_causal_attention() -> None:
    original = nn.MultiheadAttention(16, 4, batch_first=True)
    ours, x = MultiheadAttention.from_float(original), floats(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    for need_weights in (False, True):
        expected = original(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        got = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(got[0], expected[0])
    with pytest.raises(RuntimeError, match="attn_mask must be given with is_causal=True"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("options", [{}, {"kdim": 48, "vdim": 40}, {"bias": False}])
def test_the_state_of_the_original_module_fits(options: dict[str, Any]) -> None:
    original, ours = nn.MultiheadAttention(64, 4, **options), MultiheadAttention(64, 4, **options)
    wanted = {key: value.clone() for key, value in original.state_dict().items()}
    for assign in (False, True):
        given = dict(wanted)
        ours.load_state_dict(given, assign=assign)
        assert given.keys() == wanted.keys()
        got = ours.to_float().state_dict()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())
        ours.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match=r"in_proj_weight|q_proj\.weight"):
        ours.load_state_dict({**wanted, next(iter(wanted)): torch.zeros(3, 64)})


def test_a_float_checkpoint_is_loaded_into_a_prepared_model() -> None:
    first, second = (nn.Sequential(encoder_layer(dropout=0.0)).eval() for _ in range(2))
    nn.init.normal_(first[0].self_attn.in_proj_weight)
    state = copy.deepcopy(first.state_dict())
    for model in (first, second):
        prepare_qat_(model, torchquant.QATConfig(4, group_size=32))
    keys = second.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(key.endswith("_enabled") for key in keys.missing_keys)
    x = floats(3, 7, 64)
    assert torch.equal(first(x), second(x))


def test_wrong_inputs() -> None:
    attention = MultiheadAttention(16, 4, batch_first=True)
    x = floats(2, 5, 16)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        MultiheadAttention(16, 3)
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        attention(x[None], x, x)
    with pytest.raises(ValueError, match="the same length"):
        attention(x, x, x[:, :4])
    with pytest.raises(ValueError, match=r"attn_mask must be \[5, 5\] or \[8, 5, 5\]"):
        attention(x, x, x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[2, 5\]"):
        attention(x, x, x, key_padding_mask=torch.zeros(5, 2))
    with pytest.raises(TypeError, match="attn_mask must be bool or float"):
        attention(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int32))

    class Special(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"Special is not nn\.MultiheadAttention"):
        MultiheadAttention.from_float(Special(16, 4))


def test_to_float_puts_the_original_class_back() -> None:
    model = nn.Sequential(encoder_layer()).eval()
    x, keys = floats(3, 7, 64), [*model.state_dict()]
    quantize_(model)
    with torch.no_grad():
        expected = model(x)
    to_float_(model)
    assert type(model[0].self_attn) is nn.MultiheadAttention
    assert [*model.state_dict()] == keys
    with torch.no_grad():
        assert close(model(x), expected)


def test_files_copies_and_pickles(tmp_path: Path) -> None:
    model = nn.Sequential(nn.TransformerEncoder(encoder_layer(), 2), nn.Linear(64, 64)).eval()
    empty = copy.deepcopy(model)
    x = floats(3, 7, 64)
    quantize_(model)
    expected = model(x)
    torchquant.save(model, tmp_path / "model.safetensors")
    assert read(tmp_path / "model.safetensors")[1]["format"] == 5  # older versions refuse it
    for target in (empty, copy.deepcopy(model)):
        loaded = torchquant.load(tmp_path / "model.safetensors", target)
        assert torch.equal(loaded(x), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    wrong = nn.Sequential(nn.TransformerEncoder(encoder_layer(), 1), nn.Linear(64, 64))
    before = [type(module) for module in wrong.modules()]
    with pytest.raises(ValueError, match=r"no attention module '0\.layers\.1\.self_attn'"):
        torchquant.load(tmp_path / "model.safetensors", wrong)
    assert [type(module) for module in wrong.modules()] == before


@pytest.mark.parametrize("verb", [quantize_, prepare_qat_])
def test_what_is_not_selected_stays_the_same_object(verb: Any) -> None:
    model = nn.Sequential(encoder_layer(), nn.Linear(64, 64))
    attention, weight = model[0].self_attn, model[0].self_attn.in_proj_weight
    report = verb(model, filter_fn="1")
    assert model[0].self_attn is attention and attention.in_proj_weight is weight
    assert outcome(report)["0.linear1"] == "skipped: filter_fn"
    assert report["0.self_attn"].reason == (
        "MultiheadAttention's in_proj_weight, in_proj_bias: no projection (q_proj, k_proj, v_proj, "
        "out_proj) is selected and can be changed"
    )
    with pytest.raises(ValueError, match="strict"):
        verb(model, filter_fn=["0.*", "nothing"], strict=True)
    assert model[0].self_attn is attention and attention.in_proj_weight is weight


@pytest.mark.parametrize("verb", [quantize_, prepare_qat_])
def test_the_other_layers_of_an_encoder_layer_alone(verb: Any, tmp_path: Path) -> None:
    model = nn.Sequential(encoder_layer(dropout=0.0), nn.Linear(64, 64)).eval()
    empty = copy.deepcopy(model)
    keys, x = [*model.state_dict()], floats(3, 7, 64)
    report = verb(model, filter_fn="*linear1", strict=True)
    assert [row.name for row in report.changed] == ["0.linear1"]
    assert type(model[0].self_attn.q_proj) is nn.Linear
    if verb is prepare_qat_:
        torchquant.convert_(model)
    with torch.no_grad():
        expected = model(x)
        torchquant.save(model, tmp_path / "model.safetensors")
        assert torch.equal(torchquant.load(tmp_path / "model.safetensors", empty)(x), expected)
        assert close(to_float_(model) and model(x), expected)
    assert [*model.state_dict()] == keys


def test_a_joint_weight_of_two_modules_stays_tied_in_training() -> None:
    first, second = (nn.MultiheadAttention(64, 4) for _ in range(2))
    second.in_proj_weight = first.in_proj_weight
    model = nn.ModuleList([first, second])
    count = sum(parameter.numel() for parameter in model.parameters())
    prepare_qat_(model)
    assert model[0].q_proj.weight is model[1].q_proj.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_code_that_reads_the_joint_weight_keeps_it() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.attention.in_proj_weight)

    model = nn.Sequential(Reader(), nn.Linear(64, 64))
    report = quantize_(model)
    assert outcome(report)["0.attention.out_proj"] == (
        "skipped: nn.MultiheadAttention reads its weight"
    )
    assert type(model[0].attention) is nn.MultiheadAttention


def test_hooks_stay() -> None:
    model, calls = nn.Sequential(encoder_layer()).eval(), []
    attention = model[0].self_attn
    handles = [attention.register_forward_hook(lambda *args: calls.append("attention"))]
    handles.append(attention.out_proj.register_forward_hook(lambda *args: calls.append("out")))
    quantize_(model)
    model(floats(2, 3, 64))
    assert calls == ["out", "attention"]
    to_float_(model)
    model(floats(2, 3, 64))  # torch's module does not call out_proj
    assert calls == ["out", "attention", "attention"]
    quantize_(model)
    model(floats(2, 3, 64))
    assert calls == ["out", "attention", "attention", "out", "attention"]
    for handle in handles:
        handle.remove()
    model(floats(2, 3, 64))
    assert len(calls) == 5


def test_training_is_what_is_deployed() -> None:
    model = nn.Sequential(encoder_layer(dropout=0.0), nn.Linear(64, 64))
    x, mask = floats(3, 7, 64), padding()
    report = prepare_qat_(model)
    assert report.notes[-1] == "Their weights are new parameters: create the optimizer after this."
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model[0].self_attn.q_proj.weight.detach().clone()
    model[0](x, src_key_padding_mask=mask).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].self_attn.q_proj.weight)
    with torch.no_grad():
        trained = model(x)
        model.eval()
        expected = [model(x), model[0](x, src_key_padding_mask=mask)]
        torchquant.convert_(model)
        got = [model(x), model[0](x, src_key_padding_mask=mask)]
    assert torch.equal(trained, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_static_activations() -> None:
    model = nn.Sequential(encoder_layer()).eval()
    batches = [torch.randn(3, 7, 64) for _ in range(3)]
    expected = model(batches[0])
    torchquant.prepare_(model)
    torchquant.calibrate(model, batches, progress=False)
    torchquant.convert_(model)
    assert all(isinstance(getattr(model[0].self_attn, n), QuantizedModule) for n in PROJECTIONS)
    assert close(model(batches[0]), expected)


def test_memory_of_the_joint_weight_is_released() -> None:
    model = nn.Sequential(nn.MultiheadAttention(64, 4))
    storage = model[0].in_proj_weight.untyped_storage()
    storages = [storage.data_ptr()]
    del storage
    quantize_(model)
    gc.collect()
    alive = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
    assert not any(
        t.untyped_storage().data_ptr() in storages for t in alive if type(t) is nn.Parameter
    )
