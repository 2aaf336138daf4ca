"""Tied tensors and shared layers are stored once and stay tied and shared."""

from pathlib import Path

import pytest
import torch
from support import floats
from support.layers import ASYMMETRIC, assert_same_state, unchanged
from support.model_files import (
    TOKENS,
    LanguageModel,
    metadata_of,
    other_small,
    saved_small,
    trained,
)
from torch import nn

from torchquant import load, quantize_, save
from torchquant.nn import QuantizedLinear


def test_ties_are_kept(path: Path) -> None:
    model = trained()
    quantize_(model, filter_fn=lambda module, name: name != "head")
    save(model, path)
    assert metadata_of(path)["aliases"]["head.weight"] == "embedding.weight"
    assert len(path.read_bytes()) < 100 * 64 * 4 + 2 * 64 * 64 + 8000, "stored once"
    fresh = LanguageModel()
    with torch.device("meta"):
        on_meta = LanguageModel()
    went_to_meta = LanguageModel().to("meta")
    assert went_to_meta.head.weight is not went_to_meta.embedding.weight, "torch unties it"
    for other in (fresh, on_meta, went_to_meta):
        load(path, other)
        assert other.head.weight is other.embedding.weight
        assert_same_state(other, model)
        assert other.body[0] is other.body[3]


def test_tensors_that_the_model_does_not_tie_stay_separate(path: Path) -> None:
    model = trained()
    quantize_(model, filter_fn=lambda module, name: name != "head")
    save(model, path)
    other = load(path, LanguageModel(tied=False))
    assert torch.equal(other.head.weight, other.embedding.weight)
    with torch.no_grad():
        other.head.weight.zero_()
    assert bool(other.embedding.weight.any())


def test_a_file_that_contradicts_a_tie_is_refused(path: Path) -> None:
    save(trained(tied=False), path)
    model = LanguageModel()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="two tensors in the file, one tensor in"),
    ):
        load(path, model)
    equal = trained(tied=False)
    with torch.no_grad():
        equal.head.weight.copy_(equal.embedding.weight)
    save(equal, path)
    load(path, model)
    assert model.head.weight is model.embedding.weight


def test_an_untied_head(path: Path) -> None:
    model = trained()
    assert quantize_(model).layers[-1].reason == "untied from embedding.weight"
    save(model, path)
    other = load(path, LanguageModel().eval())
    assert isinstance(other.head, QuantizedLinear)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_shared_layer_is_stored_once(path: Path) -> None:
    linear = nn.Linear(256, 256)
    model = nn.Sequential(linear, nn.Sequential(linear), linear)
    quantize_(model)
    save(model, path)
    assert len(path.read_bytes()) < 1.1 * 256 * 256
    other = nn.Linear(256, 256)
    shared = nn.Sequential(other, nn.Sequential(other), other)
    load(path, shared)
    assert shared[0] is shared[1][0] is shared[2]
    apart = nn.Sequential(
        nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 256)), nn.Linear(256, 256)
    )
    load(path, apart)
    assert apart[0] is not apart[2]
    x = floats(3, 256)
    assert torch.equal(shared(x), model(x))
    assert torch.equal(apart(x), model(x))
    assert apart[0].bias is not apart[2].bias


def test_a_shared_layer_refuses_two_configurations(path: Path) -> None:
    apart = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(apart, filter_fn=lambda module, name: name == "0")
    quantize_(apart, ASYMMETRIC)
    save(apart, path)
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, linear)
    with unchanged(model), pytest.raises(ValueError, match="'1' is a separate layer in the file"):
        load(path, model)


def test_an_activation_that_is_shared_only_in_the_model(path: Path) -> None:
    saved = saved_small(path)
    model = other_small()
    model[2].act = model[1]
    load(path, model)
    assert model[2].act is model[1]
    x = floats(3, 64)
    assert torch.equal(model(x), saved(x))
