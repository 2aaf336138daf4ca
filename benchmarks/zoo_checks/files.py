"""Checks of copies: files, state dicts, pickle and deepcopy keep the bits of the outputs."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchquant

from .case import Case, FloatFails, Outcome, compared


def load(case: Case) -> Outcome:
    """``save``, then ``load`` into a model with other weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torchquant.save(case.quantized_model(), path)  # not run yet: RWKV rescales weights
        model = torchquant.load(path, case.float_model(weights=1))
        return compared(case.outputs, case.call(model))


def load_meta(case: Case) -> Outcome:
    """The same into a model on the meta device: the same bits, or a refusal."""
    if case.architecture.real:
        return Outcome("-", None)
    try:
        empty = case.architecture.empty()
    except Exception as error:
        raise FloatFails from error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.safetensors"
        torchquant.save(case.quantized_model(), path)  # not run yet: RWKV rescales weights
        try:
            model = torchquant.load(path, empty)
        except (ValueError, RuntimeError) as error:
            if "meta" not in str(error):
                raise
            return Outcome("refused")
        return compared(case.outputs, case.call(model.eval()))


def copies(case: Case) -> Outcome:
    """``deepcopy``, ``pickle``, ``torch.save`` and a strict ``load_state_dict``."""
    failed = []
    for name, make in WAYS.items():
        original = case.float_model()
        case.call(original)  # some models of transformers install hooks when they run
        try:
            make(original)
        except Exception:
            continue  # the float model cannot be copied like that
        found = compared(case.outputs, case.call(make(case.quantized)))
        if not found.ok:
            failed.append(f"{name}: {found.text}")
    other = case.float_model(weights=1)
    torchquant.quantize_(other)
    other.load_state_dict(case.quantized_model().state_dict(), strict=True)
    found = compared(case.outputs, case.call(other))
    if not found.ok:
        failed.append(f"state_dict: {found.text}")
    return Outcome("; ".join(failed) or "same bits", not failed)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Any] = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}
