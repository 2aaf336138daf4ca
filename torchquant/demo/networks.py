"""The convolutional networks of the demo: static int8 by calibration, and by training.

Both start from the float network. `calibrate` shows it some training images, and `convert_` makes
integers of it. `prepare_qat_` trains it for a few steps with the integers that will be deployed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchquant import cpu
from torchquant.analysis.verify import verify
from torchquant.configs import Int8StaticActivationInt8WeightConfig
from torchquant.convert.calibrate import calibrate
from torchquant.convert.convert import convert_
from torchquant.convert.prepare import prepare_
from torchquant.convert.qat import prepare_qat_
from torchquant.convert.stages import freeze_statistics_
from torchquant.data import ImageData, augment
from torchquant.demo.exactness import ORACLE, Check, forced_isa
from torchquant.demo.measure import Latency, measure_latency, state_dict_bytes
from torchquant.demo.steps import Steps
from torchquant.models import load_digits_resnet, load_digits_vgg
from torchquant.training.parameter_groups import parameter_groups

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VGG": load_digits_vgg,
    "ResNet": load_digits_resnet,
}
LATENCY_BATCHES = (1, 16)
CALIBRATION_BATCHES = 8
BATCH = 32
STEPS = 10
LEARNING_RATE = 1e-4
LABEL_SMOOTHING = 0.05  # as in the training of the float networks
VERIFIED_IMAGES = 16


@dataclass(frozen=True)
class Network:
    """The measurements of one convolutional network.

    ``static_correct`` is after calibration, ``trained_correct`` after ``steps`` steps of training
    with integers, which took ``seconds``; both of ``test_images``. ``calibration_images`` were used
    for calibration. Sizes and latencies are those of the calibrated network.
    """

    name: str
    test_images: int
    float_correct: int
    static_correct: int
    trained_correct: int
    calibration_images: int
    steps: int
    seconds: float
    float_bytes: int
    int8_bytes: int
    latencies: list[Latency]


def run_networks(
    data: ImageData, latency_seconds: float, steps: Steps
) -> tuple[list[Network], list[Check]]:
    """Quantize the networks in both ways and compare them with the float networks."""
    networks, checks = [], []
    for name, load in NETWORKS.items():
        network, found = _run(name, load().eval(), data, latency_seconds, steps)
        networks.append(network)
        checks += found
    return networks, checks


def steps_needed() -> int:
    """How often :func:`run_networks` announces a step."""
    return len(NETWORKS) * (2 + len(LATENCY_BATCHES) + len(cpu.available_isas()))


def _run(
    name: str, model: nn.Module, data: ImageData, latency_seconds: float, steps: Steps
) -> tuple[Network, list[Check]]:
    with torch.inference_mode(False), torch.enable_grad():
        steps.begin(f"calibration of the {name}")
        generator = torch.Generator().manual_seed(0)
        static = copy.deepcopy(model)
        prepare_(static, Int8StaticActivationInt8WeightConfig(), data.train_images[:1])
        batches = [_batch(data, generator)[0] for _ in range(CALIBRATION_BATCHES)]
        calibrate(static, batches, progress=False)
        convert_(static)
        steps.begin(f"training of the {name}")
        trained = copy.deepcopy(model)
        prepare_qat_(trained, Int8StaticActivationInt8WeightConfig())
        start = time.perf_counter()
        _train(trained, data, generator)
        seconds = time.perf_counter() - start
        converted = copy.deepcopy(trained)
        convert_(converted)
    latencies = []
    for count in LATENCY_BATCHES:
        steps.begin(f"latency of the {name}, batch of {count}")
        images = data.test_images[:count]
        latencies.append(measure_latency(model, static, images, latency_seconds))
    checks = _checks(name, trained, converted, static, data.test_images, steps)
    network = Network(
        name=name,
        test_images=len(data.test_images),
        float_correct=_correct(model, data),
        static_correct=_correct(static, data),
        trained_correct=_correct(converted, data),
        calibration_images=CALIBRATION_BATCHES * BATCH,
        steps=STEPS,
        seconds=seconds,
        float_bytes=state_dict_bytes(model),
        int8_bytes=state_dict_bytes(static),
        latencies=latencies,
    )
    return network, checks


def _batch(data: ImageData, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented training images, and their labels."""
    rows = torch.randint(len(data.train_images), (BATCH,), generator=generator)
    return augment(data.train_images[rows], generator), data.train_labels[rows]


def _train(model: nn.Module, data: ImageData, generator: torch.Generator) -> None:
    # So few steps would only make the running statistics of the batch norms worse.
    freeze_statistics_(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    model.train()
    for _ in range(STEPS):
        images, labels = _batch(data, generator)
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _checks(
    name: str,
    trained: nn.Module,
    converted: nn.Module,
    static: nn.Module,
    images: Tensor,
    steps: Steps,
) -> list[Check]:
    """The trained network against the converted one, and the calibrated one against ORACLE."""
    checks = []
    some = images[:VERIFIED_IMAGES]
    with forced_isa(ORACLE):
        expected = static(some)
    for isa in cpu.available_isas():
        steps.begin(f"exactness of the {name}, {isa}")
        with forced_isa(isa):
            report = verify(trained, converted, [some])
            logits = static(some)
        compared = (*report.layers, report.outputs)
        values = sum(one.values for one in compared)
        check = Check("networks", isa, values, sum(one.differing for one in compared))
        check.compare(logits, expected)
        checks.append(check)
    return checks


@torch.no_grad()
def _correct(model: nn.Module, data: ImageData) -> int:
    pairs = zip(data.test_images.split(100), data.test_labels.split(100), strict=True)
    return sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in pairs)
