"""Activations are fused into quantized layers."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.fusions import KNOWN, Block, assert_fused, fusions, linear
from torch import Tensor, nn

import torchquant
from torchquant import Fusion, quantize_
from torchquant.nn import QuantizedLinear
from torchquant.nn.replaced_activation import ReplacedActivation


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_a_sequential(name: str, dtype: torch.dtype) -> None:
    # Fixed weights: with 3 % of random ones, tanh moves an integer of the next layer by 1.
    torch.manual_seed(0)
    model = nn.Sequential(linear(), KNOWN[name](), linear()).to(dtype).eval()
    keys = set(model.state_dict())
    report = assert_fused(model, floats(9, 64).to(dtype), tolerance=8 * torch.finfo(dtype).eps)
    assert fusions(report) == [f"fused: 0 with 1 ({name})"]
    assert [layer.reason for layer in report.layers] == ["", ""]
    assert (model[0].activation, model[2].activation) == ("none", "none")
    assert isinstance(model[1], ReplacedActivation)
    assert isinstance(model[1], type(KNOWN[name]()))
    assert not model[1].training
    renamed = {key.replace("qweight", "weight") for key in model.state_dict() if "_" not in key}
    assert renamed == keys


def test_the_bits_are_those_of_a_layer_with_that_activation() -> None:
    float_layer = linear()
    model = nn.Sequential(copy.deepcopy(float_layer), nn.GELU())
    quantize_(model)
    x = floats(5, 64)
    expected = QuantizedLinear.from_float(float_layer, activation="gelu")
    assert_same_bits(model(x), expected(x))


def test_in_a_forward() -> None:
    report = assert_fused(Block(), floats(4, 64))
    assert fusions(report) == ["fused: up with act (gelu)"]


def test_in_blocks_that_are_held_in_lists() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(nn.SiLU())])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.shape[0] > 100:  # the model as a whole cannot be traced
                    x = x[:100]
                x = block(x)
            return x

    report = assert_fused(Net(), floats(4, 64))
    assert fusions(report) == [
        "fused: blocks.0.up with blocks.0.act (gelu)",
        "fused: blocks.1.up with blocks.1.act (silu)",
    ]


def test_modules_in_dictionaries_and_lists() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"fc": linear(), "act": nn.ReLU()})
            self.more = nn.ModuleList([nn.ModuleList([linear(), nn.SiLU()])])

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts["act"](self.parts["fc"](x))
            x = self.more[0][1](self.more[0][0](x))
            for _ in range(2):
                x = self.parts["act"](self.parts["fc"](x))
            return x

    report = assert_fused(Net(), floats(4, 64))
    assert fusions(report) == [
        "fused: parts.fc with parts.act (relu)",
        "fused: more.0.0 with more.0.1 (silu)",
    ]


def test_an_activation_that_every_layer_shares() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = linear(), linear(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.act(self.b(self.act(self.a(x))))
            return result

    model = Net()
    report = assert_fused(model, floats(4, 64))
    assert fusions(report) == ["fused: a with act (relu)", "fused: b with act (relu)"]


def test_an_activation_that_blocks_share() -> None:
    act = nn.GELU()
    model = nn.Sequential(Block(act), Block(act))
    report = assert_fused(model, floats(4, 64))
    assert len(report.fusions) == 2
    assert model[0].act is model[1].act
    assert isinstance(model[0].act, ReplacedActivation)


def test_a_layer_that_is_called_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = linear(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.act(self.fc(x))
            return x

    assert_fused(Net(), floats(4, 64))


def test_optional_arguments_and_flags_that_do_not_matter() -> None:
    class Net(Block):
        def forward(  # type: ignore[override]
            self, x: Tensor, mask: Tensor | None = None, scaled: bool = False, *args: Any, **kw: Any
        ) -> Tensor:
            if mask is not None:
                x = x * mask
            if scaled or self.training:
                x = x * 2
            return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]

    assert_fused(Net(), floats(4, 64))


def test_gradients_flow() -> None:
    model = Block().train()
    plain = copy.deepcopy(model)
    quantize_(plain, fusion=Fusion(activations=False))
    quantize_(model)
    gradients = []
    for net in (plain, model):
        x = floats(6, 64).requires_grad_()
        net(x).square().sum().backward()
        assert x.grad is not None
        assert net.up.bias.grad is not None
        gradients.append((x.grad, net.up.bias.grad))
    for expected, got in zip(*gradients, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_copies_and_pickles() -> None:
    model = Block().eval()
    quantize_(model)
    x = floats(3, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert isinstance(other.act, ReplacedActivation)
        assert isinstance(other.act, nn.GELU)
        assert_same_bits(other(x), model(x))


def test_compile() -> None:
    model = Block().eval()
    quantize_(model)
    x = floats(3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same_bits(compiled(x), model(x))


def test_switched_off() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    report = quantize_(model, fusion=Fusion(activations=False))
    assert report.fusions == ()
    assert type(model[1]) is nn.ReLU
    assert model[0].activation == "none"


def test_the_argument() -> None:
    with pytest.raises(TypeError, match=r"quantize_: fusion must be a torchquant.Fusion\(\), got"):
        quantize_(Block(), fusion=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Fusion: activations must be True or False, got 1"):
        Fusion(activations=1)  # type: ignore[arg-type]
    assert torchquant.Fusion is Fusion
