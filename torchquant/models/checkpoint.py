"""Checkpoints of the models in the package: weights, and the sizes of the model as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def save_checkpoint(
    model: nn.Module,
    path: Path,
    key: str,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the floating-point state of a model in ``dtype``, and its sizes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "linear.safetensors"
        ...     save_checkpoint(nn.Linear(2, 3), path, "linear", {"out": 3}, torch.float16)
        ...     config, state = load_checkpoint(path, "linear")
        >>> config, state["weight"].dtype
        ({'out': 3}, torch.float32)
    """
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    # A single metadata key: safetensors writes several keys in no fixed order, and a training
    # script must write the same bytes for the same weights. save_file() would make a file that only
    # its owner may read, and it ships in a package.
    path.write_bytes(safetensors.torch.save(state, {key: json.dumps(config)}))


def load_checkpoint(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes of a model, and its state with fp32 weights; see :func:`save_checkpoint`."""
    with safetensors.safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[key])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.float()
    return config, state


def trained_model(kind: type[M], path: Path, key: str) -> M:
    """A model of ``kind`` from a file of :func:`save_checkpoint`, in evaluation mode.

    Example:
        >>> import tempfile
        >>> class Halves(nn.Linear):
        ...     def __init__(self, outputs):
        ...         super().__init__(2, outputs)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "halves.safetensors"
        ...     save_checkpoint(Halves(3), path, "halves", {"outputs": 3})
        ...     model = trained_model(Halves, path, "halves")
        >>> model.weight.shape, model.training
        (torch.Size([3, 2]), False)
    """
    config, state = load_checkpoint(path, key)
    # The initial weights are random and unused; drawing them must not change the caller's state.
    with torch.random.fork_rng(devices=[]):
        model = kind(**config)
    model.load_state_dict(state)
    return model.eval()
