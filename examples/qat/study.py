"""The training runs: the float baseline of a seed, and what starts from it.

Each run is a job of one thread, so that several share a machine without waiting for each other, and
one processor gives the same results whatever the number of jobs at a time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.model import Recipe, TextModel, batches, split_text
from qat.training import (
    EVALUATION_BATCH,
    Trained,
    bits_per_byte,
    constant_rate,
    falling_rate,
    train,
)
from torchquant import LSQQuantizer, QATConfig, TrainingConfig, convert_, prepare_qat_, verify


@dataclass(frozen=True)
class Setting:
    """Bits of weights and activations, how the model is trained, and what it may cost.

    `bound`: allowed increase of bits per byte over the float baseline, relative.
    """

    qat: TrainingConfig
    ptq: TrainingConfig
    bound: float


def _setting(weight_bits: int, activation_bits: int, bound: float, **qat: Any) -> Setting:
    edge = 8 if min(weight_bits, activation_bits) < 8 else None
    rounded = QATConfig(weight_bits, activation_bits, edge_bits=edge)
    trained = QATConfig(weight_bits, activation_bits, edge_bits=edge, **qat)
    return Setting(trained, rounded, bound)


# At 8 bits a channel's own range gives a good scale. With fewer bits, steps are learned (LSQ). The
# first and the last linear layer keep 8 bits, as usual.
SETTINGS = {
    "W8A8": _setting(8, 8, 0.002),
    "W4A8": _setting(4, 8, 0.005, learned_weights=True),
    "W3A8": _setting(3, 8, 0.015, learned_weights=True),
    "W2A8": _setting(2, 8, 0.05, learned_weights=True),
    "W4A4": _setting(4, 4, 0.02, learned_weights=True),
}


@dataclass(frozen=True)
class Job:
    """One training run of a seed: the float baseline (`name` "float"), a setting or an ablation."""

    kind: str
    name: str
    seed: int
    recipe: Recipe
    folder: Path
    distill: bool = False

    @property
    def study_file(self) -> Path:
        """The file that the baseline's job writes for the other jobs of its seed."""
        return self.folder / f"seed{self.seed}.pt"


@dataclass
class Study:
    """The common start of a seed's runs: pretrained model, position in the data, baseline."""

    recipe: Recipe
    train_text: Tensor
    test_text: Tensor
    model: TextModel
    random_state: Tensor
    baseline: TextModel
    baseline_bits: float

    @classmethod
    def begin(cls, recipe: Recipe, seed: int) -> tuple[Study, Trained]:
        """Train in float: first the common part, then the baseline."""
        train_text, test_text = split_text()
        test_text = test_text[: recipe.test_bytes]
        torch.manual_seed(seed)
        model = TextModel(recipe)
        random = torch.Generator().manual_seed(seed)
        data = batches(train_text, recipe, random)
        train(model, data, recipe.pretrain_steps, constant_rate(recipe), recipe)
        state = random.get_state()
        baseline = copy.deepcopy(model)
        training = train(baseline, data, recipe.finetune_steps, falling_rate(recipe), recipe)
        bits = bits_per_byte(baseline, test_text, recipe.context)
        return cls(recipe, train_text, test_text, model, state, baseline, bits), training

    def converted_bits(self, model: nn.Module) -> tuple[float, int]:
        """Bits per byte of the converted model, and the number of bits in which it differs."""
        converted = copy.deepcopy(model)
        convert_(converted)
        rows = EVALUATION_BATCH * self.recipe.context
        sample = self.test_text[:rows].view(EVALUATION_BATCH, -1)
        report = verify(model, converted, [sample])
        bits = bits_per_byte(converted, self.test_text, self.recipe.context)
        return bits, report.differing_bits + report.outputs.bits

    def quantize(self, setting: Setting) -> float:
        """Bits per byte of the baseline, quantized without training."""
        model = copy.deepcopy(self.baseline)
        prepare_qat_(model, setting.ptq, filter_fn=_every_layer, strict=True)
        return self.converted_bits(model)[0]

    def train_quantized(
        self, setting: Setting, *, scaled: bool = True, sgd: bool = False, distill: bool = False
    ) -> dict[str, Any]:
        """Continue training with quantized layers, on the baseline's batches.

        `scaled`: with LSQ's gradient scale.
        """
        recipe = self.recipe
        model = copy.deepcopy(self.model)
        prepare_qat_(model, setting.qat, filter_fn=_every_layer, strict=True)
        for module in model.modules():
            if isinstance(module, LSQQuantizer) and not scaled:
                _without_gradient_scale(module)
        random = torch.Generator()
        random.set_state(self.random_state)
        training = train(
            model,
            batches(self.train_text, recipe, random),
            recipe.finetune_steps,
            falling_rate(recipe),
            recipe,
            sgd=sgd,
            teacher=self.baseline if distill else None,
        )
        bits, differing = self.converted_bits(model)
        return {
            "bits": bits,
            "over_float": bits / self.baseline_bits - 1,
            "differing_bits": differing,
            "step_ms": 1e3 * training.seconds,
            "losses": training.losses,
        }


ABLATED = "W2A8"
ABLATION = {
    "AdamW, without g": {"scaled": False},
    "SGD, with g": {"sgd": True},
    "SGD, without g": {"sgd": True, "scaled": False},
}


def _every_layer(module: nn.Module, name: str) -> bool:
    """Include layers that are too small to become faster in int8."""
    return True


def _without_gradient_scale(quantizer: LSQQuantizer) -> None:
    quantizer.grad_factor = lambda input: 1.0  # type: ignore[method-assign]


def work(job: Job) -> dict[str, Any]:
    """Run a job, in a process of its own. Returns its record."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"kind": job.kind, "name": job.name, "seed": job.seed}
    if job.kind == "float":
        begun, training = Study.begin(job.recipe, job.seed)
        torch.save(begun, job.study_file)
        step_ms = 1e3 * training.seconds
        return record | {
            "bits": begun.baseline_bits,
            "step_ms": step_ms,
            "losses": training.losses,
        }
    study: Study = torch.load(job.study_file, weights_only=False)  # a file of this run
    if job.kind == "ablation":
        return record | study.train_quantized(SETTINGS[ABLATED], **ABLATION[job.name])
    setting = SETTINGS[job.name]
    record |= study.train_quantized(setting, distill=job.distill)
    rounded = study.quantize(setting)
    return record | {"ptq_bits": rounded, "ptq_over_float": rounded / study.baseline_bits - 1}
