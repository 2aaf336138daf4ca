"""QATConvBn2d: the float batch norm is the oracle in training, the deployed layer when frozen."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support import assert_same_bits, check_everywhere, generator, leaf
from support.conv_modules import TRAINING
from torch import Tensor, nn

from torchquant import ObservedQuantizer
from torchquant.nn import QATConvBn2d

SIZES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "bias": {"padding": 1, "bias": True},
    "same_groups": {"padding": "same", "groups": 2},
    "depthwise": {"groups": 8, "stride": 2},
}


def parts(name: str = "3x3", **options: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution and a batch norm with statistics and gains of any sign."""
    torch.manual_seed(1)
    given = {"bias": False, **SIZES[name]}
    conv, bn = nn.Conv2d(8, 16, 3, **given), nn.BatchNorm2d(16, **options)
    with torch.no_grad():
        if bn.weight is not None:
            bn.weight.uniform_(-2, 2)
            bn.bias.normal_()
        assert bn.running_mean is not None and bn.running_var is not None
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.2, 2)
    return conv, bn


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, 7, 9, generator=generator(seed)) + 0.3


def layer_of(name: str = "3x3", config: str = "dynamic", activation: str = "none") -> QATConvBn2d:
    layer = QATConvBn2d.from_float(*parts(name), TRAINING[config], activation)
    layer(batch(5))
    return layer


def frozen(layer: QATConvBn2d) -> QATConvBn2d:
    for module in layer.modules():
        if isinstance(module, ObservedQuantizer):
            module.freeze()
    return layer.freeze_statistics()  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", TRAINING)
@pytest.mark.parametrize("name", SIZES)
def test_frozen_statistics_give_the_bits_of_the_deployed_layer(name: str, config: str) -> None:
    layer = frozen(layer_of(name, config, "relu"))
    deployed = layer.to_quantized()
    want = deployed(batch()).detach()
    for training in (True, False):
        layer.train(training)
        check_everywhere(lambda: layer(batch()).detach(), want, what=(name, config, training))
    assert type(deployed).__name__ == "QuantizedConv2d" and deployed.bias is not None
    assert deployed.activation == "relu" and deployed.bias.requires_grad
    # Evaluation does not need frozen statistics.
    thawed = layer_of(name, config).eval()
    assert_same_bits(thawed(batch()).detach(), thawed.to_quantized()(batch()).detach())


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_training_follows_the_float_batch_norm(name: str, options: dict[str, Any]) -> None:
    conv, bn = parts(name, **options)
    float_conv, float_bn = copy.deepcopy(conv), copy.deepcopy(bn)
    layer = QATConvBn2d.from_float(conv, bn)
    x, same = leaf(batch()), leaf(batch())
    y, want = layer(x), float_bn(float_conv(same))
    assert float((y - want).abs().max()) < 0.1
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad)
    ours = {"input": x.grad, **{k: p.grad for k, p in [*conv.named_parameters()]}}
    theirs = {"input": same.grad, **{k: p.grad for k, p in [*float_conv.named_parameters()]}}
    ours |= {f"bn.{k}": p.grad for k, p in bn.named_parameters()}
    theirs |= {f"bn.{k}": p.grad for k, p in float_bn.named_parameters()}
    for key, value in theirs.items():
        if key == "bias":  # the batch's mean takes a bias of the convolution away
            assert ours[key] is None or float(ours[key].abs().max()) < 1e-3
            continue
        assert float(torch.cosine_similarity(ours[key].flatten(), value.flatten(), 0)) > 0.998, key
        assert abs(float(ours[key].norm() / value.norm()) - 1) < 0.05, key
    for key, buffer in bn.named_buffers():
        expected = dict(float_bn.named_buffers())[key]
        torch.testing.assert_close(buffer, expected, atol=0.02, rtol=0.02, msg=key)


def test_a_gain_of_zero_gets_a_gradient() -> None:
    """Residual networks start their last gains at 0."""
    conv, bn = parts()
    nn.init.zeros_(bn.weight)
    layer = QATConvBn2d.from_float(conv, bn)
    before = copy.deepcopy(dict(bn.named_buffers()))
    y = layer(batch())
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y, bn.bias.reshape(-1, 1, 1).expand_as(y))
    (y * torch.randn_like(y)).sum().backward()
    assert bn.weight.grad is not None and bool(bn.weight.grad.isfinite().all())
    assert bool((bn.weight.grad != 0).all())
    assert torch.equal(bn.running_var, before["running_var"])  # the output says nothing about it


