"""Layers whose weight the code around them reads: what the verbs do with them, and say."""

import copy

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import outcome
from torch import Tensor, nn
from torch.nn import functional as F

import torchquant
from torchquant.graph.weight_reads import Reads, weight_reads
from torchquant.nn import QATLinear, QuantizedLinear


class Window(nn.Module):
    """As torchvision's Swin, timm's BEiT and EVA02: it multiplies with the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.linear(x, self.qkv.weight, self.qkv.bias))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """As T5: it asks for the dtype of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wi(x).relu()
        if isinstance(self.wo.weight, Tensor) and hidden.dtype != self.wo.weight.dtype:
            hidden = hidden.to(self.wo.weight.dtype)
        return self.wo(hidden)  # type: ignore[no-any-return]


class Rescaling(nn.Module):
    """As RWKV: it changes weights in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            self._rescale()
        for block in self.blocks:
            x = block(x)
        return x

    def _rescale(self) -> None:
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block.weight.div_(2**index)
        self.rescaled = True


class Inherited(Window):
    """Replaces the forward that reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x))  # type: ignore[no-any-return]


class Extended(Window):
    """Calls the forward that reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Initialized(nn.Module):
    """Reads and changes weights only where it is created, loaded or tied."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.reset_parameters()
        self.fix_init_weight()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fc.weight)

    def fix_init_weight(self) -> None:
        self.fc.weight.data.div_(2)

    def tie_weights(self, other: nn.Parameter) -> None:
        self.fc.weight = other

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def reads_of(model: nn.Module) -> dict[str, Reads]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[key]: value for key, value in weight_reads(model).items()}


def test_reads_are_found_without_running_the_model() -> None:
    assert reads_of(Window()) == {"qkv": Reads("Window.forward", True)}
    assert reads_of(nn.Sequential(FeedForward())) == {"0.wo": Reads("FeedForward.forward", False)}
    rescaled = Reads("Rescaling._rescale", True, True)
    assert reads_of(Rescaling()) == {"blocks.0": rescaled, "blocks.1": rescaled}
    assert reads_of(Inherited()) == {}
    assert reads_of(Extended()) == {"qkv": Reads("Extended.forward", True)}
    assert reads_of(Initialized()) == {}
    assert reads_of(nn.Transformer(64, 4, 1, 1, 64)) == {}


def test_quantize_takes_a_layer_whose_weight_is_read_and_says_so() -> None:
    model, x = Window().eval(), floats(5, 64)
    wanted = model(x)
    report = torchquant.quantize_(model, strict=True)
    assert outcome(report) == {
        "qkv": "quantized: Window.forward reads its weight",
        "proj": "quantized",
    }
    qkv = model.qkv
    assert isinstance(qkv, QuantizedLinear)
    assert_same_bits(model(x).detach(), model.proj(qkv(x)).detach())
    assert F.cosine_similarity(model(x).flatten(), wanted.flatten(), 0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_whose_dtype_is_asked_for_is_quantized_and_trained(dtype: torch.dtype) -> None:
    model, x = FeedForward().to(dtype), floats(5, 64, dtype=dtype)
    asked = "FeedForward.forward reads the dtype, device or shape of its weight"
    quantized = copy.deepcopy(model)
    report = torchquant.quantize_(quantized)
    assert outcome(report) == {"wi": "quantized", "wo": f"quantized: {asked}"}
    assert quantized(x).dtype == dtype
    report = torchquant.prepare_qat_(model, torchquant.QATConfig(weight_bits=4), strict=True)
    assert outcome(report) == {"wi": "prepared", "wo": "prepared"}
    expected, trained = model(x).detach(), copy.deepcopy(model)
    torchquant.convert_(model)
    assert_same_bits(model(x).detach(), expected)
    assert torchquant.verify(trained, model, [x]).exact


def test_a_layer_whose_weight_is_changed_stays_in_float() -> None:
    model, x = Rescaling().eval(), floats(5, 64)
    wanted = copy.deepcopy(model)(x)
    refused = "skipped: Rescaling._rescale changes its weight"
    assert outcome(torchquant.quantize_(model)) == {"blocks.0": refused, "blocks.1": refused}
    assert_same_bits(model(x).detach(), wanted.detach())
    with pytest.raises(ValueError, match=r"blocks.0: Rescaling\._rescale changes its weight"):
        torchquant.quantize_(Rescaling(), strict=True)


def test_training_does_not_take_a_layer_whose_weight_is_read() -> None:
    """It would train in float, because the weight that is read is not quantized."""
    model, x = Window(), floats(5, 64)
    qkv = model.qkv
    reason = "Window.forward reads its weight, so training would not see the quantized one"
    report = torchquant.prepare_qat_(model, torchquant.QATConfig(weight_bits=2))
    assert outcome(report) == {"qkv": f"skipped: {reason}", "proj": "prepared"}
    assert model.qkv is qkv and isinstance(model.proj, QATLinear)
    with pytest.raises(ValueError, match=f"qkv: {reason}"):
        torchquant.prepare_qat_(Window(), strict=True)
    model(x).sum().backward()
    expected, trained = model(x).detach(), copy.deepcopy(model)
    torchquant.convert_(model)
    assert_same_bits(model(x).detach(), expected)
    assert torchquant.verify(trained, model, [x]).exact


class Hidden(nn.Module):
    """Reads a weight in a way that the code does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        weight = dict(self.fc.named_parameters())["weight"]
        return self.last(x @ weight.T)  # type: ignore[no-any-return]


def test_convert_names_prepared_layers_that_no_forward_called() -> None:
    model = Hidden()
    torchquant.prepare_qat_(model)
    untrained = copy.deepcopy(model)
    model(floats(5, 64)).sum().backward()
    note = "Not called by any forward since prepare_qat_, so not trained with the integers: fc."
    assert note in torchquant.convert_(model).notes
    assert torchquant.convert_(untrained).notes == ()  # no layer was called at all
