"""A plain training loop, without any code for quantization, and what it is judged by."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model import Recipe
from torchquant import LSQQuantizer, parameter_groups

EVALUATION_BATCH = 16


@dataclass
class Trained:
    """Seconds per step, and the loss of every step in bits per byte."""

    seconds: float
    losses: list[float]


def constant_rate(recipe: Recipe) -> Callable[[int], float]:
    """Fraction of the learning rate in pretraining: a warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / recipe.warmup_steps)


def falling_rate(recipe: Recipe) -> Callable[[int], float]:
    """Fraction of the learning rate in fine-tuning: from 1 down to 0."""
    return lambda step: 1.0 - step / recipe.finetune_steps


def optimizer_for(model: nn.Module, recipe: Recipe, sgd: bool = False) -> torch.optim.Optimizer:
    """AdamW or SGD: no decay for steps, biases and norms; steps have their own learning rate."""
    learned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LSQQuantizer)
        for parameter in module.parameters()
    }
    groups = []
    for group in parameter_groups(model, 0.0 if sgd else recipe.weight_decay):
        weights = [p for p in group["params"] if id(p) not in learned]
        steps = [p for p in group["params"] if id(p) in learned]
        groups.append(group | {"params": weights, "share": 1.0})
        groups.append(group | {"params": steps, "share": 1.0 if sgd else recipe.step_rate})
    groups = [group for group in groups if group["params"]]
    if sgd:
        return torch.optim.SGD(groups, lr=recipe.sgd_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    steps: int,
    rate: Callable[[int], float],
    recipe: Recipe,
    *,
    sgd: bool = False,
    teacher: nn.Module | None = None,
) -> Trained:
    """A plain training loop, without any code for quantization.

    With a teacher, part of the loss is the cross entropy to the teacher's distribution over the
    next byte instead of to the next byte itself (Hinton et al., 2015). A quantized model must
    recover the float model's predictions, and a distribution contains more about them than a byte.
    """
    optimizer = optimizer_for(model, recipe, sgd)
    peak = recipe.sgd_rate if sgd else recipe.learning_rate
    losses = []
    start = time.perf_counter()
    model.train()
    for step, window in enumerate(itertools.islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = peak * group["share"] * rate(step)
        tokens, following = window[:, :-1], window[:, 1:].flatten()
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, following)
        losses.append(loss.item() / math.log(2))
        if teacher is not None:
            with torch.no_grad():
                known = teacher(tokens).flatten(0, 1).softmax(-1)
            share = recipe.teacher_share
            loss = (1 - share) * loss + share * F.cross_entropy(logits, known)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    return Trained((time.perf_counter() - start) / steps, losses)


@torch.inference_mode()
def bits_per_byte(model: nn.Module, text: Tensor, context: int) -> float:
    """Mean cross entropy in bits, over consecutive windows."""
    model.eval()
    count = (len(text) - 1) // context
    tokens = text[: count * context].view(count, context)
    following = text[1 : count * context + 1].view(count, context)
    total = 0.0
    for now, then in zip(
        tokens.split(EVALUATION_BATCH), following.split(EVALUATION_BATCH), strict=True
    ):
        total += F.cross_entropy(model(now).flatten(0, 1), then.flatten(), reduction="sum").item()
    return total / (count * context) / math.log(2)
