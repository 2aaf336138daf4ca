"""load changes the state of a model and nothing else, also if it fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import ASYMMETRIC, assert_same_state, unchanged
from support.model_files import TOKENS, LanguageModel, other_small, refused, saved_small, trained
from torch import nn

from torchquant import Fusion, load, quantize_, save
from torchquant.nn import QuantizedLinear
from torchquant.nn.replaced_activation import ReplacedActivation


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_requires_grad_mode_and_hooks_do_not_change(
    path: Path, requires_grad: bool, training: bool, quantized: bool
) -> None:
    saved_small(path)
    model = other_small().train(training).requires_grad_(requires_grad)
    if quantized:
        quantize_(model, ASYMMETRIC)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    load(path, model)
    assert isinstance(model[0], QuantizedLinear)
    assert all(p.requires_grad is requires_grad for p in model.parameters())
    assert all(module.training is training for module in model.modules())
    model(floats(2, 64))
    assert calls == [1]


def test_the_default_dtype_and_device_are_ignored(path: Path) -> None:
    model = saved_small(path, ASYMMETRIC)
    other = other_small()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            load(path, other)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(other, model)
    assert torch.equal(other(floats(3, 64)), model(floats(3, 64)))


def test_the_model_does_not_depend_on_the_file(path: Path) -> None:
    """safetensors maps the file; writing to the file must not change a loaded model."""
    model = trained()
    quantize_(model)
    save(model, path)
    other = load(path, LanguageModel().eval())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_state(other, model)
    assert all(t.data_ptr() % 64 == 0 for t in other.parameters()), "and is aligned as torch's"


@pytest.mark.parametrize("there", ["float", "fused", "unfused", "meta"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused_file", "plain_file"])
def test_a_file_fits_a_model_in_any_state(path: Path, fused: bool, there: str) -> None:
    saved = saved_small(path, fusion=Fusion(activations=fused))
    model = other_small()
    if there in ("fused", "unfused"):
        quantize_(model, fusion=Fusion(activations=there == "fused"))
    elif there == "meta":
        model.to("meta")
    load(path, model)
    assert [type(m) for m in model] == [type(m) for m in saved]
    assert_same_state(model, saved)
    assert isinstance(model[1], ReplacedActivation if fused else nn.ReLU)
    assert model[0]._fuses_activation is fused
    x = floats(5, 64)
    assert_same_bits(model(x), saved(x))


def test_a_model_with_another_fused_activation_gets_the_one_in_the_file(path: Path) -> None:
    saved = saved_small(path)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    quantize_(model)
    assert "GELU in the model" in refused(path, model)
    model[1] = nn.ReLU()
    load(path, model)
    assert model[1].function == "relu"
    assert_same_state(model, saved)


class RaisesOnLoad(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def _load_from_state_dict(self, *arguments: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt(), KeyError("mine")])
def test_a_failed_load_is_undone(path: Path, error: BaseException) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 32), RaisesOnLoad(error))
        model.tied = nn.Linear(64, 64)
        model.tied.weight = model[0].weight
        return model

    source = make()
    quantize_(source, filter_fn=lambda module, name: name == "0")
    save(source, path)
    for quantized in (False, True):
        model = make()
        if quantized:
            quantize_(model, ASYMMETRIC, filter_fn=lambda module, name: name == "0")
        hook = model[0].register_forward_hook(lambda *_: None)
        with torch.no_grad():
            model[1].weight_ih_l0.mul_(2)  # the values in the file are different
        x = floats(5, 2, 64)
        expected = model[1](x)[0]
        with unchanged(model), pytest.raises(type(error)):
            load(path, model)
        assert torch.equal(model[1](x)[0], expected), "LSTM's own list included"
        hook.remove()


def test_torch_save_and_load_with_weights_only(tmp_path: Path) -> None:
    model = trained()
    quantize_(model, ASYMMETRIC)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = LanguageModel().eval()
    quantize_(other, ASYMMETRIC)
    other.load_state_dict(state)
    assert_same_state(other, model)
    assert torch.equal(other(TOKENS), model(TOKENS))
