"""Regions of a model that trains for quantization: found by prepare_qat_."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchquant.chains.modes import Record, both_modes
from torchquant.chains.training import TrainingForward
from torchquant.configs import Static
from torchquant.convert.batches import call, structure
from torchquant.convert.regions import (
    Found,
    covered,
    find,
    install,
    is_leaf,
    joins,
    own_layers,
    regions_in,
    remove,
)
from torchquant.graph.trace import Trace
from torchquant.nn.base import TrainedModule


def cover_training(model: nn.Module) -> Found:
    """Let regions round the int8 values between the trained layers of a model, in place.

    Args:
        model: a model whose layers are prepared for training.

    Returns:
        The regions that are possible, and the modules that are none, with the reasons.

    Example:
        >>> cover_training(nn.Sequential(nn.ReLU())).regions
        []
    """
    records: dict[int, tuple[Record, ...]] = {}

    def check(module: nn.Module, record: Trace) -> None:
        records[id(module)] = both_modes(module, record, is_leaf)

    found = find(model, is_static, check)
    for old in regions_in(model):
        if isinstance(old, TrainingForward):
            remove(old)
    taken = covered(model)
    for region, called in own_layers(found):
        own: dict[str, Static] = {}
        for path, module in called:
            if isinstance(module, TrainedModule) and is_static(module):
                deployed = module.config.deployed()
                if joins(module, deployed):
                    own[path] = deployed.activations
        if own and not any(id(module) in taken for module in region.module.modules()):
            made = TrainingForward(region.module, region.path, records[id(region.module)], own)
            install(made)
    return found


def is_static(module: nn.Module) -> bool:
    """True for a layer in training whose activations will be static.

    Example:
        >>> from torchquant.nn import QATLinear
        >>> is_static(QATLinear(8, 8)), is_static(nn.Linear(8, 8))
        (False, False)
    """
    if not isinstance(module, TrainedModule) or not module.has_compute:
        return False
    return isinstance(module.config.deployed().activations, Static)


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """A context in which modules have the forwards of their classes; undone if it fails."""
    old = [region for region in regions_in(model) if isinstance(region, TrainingForward)]
    for region in old:
        remove(region)
    try:
        yield
    except BaseException:
        for region in old:
            install(region)
        raise


def learn_sizes(model: nn.Module, example: Any) -> None:
    """Run a model with a batch in float, so that its regions decide what is int8.

    Raises:
        ValueError: the model cannot be called with the batch.
    """
    modules = [*model.modules()]
    modes = [module.training for module in modules]
    layers = [module for module in modules if isinstance(module, TrainedModule)]
    states = [(layer._quantizing, layer.was_called) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer._quantizing = False
        with torch.no_grad():
            call("prepare_qat_", model, example)
    except Exception as error:
        raise ValueError(
            "prepare_qat_: example_inputs must be a batch with which the model can be called, got "
            f"{structure(example)}, and the model raised {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for layer, (quantizing, called) in zip(layers, states, strict=True):
            layer._quantizing, layer.was_called = quantizing, called


def check_loaded(model: nn.Module) -> None:
    """Raise a ValueError if convert_ would lose ranges that a state dict brought."""
    for region in regions_in(model):
        if isinstance(region, TrainingForward) and region.loaded:
            where = region.name or "the model"
            raise ValueError(
                f"convert_: a batch must have run through {where} after load_state_dict, got none, "
                "so that it is not known which of its values the state dict has ranges of; call "
                "the model with a batch first, or pass example_inputs to prepare_qat_"
            )


__all__ = ["cover_training"]
