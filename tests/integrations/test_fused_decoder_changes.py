"""Changes of a fused model that leave its modules and parameters the same objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchquant

transformers = pytest.importorskip("transformers")

from support.decoders import IDS, Static, counted, logits, model  # noqa: E402


def near(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() <= 2e-2 * expected.norm())


def other_memory(net: Any) -> None:
    weight = net.model.layers[0].input_layernorm.weight
    weight.data = 3 * weight.data.flip(0)


def vector(net: Any) -> None:
    norms = [layer.input_layernorm.weight for layer in net.model.layers]
    values = torch.cat([norm.detach().flip(0) ** 3 for norm in norms])
    nn.utils.vector_to_parameters(values, norms)


@pytest.mark.parametrize("change", [other_memory, vector])
def test_parameters_with_other_memory(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin = model(), model()
    torchquant.fuse_decoder_(net)
    before = logits(net)
    for one in (net, twin):
        change(one)
    with counted(monkeypatch) as calls:
        got = logits(net)
    assert calls == [IDS.shape[1]]
    assert near(got, logits(twin)) and not near(got, before)


def test_biases_with_other_memory() -> None:
    net, twin = (model("Llama", attention_bias=True) for _ in range(2))
    torchquant.fuse_decoder_(net)
    before = logits(net)
    for one in (net, twin):
        bias = one.model.layers[1].self_attn.v_proj.bias
        bias.data = -4 * bias.data
    got = logits(net)
    assert near(got, logits(twin)) and not near(got, before)


def static(seed: int) -> Any:
    """A model whose output projections have static activations."""
    net = model(configuration=None)
    for layer in net.model.layers:
        with torch.no_grad():
            layer.self_attn.v_proj.weight.mul_(seed)
    torchquant.prepare_(net, Static(), filter_fn="*o_proj")
    torchquant.calibrate(net, [{"input_ids": IDS}])
    torchquant.convert_(net)
    torchquant.quantize_(net)
    return net


def test_scales_of_inputs_are_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = static(1), static(4)
    torchquant.fuse_decoder_(net)
    before = logits(net)
    net.load_state_dict(other.state_dict())
    with counted(monkeypatch) as calls:
        got = logits(net)
        assert near(got, logits(other)) and not near(got, before)
        with torch.no_grad():
            for one in (net, other):
                one.model.layers[0].self_attn.o_proj.input_scale.mul_(0.25)
        assert near(logits(net), logits(other)) and not near(got, logits(other))
    assert calls == [IDS.shape[1]] * 2


def test_memory_is_shared_with_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    expected = logits(net)
    net.share_memory()
    with counted(monkeypatch) as calls:
        assert torch.equal(logits(net), expected)
    assert calls == [IDS.shape[1]]
