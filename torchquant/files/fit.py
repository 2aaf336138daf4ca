"""Checks that the tensors of a file fit a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.modules import memory_key
from torchquant.nn.base import QuantizedModule


class Misfit(Exception):
    """Raised if a valid file does not fit the model; the message names the place."""


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file if the block finds that it does not fit the model."""
    try:
        yield
    except (Misfit, RuntimeError) as error:  # RuntimeError: from load_state_dict
        raise ValueError(
            f"load: {str(path)!r} does not fit the model: {error}; build the model that was saved "
            "(torchquant.quantize_ is not needed before load)"
        ) from None


def current_tensors(model: nn.Module) -> dict[str, Tensor | None]:
    """The model's tensor at each key of its state dict, or None if the value is not a tensor.

    A whole state dict would unpack all weights of a quantized model, so the function goes from
    module to module.
    """
    current: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, QuantizedModule):
            for key, (dtype, shape) in module.canonical().items():
                packed = key in module.layout.tensors  # each access would unpack it
                empty = torch.empty(shape, dtype=dtype, device="meta") if packed else None
                current[prefix + key] = empty if packed else getattr(module, key)
        else:
            module._save_to_state_dict(current, prefix, True)
    # Extra state is checked by its module only.
    return {
        key: value if isinstance(value, Tensor) and not key.endswith("_extra_state") else None
        for key, value in current.items()
    }


def check_fit(state: Mapping[str, Tensor], current: Mapping[str, Tensor | None]) -> None:
    """Raise unless keys, shapes, kinds of dtype and ties of the state are those of the model."""
    missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unknown {', '.join(extra)}"] if extra else []
    first_key: dict[Hashable, str] = {}
    for key, here in current.items():
        if here is None or key not in state:
            continue
        there = state[key]
        if there.shape != here.shape or _sort(there) != _sort(here):
            problems.append(
                f"{key} is {_describe(there)} in the file, {_describe(here)} in the model"
            )
        first = first_key.setdefault(memory_key(here), key)
        if first in state and state[first] is not there and not torch.equal(state[first], there):
            problems.append(
                f"{first} and {key} are two tensors in the file, one tensor in the model"
            )
    if problems:
        raise Misfit("; ".join(problems))


def _sort(tensor: Tensor) -> str:
    """The kind of a tensor's dtype; a bfloat16 tensor in a file fits a float32 model."""
    ordinary = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return "float" if tensor.dtype in ordinary else str(tensor.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
