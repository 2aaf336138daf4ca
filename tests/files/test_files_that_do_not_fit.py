"""Complete files that do not fit the model are refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_files import other_small, refused, rewrite, saved_small, setting, small
from torch import Tensor, nn

from torchquant import load, quantize_, save


def entry(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"].update(values)


def config(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"]["config"].update(values)


def weights(**values: Any) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"]["0"]["config"]["weights"].update(values)


def named(name: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda header, tensors: header["layers"].update({name: header["layers"].pop("0")})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (setting("layers", {"0": None}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": 3}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": "text"}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": []}), "the entry of layer '0' is not valid"),
        (setting("layers", {"0": {}}), "the entry of layer '0' is not valid ('kind')"),
        (entry(in_features=2**40), f"'0' has in_features={2**40} in the file, 64 in the model"),
        (entry(out_features=2**62), f"out_features={2**62} in the file, 64 in the model"),
        (entry(in_features=-64), "'0' has in_features=-64 in the file"),
        (entry(in_features=0), "'0' has in_features=0 in the file"),
        (entry(in_features="64"), "'0' has in_features='64' in the file, 64 in the model"),
        (entry(in_features=64.0), "'0' has in_features=64.0 in the file, 64 in the model"),
        (entry(in_features=None), "'0' has in_features=None in the file"),
        (entry(in_features=[64]), "'0' has in_features=[64] in the file"),
        (entry(bias=False), "'0' has bias=False in the file, True in the model"),
        (entry(bias="yes"), "bias"),
        (entry(activation="mish"), "activation must be one of none, relu, gelu, gelu_tanh, silu"),
        (entry(activation=None), "activation must be one of"),
        (entry(activation=[]), "the entry of layer '0' is not valid"),
        (entry(config=None), "the entry of layer '0' is not valid"),
        (entry(config="int8"), "the entry of layer '0' is not valid"),
        (entry(config={}), "configuration type must be one of"),
        (config(type="Int4Config"), "got 'Int4Config'; the file may be from a newer torchquant"),
        (config(type=[]), "the entry of layer '0' is not valid"),
        (config(bits=4), "configuration QuantizationConfig does not fit this"),
        (weights(symmetric="yes"), "symmetric must be True or False, got 'yes'"),
        (weights(symmetric=False), "missing 0.qweight_zero_point"),
        (
            entry(kind="conv7d"),
            "kind of layer must be one of linear, conv1d, conv2d, embedding, embedding_bag, got "
            "'conv7d'; the file may be",
        ),
        (entry(kind=[]), "the entry of layer '0' is not valid"),
        (entry(format="int3"), "weight format must be 'int8', got 'int3'; the file may be from a"),
        (named("1"), "a quantized linear layer at '1' in the file, ReLU in the model"),
        (named("7"), "a quantized linear layer at '7' in the file, nothing in the model"),
        (named(""), "a quantized linear layer at the root in the file, Sequential in the model"),
        (named("0."), "a quantized linear layer at '0.' in the file, nothing in the model"),
        (named("__class__"), "at '__class__' in the file, nothing in the model"),
        (named("\0"), "in the file, nothing in the model"),
        (named("2"), "'2' has out_features=64 in the file, 8 in the model"),
        (
            setting("absorbed", {"1": "gelu"}),
            "a fused activation 'gelu' at '1' in the file, ReLU in the model",
        ),
        (
            setting("absorbed", {"1": 3}),
            "a fused activation 3 at '1' in the file, ReLU in the model",
        ),
        (setting("absorbed", {"1": None}), "activation None at '1' in the file, ReLU in the model"),
        (setting("absorbed", {"1": []}), "activation [] at '1' in the file, ReLU in the model"),
        (setting("absorbed", {"0": "relu"}), "a fused activation 'relu' at '0' in the file"),
        (
            setting("absorbed", {"9": "relu"}),
            "a fused activation 'relu' at '9' in the file, nothing in the model",
        ),
        (
            setting("absorbed", {"": "relu"}),
            "a fused activation 'relu' at '' in the file, Sequential in the model",
        ),
        (
            setting("activations", {"1": "gelu"}),
            "an activation 'gelu' at '1' in the file, ReLU in the model",
        ),
        (setting("activations", {"1": []}), "an activation [] at '1' in the file, ReLU in the mo"),
        (setting("activations", {"9": "relu"}), "activation 'relu' at '9' in the file, nothing in"),
        (setting("layers", {}), "missing 0.weight; unknown 0.qweight, 0.qweight_scale"),
    ],
)
def test_invalid_entries(path: Path, edit: Callable[..., Any], text: str) -> None:
    saved_small(path)
    rewrite(path, edit)
    message = refused(path, other_small())
    assert "does not fit the model: " in message
    assert text in message


def tensor(key: str, value: Tensor) -> Callable[[Any, dict[str, Tensor]], None]:
    return lambda header, tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            tensor("0.qweight", torch.zeros(64, 64)),
            "0.qweight is float32 [64, 64] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.qweight", torch.zeros(64, 64, dtype=torch.uint8)),
            "0.qweight is uint8 [64, 64] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.qweight", torch.zeros(64, 65, dtype=torch.int8)),
            "0.qweight is int8 [64, 65] in the file, int8 [64, 64] in the model",
        ),
        (
            tensor("0.qweight_scale", torch.zeros(64, dtype=torch.int8)),
            "0.qweight_scale is int8 [64] in the file, float32 [64] in the model",
        ),
        (
            tensor("2.weight", torch.zeros(8, 64, dtype=torch.int64)),
            "2.weight is int64 [8, 64] in the file, float32 [8, 64] in the model",
        ),
        (
            tensor("2.bias", torch.zeros(8, dtype=torch.complex64)),
            "2.bias is complex64 [8] in the file, float32 [8] in the model",
        ),
        (
            tensor("2.bias", torch.zeros(8, dtype=torch.float8_e4m3fn)),
            "2.bias is float8_e4m3fn [8] in the file, float32 [8] in the model",
        ),
        (tensor("more", torch.zeros(1)), "unknown more"),
        (lambda header, tensors: tensors.pop("0.qweight_scale"), "missing 0.qweight_scale"),
        (lambda header, tensors: tensors.pop("0.qweight"), "missing 0.qweight"),
        (lambda header, tensors: tensors.pop("2.bias"), "missing 2.bias"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
def test_tensors_that_do_not_fit(
    path: Path, edit: Callable[..., Any], text: str, quantized: bool, meta: bool
) -> None:
    saved_small(path)
    rewrite(path, edit)
    model = other_small()
    if quantized:
        quantize_(model)
    if meta:
        model.to("meta")
    assert text in refused(path, model)


class Subclass(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), "unknown 2.bias, 2.weight"),
        (lambda: nn.Sequential(*small(), nn.Linear(8, 8)), "missing 3.bias, 3.weight"),
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9)),
            "2.weight is float32 [8, 64] in the file, float32 [9, 64] in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)),
            "'0' has out_features=64 in the file, 32 in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 8)),
            "'0' has bias=True in the file, False in the model",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(64, 64, 1), nn.ReLU(), nn.Linear(64, 8)),
            "a quantized linear layer at '0' in the file, Conv1d in the model",
        ),
        (
            lambda: nn.Sequential(Subclass(64, 64), nn.ReLU(), nn.Linear(64, 8)),
            "a quantized linear layer at '0' in the file, Subclass in the model",
        ),
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LazyLinear(8)),
            "uninitialized parameter",
        ),
        (lambda: nn.Linear(64, 64), "at '0' in the file, nothing in the model"),
        (lambda: nn.Sequential(), "at '0' in the file, nothing in the model"),
    ],
)
def test_another_model(path: Path, make: Callable[[], nn.Module], text: str) -> None:
    saved_small(path)
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as raised:
        load(path, model)
    assert text in str(raised.value)
    assert str(raised.value).endswith(
        "build the model that was saved (torchquant.quantize_ is not needed before load)"
    )
    assert dict(model.named_modules()) == modules


def test_a_float_file_for_a_quantized_model(path: Path) -> None:
    save(small(), path)
    model = other_small()
    quantize_(model)
    assert "missing 0.qweight, 0.qweight_scale; unknown 0.weight" in refused(path, model)
