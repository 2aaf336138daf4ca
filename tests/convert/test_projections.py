"""Layers that are applied to one tensor: the same bits in one call."""

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import CONFIGS
from support.projections import Attention, Calls, Decoder, GatedMLP, X, both, lines
from torch import Tensor, nn

from torchquant import QuantizationConfig


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_attention(
    shared: Calls, gradients_off: None, config: QuantizationConfig, bias: bool
) -> None:
    plain, model, report = both(Attention(bias), config)
    assert lines(report) == ["fused: q, k, v: one product"]
    for x in (X, X[0], X[:, :1], X.bfloat16(), X.half(), X.transpose(0, 1)):
        del shared[:]
        assert_same_bits(model(x), plain(x))
        assert shared == [3]


def test_a_gated_mlp(shared: Calls, gradients_off: None) -> None:
    plain, model, report = both(GatedMLP())
    assert [str(fusion) for fusion in report.fusions] == [
        "fused: gate with act (silu)",
        "fused: gate, up: one product",
    ]
    assert_same_bits(model(X), plain(X))
    assert shared == [2]


def test_a_decoder(shared: Calls, gradients_off: None) -> None:
    plain, model, _ = both(Decoder())
    for _ in range(3):
        del shared[:]
        assert_same_bits(model(X), plain(X))
        assert shared == [3, 2, 3, 2]


def test_some_layers_without_a_bias(shared: Calls, gradients_off: None) -> None:
    attention = Attention()
    attention.k = nn.Linear(64, 64, bias=False)
    plain, model, report = both(attention)
    assert lines(report) == ["fused: q, k, v: one product"]
    x = torch.cat([X, torch.zeros(1, 5, 64), -torch.zeros(1, 5, 64)])
    assert_same_bits(model(x), plain(x))
    with torch.no_grad():
        zeros = -torch.zeros(3, 64)
        assert_same_bits(model.k(zeros), plain.k(zeros))
    assert shared == [3]


def test_layers_of_different_widths(shared: Calls, gradients_off: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(100, n) for n in (64, 208, 48, 80))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            first = self.act(self.layers[0](x))
            return torch.cat([first, self.layers[1](x), self.layers[2](x), self.layers[3](x)], -1)

    plain, model, report = both(Net())
    x = floats(7, 100)
    assert_same_bits(model(x), plain(x))
    assert lines(report) == ["fused: layers.0, layers.1, layers.2, layers.3: one product"]
    assert shared == [4]


def test_groups_need_no_additional_memory() -> None:
    _, model, report = both(Attention())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    assert sum(storages.values()) == report.bytes_after
    assert (
        model.q.packed.untyped_storage().data_ptr() == model.v.packed.untyped_storage().data_ptr()
    )


def test_the_parameters_stay_the_same_objects_and_trainable() -> None:
    plain, model, _ = both(Attention())
    bias = model.k.bias
    assert isinstance(bias, nn.Parameter)
    assert bias.is_leaf
    assert bias.requires_grad
    for net in (plain, model):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(X).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert_same_bits(model(X), plain(X))


def test_values_changed_in_place_take_effect(shared: Calls) -> None:
    plain, model, _ = both(Attention())
    with torch.no_grad():
        model(X)
        for net in (plain, model):
            net.k.bias.add_(1)
            net.v.weight_scale.mul_(2)
        assert_same_bits(model(X), plain(X))
        for net in (plain, model):
            net.k.bias.data = net.k.bias.data + 1
        assert_same_bits(model(X), plain(X))
        for net in (plain, model):
            net.q.bias = nn.Parameter(torch.ones(64))
        assert_same_bits(model(X), plain(X))
    assert shared == [3, 3]
