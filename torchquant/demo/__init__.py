"""The demo behind ``torchquant demo``: convert a model, measure it, prove that its bits are exact.

* `run_demo` measures and returns a `DemoResult`, plain numbers
* :mod:`~torchquant.demo.exactness`: the proof
* :mod:`~torchquant.demo.training`: the same model with few bits, fine-tuned
* :mod:`~torchquant.demo.networks`: two convolutional networks, calibrated and trained
* :mod:`~torchquant.demo.tables`: the result as tables
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

import torchquant
from torchquant import cpu
from torchquant.data import digit_images
from torchquant.demo.exactness import Check, check_file, check_layers, check_logits, torch_threads
from torchquant.demo.measure import Latency, measure_latency, state_dict_bytes
from torchquant.demo.networks import Network, run_networks, steps_needed
from torchquant.demo.steps import Listener, Steps
from torchquant.demo.training import Training, train_digits
from torchquant.models import load_digits_data, load_digits_model
from torchquant.nn import QuantizedModule
from torchquant.report import QuantizationReport

__all__ = ["Check", "DemoResult", "Latency", "Network", "Training", "run_demo"]

LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True)
class DemoResult:
    """All measurements of the demo.

    ``isa`` and ``threads`` are those of accuracy and latency; the proof of exactness goes over all
    available instruction sets, and over one and ``compared_threads`` threads.
    """

    isa: str
    threads: int
    test_images: int
    report: QuantizationReport
    float_correct: int
    int8_correct: int
    same_answers: int
    float_bytes: int
    int8_bytes: int
    latencies: list[Latency]
    training: Training
    networks: list[Network]
    checks: list[Check]
    compared_threads: int
    seconds: float

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data: sizes in bytes, latencies in ms, accuracy from 0 to 1."""
        return {
            "torchquant": torchquant.__version__,
            "torch": torch.__version__,
            "isa": self.isa,
            "threads": self.threads,
            "layers": [
                {"name": layer.name, "action": layer.action, "reason": layer.reason}
                for layer in self.report.layers
            ],
            "test_images": self.test_images,
            "accuracy": {
                "float": self.float_correct / self.test_images,
                "int8": self.int8_correct / self.test_images,
                "same_answers": self.same_answers,
            },
            "bytes": {"float": self.float_bytes, "int8": self.int8_bytes},
            "latency": [asdict(latency) for latency in self.latencies],
            "training": asdict(self.training),
            "networks": [asdict(network) for network in self.networks],
            "checks": [asdict(check) for check in self.checks],
            "exact": not self.failures,
            "seconds": self.seconds,
        }


@torch.inference_mode()
def run_demo(
    *,
    isa: str | None = None,
    threads: int | None = None,
    latency_seconds: float = 2.0,
    on_step: Listener | None = None,
) -> DemoResult:
    """Quantize models of handwritten digits; measure accuracy, size, latency and exactness.

    A transformer is quantized with dynamic activations, then fine-tuned with weights of few bits,
    converted, and compared with what was trained. Two convolutional networks follow, calibrated,
    and trained with integers.

    Args:
        isa: instruction set for accuracy and latency; None takes the active one.
        threads: threads for accuracy and latency; None leaves torch's setting.
        latency_seconds: how long to time each batch size.
        on_step: called with a description and the fraction done (0 to 1) as each step begins.

    Raises:
        ValueError: ``isa`` is not available here.

    Example:
        >>> from torchquant.demo import run_demo
        >>> result = run_demo(latency_seconds=0.1)
        >>> result.failures, result.float_bytes > 3 * result.int8_bytes
        ([], True)
        >>> result.training.trained_correct > result.training.rounded_correct
        True
        >>> [network.name for network in result.networks]
        ['VGG', 'ResNet']
    """
    start = time.perf_counter()
    model, data = load_digits_model(), load_digits_data()
    images, labels = data.test_images, data.test_labels
    int8_model = copy.deepcopy(model)
    report = torchquant.quantize_(int8_model, torchquant.Int8DynamicActivationInt8WeightConfig())
    layers = sum(isinstance(module, QuantizedModule) for module in int8_model.modules())
    isas = len(cpu.available_isas())
    own_steps = 3 + len(LATENCY_BATCHES) + 2 * isas + layers
    steps = Steps(own_steps + steps_needed(), on_step)
    with (
        nullcontext() if isa is None else cpu.use_isa(isa),
        torch_threads(threads or torch.get_num_threads()),
    ):
        used_isa, used_threads = cpu.active_isa(), torch.get_num_threads()
        steps.begin("accuracy")
        answers, int8_answers = model(images).argmax(dim=1), int8_model(images).argmax(dim=1)
        latencies = []
        for batch in LATENCY_BATCHES:
            steps.begin(f"latency, batch of {batch}")
            latencies.append(measure_latency(model, int8_model, images[:batch], latency_seconds))
        training, trained = train_digits(data, steps)
        networks, compared = run_networks(digit_images(), latency_seconds, steps)
    compared_threads = max(2, used_threads)
    checks = check_logits(int8_model, images, steps)
    checks += check_layers(int8_model, images, compared_threads, steps)
    checks += check_file(int8_model, images, steps)
    checks += trained + compared
    return DemoResult(
        isa=used_isa,
        threads=used_threads,
        test_images=len(images),
        report=report,
        float_correct=int((answers == labels).sum()),
        int8_correct=int((int8_answers == labels).sum()),
        same_answers=int((answers == int8_answers).sum()),
        float_bytes=state_dict_bytes(model),
        int8_bytes=state_dict_bytes(int8_model),
        latencies=latencies,
        training=training,
        networks=networks,
        checks=checks,
        compared_threads=compared_threads,
        seconds=time.perf_counter() - start,
    )
