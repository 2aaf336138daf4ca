"""Groups of layers on one tensor after copies, moves between devices, and files."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.projections import Attention, Calls, Decoder, X, both
from torch import nn

from torchquant import Fusion, load, quantize_, save


def test_a_deep_copy_has_its_own_groups(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Decoder())
    with torch.inference_mode(False):
        other = copy.deepcopy(model)
    assert_same_bits(other(X), plain(X))
    assert shared == [3, 2, 3, 2]
    mine, its = model.layers[0][1], other.layers[0][1]
    assert its.q._group is its.k._group is not mine.q._group
    assert its.q.packed.untyped_storage().data_ptr() != mine.q.packed.untyped_storage().data_ptr()


def test_a_copy_of_one_member_is_computed_alone(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    for other in (copy.deepcopy(model.k), copy.copy(model.k), pickle.loads(pickle.dumps(model.k))):
        assert other._group is None
        other.packed.zero_()
        if other.bias is not model.k.bias:
            with torch.no_grad():
                other.bias.zero_()
    with torch.no_grad():
        assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_layers_of_a_pickled_model_are_computed_separately(
    shared: Calls, gradients_off: None
) -> None:
    plain, model, _ = both(Decoder())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert_same_bits(other(X), plain(X))
    assert shared == []


def test_state_dicts(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    other_plain, other, _ = both(Attention())
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        assert_same_bits(other(X), plain(X))
        assert shared == [3]
        model.load_state_dict(other_plain.state_dict(), assign=True)
        assert_same_bits(model(X), other_plain(X))
        assert shared == [3]


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu"),
        lambda model: model.double(),
        lambda model: model.share_memory(),
        lambda model: model.apply(lambda module: None),
        lambda model: model.train().eval(),
    ],
)
def test_moves_keep_the_group(
    shared: Calls, gradients_off: None, move: Callable[[nn.Module], Any]
) -> None:
    plain, model, _ = both(Attention())
    move(model)
    move(plain)
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_on_another_device_the_group_forms_again(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    group, state = model.q._group, model.state_dict()
    model.to("meta")
    assert not group.active
    assert model.q._group is group
    model.to_empty(device="cpu")
    assert group.active
    model.load_state_dict(state)
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_a_moved_group_keeps_no_weights_on_the_old_device(gradients_off: None) -> None:
    _, model, _ = both(Attention())
    weights = weakref.ref(model.q._group.packed)
    model.to("meta")
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("there", ["float", "grouped", "plain"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped_file", "plain_file"])
def test_files(shared: Calls, tmp_path: Any, grouped: bool, there: str) -> None:
    plain, model, _ = both(Decoder())
    save(model if grouped else plain, tmp_path / "file")
    other = Decoder()
    if there != "float":
        quantize_(other, fusion=Fusion(projections=there == "grouped"))
    load(tmp_path / "file", other)
    with torch.no_grad():
        assert_same_bits(other(X), plain(X))
    assert shared == ([3, 2, 3, 2] if grouped else [])
    save(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_member_that_is_replaced(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Attention())
    layer = nn.Linear(64, 64)
    for net in (plain, model):
        net.k = layer
    for _ in range(6):
        assert_same_bits(model(X), plain(X))
    assert len(shared) == 3
    for net in (plain, model):
        net.q = layer
    assert_same_bits(model(X), plain(X))