def test_statistics_are_updated_in_training_only() -> None:
    layer = layer_of()
    bn = layer.bn

    def statistics() -> list[Tensor]:
        return [buffer.clone() for buffer in bn.buffers()]

    def changes(*, training: bool) -> bool:
        before = statistics()
        layer.train(training)(batch())
        return not all(map(torch.equal, before, statistics()))

    assert changes(training=True) and not changes(training=False)
    assert not layer.keeps_statistics and not bn.training
    layer.train().freeze_statistics()
    assert not changes(training=True) and layer.keeps_statistics and not bn.training
    assert "statistics frozen" in repr(layer)
    layer.freeze_statistics(False)
    assert changes(training=True) and bn.training


def test_in_float_the_layer_is_the_float_pair() -> None:
    conv, bn = parts()
    pair = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(bn))
    layer = QATConvBn2d.from_float(conv, bn, TRAINING["static"]).enable_quantization(False)
    assert_same_bits(layer(batch()).detach(), pair(batch()).detach())
    layer.eval()
    pair.eval()
    assert_same_bits(layer(batch()).detach(), pair(batch()).detach())
    for ours, theirs in zip(bn.buffers(), pair[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_and_state_dicts() -> None:
    for config in TRAINING:
        layer = frozen(layer_of("bias", config))
        other = QATConvBn2d.from_float(*parts("bias"), TRAINING[config])
        other.load_state_dict(layer.state_dict())
        for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert made.keeps_statistics
            frozen(made).train()
            assert_same_bits(made(batch()).detach(), layer(batch()).detach())
    names = set(QATConvBn2d.from_float(*parts()).state_dict())
    assert {"weight", "bn.weight", "bn.running_var", "statistics_frozen"} <= names


def test_the_parts_are_the_same_objects() -> None:
    conv, bn = parts("bias")
    layer = QATConvBn2d.from_float(conv, bn)
    assert layer.weight is conv.weight and layer.bias is conv.bias and layer.norms == (bn,)
    back = layer.to_float()
    assert type(back) is nn.Conv2d and back.weight is conv.weight
    made = QATConvBn2d(8, 16, 3, padding=1, eps=1e-3, momentum=0.2, config=TRAINING["static"])
    assert (made.bn.eps, made.bn.momentum, made.bias) == (1e-3, 0.2, None)
    made(batch())


@pytest.mark.parametrize(
    ("bn", "error", "text"),
    [
        (nn.BatchNorm2d(8), ValueError, "a batch norm of 8 channels after a convolution with 16"),
        (
            nn.BatchNorm2d(16, track_running_stats=False),
            ValueError,
            "a batch norm without running statistics (track_running_stats=False)",
        ),
        (
            nn.SyncBatchNorm(16),
            TypeError,
            "SyncBatchNorm, which is not exactly an nn.BatchNorm2d",
        ),
        (
            nn.BatchNorm2d(16, device="meta"),
            ValueError,
            "a batch norm on meta, the convolution on another device",
        ),
    ],
    ids=["channels", "statistics", "class", "device"],
)
def test_a_batch_norm_that_does_not_fit(bn: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        QATConvBn2d.from_float(parts()[0], bn)
    assert str(raised.value) == (f"QATConvBn2d.from_float: bn must fit the convolution, got {text}")


def test_one_value_per_channel_is_refused() -> None:
    layer = QATConvBn2d(8, 16, 3)
    with pytest.raises(ValueError, match=r"must give more than one value per channel, got an out"):
        layer(torch.randn(1, 8, 3, 3))
    assert layer.eval()(torch.randn(1, 8, 3, 3)).shape == (1, 16, 1, 1)


def test_low_precision() -> None:
    conv, bn = parts()
    layer = QATConvBn2d.from_float(conv.bfloat16(), bn)
    x = batch().bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.bfloat16
    frozen(layer)
    assert_same_bits(layer(x).detach(), layer.to_quantized()(x).detach())
