"""save_pretrained of a quantized model is refused: from_pretrained would give random weights."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import torchquant
from torchquant.integrations.pretrained import _extend, _save, check_saveable

transformers = pytest.importorskip("transformers")


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
    )
    return transformers.BertModel(config).eval()


def quantized() -> Any:
    model = bert()
    torchquant.quantize_(model)
    return model


def loaded(folder: Path) -> Any:
    torchquant.save(quantized(), folder / "own.safetensors")
    return torchquant.load(folder / "own.safetensors", bert())


SOURCES: dict[str, Callable[[Path], Any]] = {
    "quantized": lambda folder: quantized(),
    "copied": lambda folder: copy.deepcopy(quantized()),
    "pickled": lambda folder: pickle.loads(pickle.dumps(quantized())),
    "loaded": loaded,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_refused_with_the_remedy(source: Callable[[Path], Any], tmp_path: Path) -> None:
    model = source(tmp_path)
    folder = tmp_path / "model"
    with pytest.raises(ValueError) as raised:
        model.save_pretrained(folder)
    assert str(raised.value) == (
        "save_pretrained: the model must be a float model, got BertModel with 7 quantized layers "
        "(the first is 'encoder.layer.0.attention.self.query'), which from_pretrained would give "
        "random weights; use torchquant.save(model, path) and torchquant.load(path, model), or "
        "call torchquant.to_float_(model) first"
    )
    assert not folder.exists(), "nothing is written"


def test_one_quantized_submodule_is_enough(tmp_path: Path) -> None:
    model = bert()
    torchquant.quantize_(model.pooler)
    with pytest.raises(ValueError, match=r"1 quantized layers \(the first is 'pooler.dense'\)"):
        model.save_pretrained(tmp_path)


def test_float_and_prepared_models_are_saved(tmp_path: Path) -> None:
    model = quantized()
    torchquant.to_float_(model)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8).reshape(1, 8)
    again = transformers.BertModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).pooler_output, model(tokens).pooler_output)
    torchquant.prepare_qat_(model)
    model.save_pretrained(tmp_path)
    weight = model.pooler.dense.weight
    assert torch.equal(transformers.BertModel.from_pretrained(tmp_path).pooler.dense.weight, weight)


def test_a_float_state_dict_of_a_quantized_model_is_saved(tmp_path: Path) -> None:
    model = quantized()
    floating = copy.deepcopy(model)
    torchquant.to_float_(floating)
    model.save_pretrained(tmp_path, state_dict=floating.state_dict())
    weight = transformers.BertModel.from_pretrained(tmp_path).pooler.dense.weight
    assert torch.equal(weight, floating.pooler.dense.weight)
    with pytest.raises(ValueError, match="7 quantized layers"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())


def test_adapters_on_a_quantized_model_are_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(ValueError, match="7 quantized layers"):
        model.base_model.model.save_pretrained(tmp_path)


def test_adapters_that_transformers_added_are_saved(tmp_path: Path) -> None:
    saved: list[Path] = []

    class Model(transformers.BertModel):  # type: ignore[misc, name-defined]
        def save_pretrained(self, folder: Path) -> None:
            _save(lambda model, to: saved.append(to), self, folder)

    model = Model(bert().config)
    torchquant.quantize_(model)
    with pytest.raises(ValueError, match="7 quantized layers"):
        model.save_pretrained(tmp_path)
    model._hf_peft_config_loaded = True
    model.save_pretrained(tmp_path)
    assert saved == [tmp_path]


def test_diffusers() -> None:
    """With a class in the place of diffusers' own; diffusers is not installed in CI."""
    module = ModuleType("diffusers.models.modeling_utils")

    class ModelMixin(nn.Sequential):
        def save_pretrained(self, folder: str) -> str:
            return folder

    module.ModelMixin = ModelMixin  # type: ignore[attr-defined]
    _extend(module)
    model = ModelMixin(nn.Linear(64, 64))
    assert model.save_pretrained("folder") == "folder"
    torchquant.quantize_(model)
    with pytest.raises(ValueError, match=r"got ModelMixin with 1 quantized layers"):
        model.save_pretrained("folder")


def test_hub_mixin(tmp_path: Path) -> None:
    """Its from_pretrained loads with strict=False, so it would not notice either."""
    hub = pytest.importorskip("huggingface_hub")

    class Model(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

    model = Model()
    model.save_pretrained(tmp_path / "float")
    torchquant.quantize_(model)
    with pytest.raises(ValueError, match=r"got Model with 1 quantized layers"):
        model.save_pretrained(tmp_path / "quantized")


def test_the_check_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    check_saveable(model)
    torchquant.quantize_(model)
    check_saveable(model, {"0.weight": torch.zeros(1), "0.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 quantized layers"):
        check_saveable(model, model.state_dict())
