"""Groups of layers on one tensor that are rejected, and the reasons in the report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.projections import Attention, Calls, X, both, lines
from torch import Tensor, nn
from torch.nn import functional as F

from torchquant import (
    Fusion,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    QuantizationConfig,
    quantize_,
)
from torchquant.nn import QuantizedLinear


def changed(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    module: nn.Module = type("Changed", (Attention,), {"forward": body})()
    return module


def in_place(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x.mul_(2)
    return q + net.k(x) + net.v(x)


def augmented(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x += 1
    return q + net.k(x) + net.v(x)


def through_data(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x.data.add_(1)
    return q + net.k(x) + net.v(x)


def through_a_view(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = x[..., :8]
    q = net.q(x)
    y.zero_()
    return q + net.k(x) + net.v(x)


def items(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    x[..., 0] = 5
    return q + net.k(x) + net.v(x)


def relu_in_place(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    F.relu(x, inplace=True)
    return q + net.k(x) + net.v(x)


def out(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = net.q(x)
    torch.add(x, 1, out=x)
    return q + net.k(x) + net.v(x)


def autocast_between(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        k, v = net.k(x), net.v(x)
    return q + k + v


def gradients_between(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    with torch.inference_mode():
        k, v = net.k(x), net.v(x)
    return q + k + v


def data_dependent(net: Any, x: Tensor) -> Tensor:
    q = net.q(x)
    if x.sum() > 1e9:
        x.zero_()
    return q + net.k(x) + net.v(x)


CHANGING = (
    *(in_place, augmented, through_data, through_a_view, items, relu_in_place, out),
    *(autocast_between, gradients_between, data_dependent),
)


@pytest.mark.parametrize("body", CHANGING, ids=lambda body: body.__name__)
def test_code_between_the_calls_that_changes_the_tensor(
    shared: Calls, gradients_off: None, body: Callable[[Any, Tensor], Tensor]
) -> None:
    plain, model, report = both(changed(body))
    assert model.q._group is None
    assert lines(report) in (["fused: k, v: one product"], [])
    assert_same_bits(model(X), plain(X))
    assert_same_bits(model(X), plain(X))
    assert all(count == 2 for count in shared)


def test_a_change_of_the_outputs_is_permitted(shared: Calls, gradients_off: None) -> None:
    def scaled(net: Any, x: Tensor) -> Tensor:
        q = net.q(x)
        q *= 0.5
        k = net.k(x).view(2, 5, 4, 16) * q.view(2, 5, 4, 16)
        return q + k.flatten(2) + net.v(x)  # type: ignore[no-any-return]

    plain, model, report = both(changed(scaled))
    assert lines(report) == ["fused: q, k, v: one product"]
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_norms_between_as_in_qwen(shared: Calls, gradients_off: None) -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.norm(self.q(x)) + self.norm(self.k(x)) + self.v(x)  # type: ignore[no-any-return]

    plain, model, report = both(Normed())
    assert lines(report) == ["fused: q, k, v: one product"]
    assert_same_bits(model(X), plain(X))
    assert shared == [3]


def test_an_unknown_module_on_the_tensor_between_the_calls(
    shared: Calls, gradients_off: None
) -> None:
    class Evil(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    class Net(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.evil = Evil()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.q(x) + self.evil(x) + self.k(x)  # type: ignore[no-any-return]

    plain, model, report = both(Net())
    assert lines(report) == []
    assert_same_bits(model(X.clone()), plain(X.clone()))
    assert shared == []


def test_another_order_on_another_path() -> None:
    class Net(Attention):
        def forward(self, x: Tensor, swap: bool = False) -> Tensor:  # type: ignore[override]
            if swap:
                return self.k(x) + self.q(x)  # type: ignore[no-any-return]
            return self.q(x) + self.k(x)  # type: ignore[no-any-return]

    plain, model, report = both(Net())
    assert lines(report) == ["fused: k, q: one product"]
    with torch.no_grad():
        for swap in (True, False, True, False):
            assert_same_bits(model(X, swap), plain(X, swap))


def test_layers_that_do_not_fit_together() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 72)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.a(x), self.b(x)), -1)

    assert lines(both(Net())[2]) == ["not fused: a, b: out_features must be a multiple of 16"]


def test_hooks_and_second_places() -> None:
    attention = Attention()
    attention.k.register_forward_pre_hook(lambda module, args: (args[0].mul_(2), None)[1])
    plain, model, _ = both(attention)
    with torch.no_grad():
        assert_same_bits(model(X.clone()), plain(X.clone()))
    attention = Attention()
    attention.again = attention.k
    assert lines(both(attention)[2]) == [
        "not fused: q, k, v: a layer is registered in more than one place"
    ]


def test_switched_off_and_the_default() -> None:
    model = Attention()
    assert quantize_(model, fusion=Fusion(projections=False)).fusions == ()
    assert isinstance(model.q, QuantizedLinear)
    assert model.q._group is None
    assert Fusion().projections


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (IntxWeightOnlyConfig(4, 32), "their weights have fewer bits or groups"),
        (IntxWeightOnlyConfig(8, 32), "their weights have fewer bits or groups"),
        (Int8WeightOnlyConfig(), "their inputs stay float"),
    ],
)
def test_weights_of_few_bits_are_computed_one_by_one(
    config: QuantizationConfig, reason: str
) -> None:
    model = Attention().eval()
    line = f"not fused: q, k, v: {reason}, where one product saves little"
    assert lines(quantize_(model, config)) == [line]
