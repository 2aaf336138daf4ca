"""The stages of quantization-aware training, and a schedule of the stages.

In the first stage (:func:`observe_`), prepared layers compute in float and observers record ranges.
In the second stage (:func:`train_`), they compute with integers and observers keep updating the
ranges. In the last stage (:func:`freeze_`), the ranges are fixed, and so are the statistics of
batch norms that became part of a layer. Buffers of the model hold the stage, so a model that is
loaded from a checkpoint continues in the same stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchquant.nn.base import TrainedModule
from torchquant.training.observed_quantizer import ObservedQuantizer


def observe_(model: nn.Module) -> None:
    """Stage 1: prepared layers compute in float; observers record the ranges of their inputs.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> observe_(model)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        True
    """
    _set_stage(model, observing=True, quantizing=False)


def train_(model: nn.Module) -> None:
    """Stage 2 (default after ``prepare_qat_``): integers; observers keep updating ranges.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> train_(model)
    """
    _set_stage(model, observing=True, quantizing=True)


def freeze_(model: nn.Module) -> None:
    """Stage 3: integers; observed ranges and the statistics of folded batch norms are fixed.

    Learned steps are parameters, so the optimizer still updates them.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> freeze_(model)
    """
    _set_stage(model, observing=False, quantizing=True)


def freeze_statistics_(model: nn.Module, frozen: bool = True) -> None:
    """Keep the running statistics of the batch norms that became part of prepared layers.

    The layers then normalize with the running statistics in training mode, too. Networks are
    usually trained so for the last epochs. The stages set this as well: stage 3 keeps the
    statistics, the other stages update them.

    Args:
        model: a model that :func:`prepare_qat_` prepared.
        frozen: False updates the statistics in training mode again.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32))
        >>> _ = torchquant.prepare_qat_(model)
        >>> freeze_statistics_(model)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(model.train()(x), model.eval()(x))
        True
    """
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.freeze_statistics(frozen)


def _set_stage(model: nn.Module, observing: bool, quantizing: bool) -> None:
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.enable_quantization(quantizing)
            module.freeze_statistics(not observing)
        elif isinstance(module, ObservedQuantizer):
            module.enable_observer(observing)
            module.enable_fake_quant(quantizing)


class QATSchedule:
    """Sets the stage of a prepared model; call :meth:`step` after each optimizer step.

    Args:
        model: a model that :func:`prepare_qat_` prepared, also if it is compiled or distributed.
        observe_steps: number of steps in stage 1.
        freeze_step: number of steps, counted from the start, after which stage 3 begins; None:
            never.

    Raises:
        TypeError: model is not a module.
        ValueError: observe_steps or freeze_step is not an integer of at least 0, or freeze_step is
            0 or less than observe_steps.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> schedule = QATSchedule(model, observe_steps=1, freeze_step=2)
        >>> stages = [schedule.stage]
        >>> for _ in range(2):
        ...     schedule.step()
        ...     stages.append(schedule.stage)
        >>> stages
        ['observe', 'train', 'freeze']
    """

    def __init__(
        self, model: nn.Module, observe_steps: int = 0, freeze_step: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"QATSchedule: model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.steps = 0
        self._set_bounds(observe_steps, freeze_step)
        self._apply()

    @property
    def stage(self) -> str:
        """ "observe", "train" or "freeze"."""
        if self.freeze_step is not None and self.steps >= self.freeze_step:
            return "freeze"
        return "train" if self.steps >= self.observe_steps else "observe"

    def step(self) -> None:
        """Count a step and set the stage of the next step."""
        before = self.stage
        self.steps += 1
        if self.stage != before:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The state from which :meth:`load_state_dict` continues."""
        return {
            "steps": self.steps,
            "observe_steps": self.observe_steps,
            "freeze_step": self.freeze_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`, and set the stage of the model.

        Raises:
            ValueError: an entry is missing or has a value that it cannot have.
        """
        missing = {"steps", "observe_steps", "freeze_step"} - state.keys()
        if missing:
            raise ValueError(
                "QATSchedule: state must be a state dict of a QATSchedule, got one without "
                f"{', '.join(sorted(missing))}"
            )
        steps = _count("steps", state["steps"])
        self._set_bounds(state["observe_steps"], state["freeze_step"])
        self.steps = steps
        self._apply()

    def _set_bounds(self, observe_steps: int, freeze_step: int | None) -> None:
        observe_steps = _count("observe_steps", observe_steps)
        if freeze_step is not None and _count("freeze_step", freeze_step) < max(1, observe_steps):
            raise ValueError(
                "QATSchedule: freeze_step must be None, or at least 1 and at least observe_steps = "
                f"{observe_steps}, got {freeze_step}; it counts from the start"
            )
        self.observe_steps, self.freeze_step = observe_steps, freeze_step

    def _apply(self) -> None:
        {"observe": observe_, "train": train_, "freeze": freeze_}[self.stage](self.model)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"QATSchedule: {name} must be an integer of at least 0, got {value!r}")
    return value


__all__ = ["QATSchedule", "freeze_", "freeze_statistics_", "observe_", "train_"]
