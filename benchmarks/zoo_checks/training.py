"""Checks of quantization-aware training: what was trained is what is converted, bit for bit."""

from __future__ import annotations

import copy

import torch
from architectures import tensors
from torch import nn

import torchquant
from torchquant import QATConfig, TrainingConfig

from .case import Case, FloatFails, Outcome, quantized_layers

STEPS = 3
RATE = 1e-3


def qat_int8(case: Case) -> Outcome:
    """int8 weights, dynamic activations."""
    return trained(case, QATConfig())


def qat_lsq(case: Case) -> Outcome:
    """4-bit weights with learned steps."""
    return trained(case, QATConfig(weight_bits=4, learned_weights=True))


def qat_static(case: Case) -> Outcome:
    """int8 weights, activations with observed ranges."""
    return trained(case, QATConfig(activations="static"))


def trained(case: Case, config: TrainingConfig) -> Outcome:
    """Train for some steps and convert: how many bits differ, layer by layer and in the outputs."""
    if not quantized_layers(case.quantized):
        return Outcome("no layers", None)
    model = case.float_model()
    torchquant.prepare_qat_(model, config)
    try:
        train(case, model)
        prepared = copy.deepcopy(model)
    except Exception:
        _check_float_trains(case)
        raise
    converted = copy.deepcopy(prepared)
    torchquant.convert_(converted)
    report = torchquant.verify(prepared, converted, [case.arguments()])
    if report.exact:
        return Outcome("0 bits", value=0)
    bits = report.differing_bits + report.outputs.bits
    if bits == 0:
        return Outcome("no layer was called", False, bits)
    text = f"{report.differing_bits} bits differ in layers, {report.outputs.bits} in the outputs"
    return Outcome(text, False, bits)


def train(case: Case, model: nn.Module) -> None:
    """Some steps of SGD towards outputs that are zero."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(STEPS):
        outputs = [t for t in tensors(model(**case.arguments())) if t.requires_grad]
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _check_float_trains(case: Case) -> None:
    model = case.float_model()
    try:
        train(case, model)
        copy.deepcopy(model)
    except Exception as error:
        raise FloatFails from error
