"""Files of models: written, edited, and refused by a model that stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from support.layers import unchanged
from torchquant import Fusion, QuantizationConfig, load, quantize_, save
from torchquant.files import format as file_format


class LanguageModel(nn.Module):
    """A tied head, a buffer of each kind, a layer used twice."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.body = nn.ModuleList([nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)])
        self.body.append(self.body[0])
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.zeros(64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("positions", torch.arange(64) / 64, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions + self.offset
        for layer in self.body:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


TOKENS = torch.arange(12).reshape(3, 4)


def trained(tied: bool = True) -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(tied).eval()
    model.offset += 0.25
    model.steps += 7
    return model


def small() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def saved_small(
    path: Path, config: QuantizationConfig | None = None, fusion: Fusion | None = None
) -> nn.Sequential:
    model = small()
    quantize_(model, config, fusion=fusion)
    save(model, path)
    return model


def other_small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def metadata_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["torchquant"])
    assert isinstance(header, dict)
    return header


def rewrite(
    path: Path,
    edit: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    sign: bool = True,
) -> None:
    """Edit the metadata and tensors of a file, and write a matching checksum."""
    header, tensors = metadata_of(path), safetensors.torch.load_file(path)
    edit(header, tensors)
    if sign:
        header["sha256"] = file_format.digest(header, tensors)
    write(path, tensors, {"torchquant": json.dumps(header)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    tensors = {
        key: tensor.clone() for key, tensor in tensors.items()
    }  # copies, because the file is mapped
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def refused(path: Path, model: nn.Module, match: str | None = None) -> str:
    with unchanged(model), pytest.raises(ValueError, match=match) as raised:
        load(path, model)
    assert str(path) in str(raised.value)
    return str(raised.value)


DAMAGED = "has damaged torchquant metadata; save the model again"
CHANGED = "was changed after it was saved (its checksum does not match); save the model again"


def setting(key: str, value: Any) -> Callable[[dict[str, Any], Any], None]:
    def edit(header: dict[str, Any], tensors: Any) -> None:
        header[key] = value

    return edit
