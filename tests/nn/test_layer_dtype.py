"""The dtype of quantized layers: that of the float layer; the bias is the float layer's own."""

import copy
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import ASYMMETRIC, expected_output, float_layer, layer_of
from torch import Tensor, nn

import torchquant
from torchquant.nn import QuantizedLinear

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_bias_in_low_precision_is_added_in_float32(dtype: torch.dtype, activation: str) -> None:
    low = layer_of(ASYMMETRIC, activation, dtype=dtype)
    wide = copy.deepcopy(low)
    wide.bias.data = low.bias.detach().float()
    for x in (floats(3, 64), floats(3, 64, dtype=dtype), floats(2, 3, 64)[:, ::2]):
        assert_same_bits(low(x).detach(), wide(x).detach())
        assert_same_bits(low(x).detach(), expected_output(low, x))
    x = floats(3, 64).requires_grad_()
    low(x).sum().backward()
    wide(x).sum().backward()
    assert low.bias.grad.dtype == dtype
    assert_same_bits(low.bias.grad, wide.bias.grad.to(dtype))


def test_the_bias_is_the_parameter_of_the_float_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    first, second = model[0].bias, model[1].bias
    torchquant.quantize_(model)
    assert model[0].bias is first
    torchquant.to_float_(model)
    assert model[0].bias is first and model[1].bias is second
    torchquant.prepare_qat_(model)
    torchquant.convert_(model)
    assert model[0].bias is first and model[1].bias is second


class Tied(nn.Module):
    """Like the heads of BERT: the bias of the layer is also a parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(64, 64)
        self.bias = nn.Parameter(floats(64))
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(x)
        return result


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_bias_stays_tied(tmp_path: Path, meta: bool, dtype: torch.dtype) -> None:
    model, x = Tied().to(dtype), floats(3, 64, dtype=dtype)
    torchquant.quantize_(model)
    with torch.no_grad():
        model.bias += 1
    expected = model(x).detach()
    torchquant.save(model, tmp_path / "file")
    if meta:
        with torch.device("meta"):
            other = Tied()
    else:
        other = Tied()
    for copied in (torchquant.load(tmp_path / "file", other), copy.deepcopy(model)):
        assert copied.decoder.bias is copied.bias
        assert_same_bits(copied(x).detach(), expected)
        with torch.no_grad():
            copied.bias += 5
        assert not torch.equal(copied(x), expected)


class Casting(nn.Module):
    """Casts its input as many models do."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64, bias=bias)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        return self.norm(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_a_model_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype, bias: bool) -> None:
    model = Casting(bias).to(dtype)
    torchquant.quantize_(model)
    expected = model(floats(3, 64))
    assert expected.dtype == dtype
    torchquant.save(model, tmp_path / "file")
    with torch.device("meta"):
        other = Casting(bias)
    other = torchquant.load(tmp_path / "file", other)
    assert other.body.dtype == other.body.weight.dtype == dtype
    assert_same_bits(other(floats(3, 64)).detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_a_model_without_biases_answers_for_its_device_and_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))

    quantized = model().to(dtype)
    torchquant.quantize_(quantized)
    parameter = next(quantized.parameters())
    assert (parameter.dtype, parameter.device.type, parameter.requires_grad) == (
        dtype,
        "cpu",
        False,
    )
    assert sum(p.numel() for p in quantized.parameters()) == 0
    assert list(quantized.state_dict()) == [
        f"{i}.{name}" for i in range(2) for name in ("qweight", "qweight_scale")
    ]
    empty = copy.deepcopy(quantized).to("meta")
    assert next(empty.parameters()).is_meta
    empty.load_state_dict(quantized.state_dict(), assign=True)
    torchquant.save(quantized, tmp_path / "file")
    with torch.device("meta"):
        loaded = torchquant.load(tmp_path / "file", model())
    for other in (empty, loaded, copy.deepcopy(quantized)):
        assert {(p.dtype, p.device.type) for p in other.parameters()} == {(dtype, "cpu")}
        x = floats(3, 64, dtype=dtype)
        assert_same_bits(other(x).detach(), quantized(x).detach())
    assert next(quantized.half().parameters()).dtype == torch.float16


def test_projections_in_bfloat16_are_computed_together() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)  # type: ignore[no-any-return]

    model = Attention().to(torch.bfloat16).eval()
    plain = copy.deepcopy(model)
    torchquant.quantize_(model)
    torchquant.quantize_(plain, fusion=torchquant.Fusion(projections=False))
    bias, x = model.k.bias, floats(5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_same_bits(model(x), plain(x))
        for other in (model, plain):
            other.k.bias += 1
        assert model.k.bias is bias and bias.dtype == torch.bfloat16
        assert_same_bits(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_trained_layers_convert_with_the_bits_of_their_bias(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    torchquant.prepare_qat_(model)
    x = floats(3, 64, dtype=dtype)
    expected = model(x).detach()
    trained = copy.deepcopy(model)
    torchquant.convert_(model)
    assert model[0].dtype == dtype
    assert_same_bits(model(x).detach(), expected)
    assert torchquant.verify(trained, model, [x]).exact


def test_a_layer_in_another_dtype() -> None:
    layer = QuantizedLinear(64, 32, dtype=torch.bfloat16)
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == torch.bfloat16
    assert QuantizedLinear(64, 32, bias=False, dtype=torch.float16).dtype == torch.float16
    assert layer.to_float().weight.dtype == torch.bfloat16
    assert float_layer().weight.dtype == QuantizedLinear(64, 32).dtype
