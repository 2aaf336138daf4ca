"""The report names models that another library has quantized."""

import warnings
from collections.abc import Callable

import pytest
import torch
from support.layers import outcome
from torch import nn

from torchquant import quantize_
from torchquant.convert.families import other_library


def by_torch_ao() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LSTM(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM})


def test_a_model_of_torch_ao() -> None:
    report = quantize_(by_torch_ao())
    assert report.layers == ()
    assert [(row.name, row.action, row.reason) for row in report.others] == [
        ("0", "skipped", "already quantized by torch.ao (Linear)"),
        ("2", "skipped", "already quantized by torch.ao (LSTM)"),
    ]
    assert report.notes == (
        "Already quantized by torch.ao (Linear), left unchanged: 0.",
        "Already quantized by torch.ao (LSTM), left unchanged: 2.",
    )
    assert "stay in float" not in report.summary()


def test_layers_that_torch_ao_prepared() -> None:
    from torch.ao.nn.qat import Linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Linear(64, 64, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86"))
    reason = outcome(quantize_(nn.Sequential(layer)))["0"]
    assert reason == "skipped: already prepared for training by torch.ao (Linear)"


@pytest.mark.filterwarnings("ignore")
def test_float_modules_of_torch_ao() -> None:
    from torch.ao.nn.intrinsic import LinearReLU

    model = nn.Sequential(
        torch.ao.quantization.QuantWrapper(nn.Linear(64, 64)),
        LinearReLU(nn.Linear(64, 64), nn.ReLU()),
    )
    report = quantize_(model)
    assert set(outcome(report).values()) == {"quantized"}
    assert report.others == ()


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: name == "0",
    )
    report = quantize_(model)
    kind = type(model[0].weight).__name__
    assert outcome(report) == {
        "0": f"skipped: already quantized by torchao ({kind})",
        "1": "quantized",
    }
    assert report.summary().startswith(
        "1 quantized (50 % of parameters), 1 skipped; 50 % quantized or prepared before; model "
    )
    with pytest.raises(ValueError, match="0: already quantized by torchao"):
        quantize_(model, filter_fn="0", strict=True)


def made_by(module: str, name: str, base: type[nn.Module]) -> Callable[..., nn.Module]:
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("module", "name", "base", "library"),
    [
        ("bitsandbytes.nn.modules", "Linear8bitLt", nn.Linear, "bitsandbytes"),
        ("bitsandbytes.nn.modules", "Linear4bit", nn.Linear, "bitsandbytes"),
        ("bitsandbytes.nn.modules", "StableEmbedding", nn.Embedding, None),
        ("optimum.quanto.nn.qlinear", "QLinear", nn.Linear, "optimum-quanto"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", nn.Module, "AutoAWQ"),
        ("torchaotic.nn", "Linear", nn.Linear, None),
        ("torchquant.nn", "Linear", nn.Linear, None),
    ],
)
def test_libraries_by_their_classes(
    module: str, name: str, base: type[nn.Module], library: str | None
) -> None:
    sizes = () if base is nn.Module else (64, 64)
    found = other_library(made_by(module, name, base)(*sizes))
    assert found == (None if library is None else f"already quantized by {library} ({name})")
