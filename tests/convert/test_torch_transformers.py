"""quantize_ keeps the fast path of torch's own transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import floats
from support.layers import outcome
from torch import nn

from torchquant import quantize_


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """Count the calls of torch.<name>, one of torch's fused paths."""
    calls: list[int] = []
    original = getattr(torch, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, name, count)
        yield calls


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)


@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoder_keeps_its_fast_path(nested: bool) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2) if nested else encoder_layer()
    model = nn.Sequential(encoder, nn.Linear(64, 64)).eval()
    x = floats(3, 7, 64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    expected = [encoder(x), encoder(x, src_key_padding_mask=mask)]
    with torch.inference_mode():
        expected += [encoder(x), encoder(x, src_key_padding_mask=mask)]
    report = quantize_(model)
    assert outcome(report)["1"] == "quantized"
    assert len(report.quantized) == 1
    got = [encoder(x), encoder(x, src_key_padding_mask=mask)]
    with torch.inference_mode(), counted("_transformer_encoder_layer_fwd") as calls:
        got += [encoder(x), encoder(x, src_key_padding_mask=mask)]
    assert len(calls) == (4 if nested else 2), "the fused path must run"
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    model.train()(x).sum().backward()


def test_the_reasons_name_the_fast_path() -> None:
    report = quantize_(nn.Sequential(encoder_layer(), nn.MultiheadAttention(64, 4)))
    fused = "skipped: nn.TransformerEncoderLayer's fast path reads its weight"
    assert outcome(report) == {
        "0.self_attn.out_proj": "skipped: nn.MultiheadAttention reads its weight",
        "0.linear1": fused,
        "0.linear2": fused,
        "1.out_proj": "skipped: nn.MultiheadAttention reads its weight",
    }
    with pytest.raises(ValueError, match="reads its weight"):
        quantize_(nn.Sequential(encoder_layer()), strict=True)


@pytest.mark.parametrize("kdim", [None, 32], ids=["self", "cross"])
def test_multihead_attention_keeps_its_fast_path(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True, kdim=kdim, vdim=kdim).eval()
    model = nn.ModuleList([attention, nn.Linear(64, 64)])
    query = floats(3, 7, 64)
    keys = query if kdim is None else floats(3, 5, kdim)
    with torch.inference_mode():
        expected = attention(query, keys, keys, need_weights=False)[0]
        quantize_(model)
        with counted("_native_multi_head_attention") as calls:
            got = attention(query, keys, keys, need_weights=False)[0]
    assert torch.equal(got, expected)
    assert len(calls) == (1 if kdim is None else 0)


def test_a_decoder_layer_is_quantized_where_torch_calls_its_layers() -> None:
    layer = nn.TransformerDecoderLayer(64, 4, 256, batch_first=True).eval()
    model = nn.Sequential(layer)
    target, memory = floats(2, 5, 64), floats(2, 6, 64)
    with torch.inference_mode():
        before = layer(target, memory)
        report = quantize_(model)
        after = layer(target, memory)
    assert [entry.name for entry in report.quantized] == ["0.linear1", "0.linear2"]
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert cosine.min() > 0.99


def test_a_whole_transformer() -> None:
    model = nn.Transformer(64, 4, 1, 1, 256, batch_first=True).eval()
    report = quantize_(model)
    assert [entry.name for entry in report.quantized] == [
        "decoder.layers.0.linear1",
        "decoder.layers.0.linear2",
    ]
    with torch.inference_mode():
        assert model(floats(2, 5, 64), floats(2, 6, 64)).isfinite().all()
