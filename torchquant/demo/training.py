"""The demo's training: few bits, a short fine-tuning, the proof that it trained the int8 model."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant import cpu
from torchquant.analysis.verify import VerifyReport, verify
from torchquant.convert.convert import convert_
from torchquant.convert.qat import prepare_qat_
from torchquant.demo.exactness import Check, forced_isa
from torchquant.demo.steps import Steps
from torchquant.models import DigitsData, load_digits_model
from torchquant.training.configuration import QATConfig
from torchquant.training.parameter_groups import parameter_groups

WEIGHT_BITS = 2
STEPS = 40
BATCH = 64
LEARNING_RATE = 1e-3
VERIFIED_IMAGES = 40


@dataclass(frozen=True)
class Training:
    """The gain of training: test images classified correctly at ``weight_bits`` bits.

    ``rounded_correct`` is without training, ``trained_correct`` after ``steps`` steps, which took
    ``seconds``; ``differing_bits`` counts the bits in which the converted model differs from the
    trained one.
    """

    weight_bits: int
    steps: int
    seconds: float
    rounded_correct: int
    trained_correct: int
    differing_bits: int
    values: int


def train_digits(data: DigitsData, steps: Steps) -> tuple[Training, list[Check]]:
    """Quantize the model's weights to a few bits, train it, convert it and compare.

    Returns:
        The result, and a check for each instruction set.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = (tensor.clone() for tensor in data[:2])
        steps.begin(f"training with {WEIGHT_BITS}-bit weights")
        model = load_digits_model()
        prepare_qat_(model, QATConfig(weight_bits=WEIGHT_BITS))
        rounded = copy.deepcopy(model)
        convert_(rounded)
        start = time.perf_counter()
        _train(model, images, labels)
        seconds = time.perf_counter() - start
        converted = copy.deepcopy(model)
        convert_(converted)
        checks, reports = [], []
        for isa in cpu.available_isas():
            steps.begin(f"exactness of training, {isa}")
            with forced_isa(isa):
                report = verify(model, converted, [data.test_images[:VERIFIED_IMAGES]])
            reports.append(report)
            checks.append(_check(isa, report))
    result = Training(
        weight_bits=WEIGHT_BITS,
        steps=STEPS,
        seconds=seconds,
        rounded_correct=_correct(rounded, data),
        trained_correct=_correct(converted, data),
        differing_bits=sum(report.differing_bits + report.outputs.bits for report in reports),
        values=sum(check.values for check in checks),
    )
    return result, checks


def _train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _check(isa: str, report: VerifyReport) -> Check:
    compared = (*report.layers, report.outputs)
    values = sum(one.values for one in compared)
    return Check("training", isa, values, sum(one.differing for one in compared))


@torch.no_grad()
def _correct(model: nn.Module, data: DigitsData) -> int:
    return int((model(data.test_images).argmax(dim=1) == data.test_labels).sum())
