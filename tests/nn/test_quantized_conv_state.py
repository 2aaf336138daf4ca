"""The state of convolutions: copies, files, state dicts, compiled and exported calls."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.conv_modules import CONFIGS, SIZES, float_conv, input_of, quantized
from support.layers import assert_same_state
from torch import nn

import torchquant
from torchquant.nn import QuantizedConv2d


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def through_a_state_dict(layer: Any) -> Any:
    arguments = {name: getattr(layer, name) for name in layer.stored if name != "bias"}
    other = type(layer)(**arguments, bias=layer.bias is not None, config=layer.config)
    assert other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


def through_an_entry(layer: Any) -> Any:
    other = type(layer).from_entry(layer.entry())
    other.load_state_dict(layer.state_dict(), assign=True)
    return other.train(layer.training)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
    "state_dict": through_a_state_dict,
    "entry": through_an_entry,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("config", ["default", "static"])
@pytest.mark.parametrize("name", SIZES)
def test_copies(name: str, config: str, make: Callable[[Any], Any]) -> None:
    layer = quantized(name, CONFIGS[config], "relu").eval()
    other = make(layer)
    assert_same_state(other, layer)
    assert_same_bits(other(input_of(name)), layer(input_of(name)))
    assert (repr(other), other.training) == (repr(layer), False)
    assert other.packed is not layer.packed and torch.equal(other.packed, layer.packed)


def test_the_state_is_canonical() -> None:
    state = quantized("depthwise", CONFIGS["static"]).state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "qweight": (torch.int8, (16, 1, 3, 3)),
        "qweight_scale": (torch.float32, (16,)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int32, (1,)),
        "bias": (torch.float32, (16,)),
    }


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    layer, other = quantized("3x3"), quantized("1x1", seed=5)
    before = layer(input_of()).detach()
    with pytest.raises(RuntimeError, match=r"qweight must be int8 \[16, 8, 3, 3\], got int8"):
        layer.load_state_dict(other.state_dict())
    assert_same_bits(layer(input_of()).detach(), before)


def test_meta_and_back() -> None:
    layer = quantized("groups")
    state = copy.deepcopy(layer.state_dict())
    want = layer(input_of("groups")).detach()
    empty = layer.to("meta").to_empty(device="cpu")
    assert empty is layer
    layer.load_state_dict(state)
    assert_same_bits(layer(input_of("groups")).detach(), want)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding="same", padding_mode="circular", groups=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=(2, 1), dilation=(1, 2), bias=False),
        nn.Flatten(2),
        nn.Conv1d(32, 32, 5, padding=2),
    ).eval()


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_files(tmp_path: Path, place: str) -> None:
    net, x = model(), torch.randn(2, 16, 9, 9)
    report = torchquant.quantize_(net)
    assert [row.action for row in report.layers] == ["quantized"] * 3
    torchquant.save(net, tmp_path / "file")
    other = torchquant.load(tmp_path / "file", model().to(place))
    assert repr(other) == repr(net)
    assert_same_bits(other(x), net(x))
    again = torchquant.load(tmp_path / "file", other)
    assert_same_bits(again(x), net(x))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    net = model()
    torchquant.quantize_(net)
    torchquant.save(net, tmp_path / "file")
    other = model()
    other[2] = nn.Conv2d(32, 32, 3, dilation=(1, 2), bias=False)
    with pytest.raises(ValueError, match=r"'2' has stride=\[2, 1\] in the file, \[1, 1\] in the"):
        torchquant.load(tmp_path / "file", other)
    other[2] = nn.Conv1d(32, 32, 3)
    with pytest.raises(ValueError, match="a quantized conv2d layer at '2' in the file, Conv1d in"):
        torchquant.load(tmp_path / "file", other)


# ---------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("config", ["default", "static"])
def test_compiled_and_exported_calls_have_the_bits_of_eager_mode(config: str) -> None:
    layer = nn.Sequential(quantized("reflect", CONFIGS[config], "relu")).eval()
    x = input_of("reflect")
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(x), want)
        assert_same_bits(compiled(x[:1]), want[:1])
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        assert_same_bits(program.module()(x[:1]), want[:1])
        assert_same_bits(program.module()(torch.cat([x, x])), torch.cat([want, want]))


def test_symbolic_tracing_keeps_the_layer_as_one_node() -> None:
    layer = nn.Sequential(QuantizedConv2d.from_float(float_conv()), nn.ReLU())
    traced = torch.fx.symbolic_trace(layer)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert_same_bits(traced(input_of()).detach(), layer(input_of()).detach())
