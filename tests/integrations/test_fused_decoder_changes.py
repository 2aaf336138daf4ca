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


# ---------------------------------------------------------------- configurations


def test_attention_weights_that_the_configuration_asks_for() -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    net.set_attn_implementation("eager")
    logits(net)
    net.config.output_attentions = True
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="asks for output_attentions"):
        assert len(net(IDS).attentions) == 2


def test_another_configuration() -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    config = type(net.config).from_dict({**net.config.to_dict(), "num_hidden_layers": 1})
    config._attn_implementation = "sdpa"
    net.model.config = config
    with pytest.warns(RuntimeWarning, match="its configuration names 1 of 2 blocks"):
        logits(net)


def test_attention_that_is_no_longer_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin = model(), model()
    torchquant.fuse_decoder_(net)
    with counted(monkeypatch) as calls, torch.no_grad():
        expected = twin(IDS, is_causal=False).logits
        assert torch.equal(net(IDS, is_causal=False).logits, expected)
        assert calls == []
        assert near(net(IDS, output_attentions=False).logits, twin(IDS).logits)
        assert calls == [IDS.shape[1]]
        for one in (net, twin):
            one.config.is_causal = False
        with pytest.warns(RuntimeWarning, match="its attention is not causal"):
            assert torch.equal(net(IDS).logits, twin(IDS).logits)
        assert not near(twin(IDS).logits, logits(model()))
    assert len(calls) == 1
