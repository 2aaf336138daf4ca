"""Weights of few bits beside static activations: alone, and in regions with int8 values."""

import copy
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import float_layer
from torch import Tensor, nn

import torchquant
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    PerGroup,
    QuantizationConfig,
    Static,
    Weights,
    calibrate,
    convert_,
    functional,
    prepare_,
)
from torchquant.nn import QuantizedIntxLinear, QuantizedLinear

GROUPS = QuantizationConfig(Weights(4, granularity=PerGroup(32)), Static())
PER_CHANNEL = QuantizationConfig(Weights(4), Static())
INT8 = Int8StaticActivationInt8WeightConfig()
SCALE, ZERO_POINT = torch.tensor([0.03]), torch.tensor([5], dtype=torch.int32)


def expected(layer: QuantizedIntxLinear, x: Tensor) -> Tensor:
    weights = layer.config.weights
    granularity = weights.granularity
    return functional.linear_static_intx(
        x,
        layer.input_scale,
        layer.input_zero_point,
        layer.integers,
        layer.qweight_scale,
        layer.qweight_zero_point,
        layer.bias.detach(),
        bits=weights.bits,
        group_size=granularity.group_size if isinstance(granularity, PerGroup) else None,
        output_dtype=x.dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [GROUPS, PER_CHANNEL], ids=["groups", "per_channel"])
def test_a_layer(config: QuantizationConfig, dtype: torch.dtype) -> None:
    layer = QuantizedIntxLinear.from_float(
        float_layer(), config, input_scale=SCALE, input_zero_point=ZERO_POINT
    )
    x = floats(5, 64, dtype=dtype)
    assert_same_bits(layer(x).detach(), expected(layer, x))
    assert list(layer.state_dict())[:4] == [
        "qweight",
        "qweight_scale",
        "input_scale",
        "input_zero_point",
    ]
    assert_same_bits(copy.deepcopy(layer)(x).detach(), layer(x).detach())
    with pytest.raises(ValueError, match=r"from_float: input_scale must be given for static"):
        QuantizedIntxLinear.from_float(float_layer(), config)


def test_one_scale_per_channel_has_the_bits_of_int8() -> None:
    arguments = {"input_scale": SCALE, "input_zero_point": ZERO_POINT}
    low = QuantizedIntxLinear.from_float(float_layer(), PER_CHANNEL, **arguments)
    int8 = QuantizedLinear.from_float(float_layer(), PER_CHANNEL, **arguments)
    x = floats(7, 64)
    assert_same_bits(low(x).detach(), int8(x).detach())
    assert QuantizedLinear.class_for(PER_CHANNEL) is QuantizedLinear


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((64, 96), (96, 64), (64, 96), (96, 64))
    parts = [part for k, n in sizes for part in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*parts).eval()


def test_groups_in_a_region(tmp_path: Path) -> None:
    """A layer with groups takes and gives float values; the layers around it stay int8."""
    model, x = network(), floats(16, 64)
    prepare_(model, {"4": GROUPS, "*": INT8})
    calibrate(model, [x, -x])
    report = convert_(model)
    assert report["4"].weights == "int4 in groups of 32" and report["2"].weights.startswith("int8")
    assert isinstance(model[4], QuantizedIntxLinear) and isinstance(model[2], QuantizedLinear)
    assert len(report.regions) == 1 and report.regions[0].action == "int8"
    with torch.no_grad():
        found, seen = model(x), []
        model[4].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        assert_same_bits(model(x), found)
    assert seen and seen[0][0].dtype == torch.float32
    assert_same_bits(seen[0][1], expected(model[4], seen[0][0]))
    model[4]._forward_hooks.clear()
    torchquant.save(model, tmp_path / "file")
    loaded = torchquant.load(tmp_path / "file", network())
    with torch.no_grad():
        assert_same_bits(loaded(x), found)


class Outside(nn.Module):
    """Its forward cannot be recorded: it depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x)) if float(x.sum()) < 1e9 else x
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_fewer_bits_per_channel_outside_of_regions(trained: bool, tmp_path: Path) -> None:
    """Where no program runs the layers, they take as many bits as they have."""
    torch.manual_seed(1)
    model, x = Outside().eval(), floats(16, 64)
    if trained:
        torchquant.prepare_qat_(model, torchquant.QATConfig(weight_bits=4, activations="static"))
        model.train()(x)
        model.eval()
    else:
        prepare_(model, PER_CHANNEL)
        calibrate(model, [x, -x])
    before = copy.deepcopy(model)
    report = convert_(model)
    assert {type(layer) for layer in model.children()} == {QuantizedIntxLinear}
    assert report["up"].weights == "int4 per channel"
    assert report["up"].bytes_after < 0.2 * report["up"].bytes_before
    if trained:
        assert torchquant.verify(before, model, [x]).exact
    seen: list[Tensor] = []
    model.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        found = model(x)
        assert_same_bits(found, expected(model.down, seen[0]))
        torchquant.save(model, tmp_path / "file")
        assert_same_bits(torchquant.load(tmp_path / "file", Outside().eval())(x), found)


def test_fewer_bits_per_channel_in_a_region() -> None:
    """These layers are int8 inside, so that programs run them."""
    model, x = network(), floats(16, 64)
    prepare_(model, PER_CHANNEL)
    calibrate(model, [x, -x])
    report = convert_(model)
    assert {type(model[index]) for index in (0, 2, 4, 6)} == {QuantizedLinear}
    assert report.regions[0].action == "int8"
