"""The stages of quantization-aware training, and a schedule that goes through them.

First (:func:`observe`) prepared layers compute in float while observers look at the ranges; then
(:func:`quantize`) they compute with integers while the ranges still move; last (:func:`freeze`) the
ranges stay. The stage lies in the model's buffers, so a checkpoint resumes where it was taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchquant.nn.base import TrainedModule
from torchquant.training.observed_quantizer import ObservedQuantizer


def observe(model: nn.Module) -> None:
    """First stage: prepared layers compute in float, while observers look at their inputs.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> observe(model)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        True
    """
    _set_stage(model, observing=True, quantizing=False)


def quantize(model: nn.Module) -> None:
    """Second stage, in which a model is after ``prepare_qat_``: integers, and ranges that move.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> quantize(model)
    """
    _set_stage(model, observing=True, quantizing=True)


def freeze(model: nn.Module) -> None:
    """Last stage: integers, and observed ranges that stay as they are.

    Learned steps are parameters like others: the optimizer moves them as long as it has them.

    Example:
        >>> import torch, torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = torchquant.prepare_qat_(model)
        >>> freeze(model)
    """
    _set_stage(model, observing=False, quantizing=True)


def _set_stage(model: nn.Module, observing: bool, quantizing: bool) -> None:
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.enable_quantization(quantizing)
        elif isinstance(module, ObservedQuantizer):
            module.enable_observer(observing)
            module.enable_fake_quant(quantizing)


class QATSchedule:
    """Leads a prepared model through the stages; call :meth:`step` after each optimizer step.

    Args:
        model: a model that :func:`prepare_qat_` prepared; also one that is wrapped (compiled,
            distributed).
        observe_steps: for so many steps layers compute in float and observers look.
        freeze_step: after so many steps, counted from the start, observed ranges stay; None: never.

    Raises:
        TypeError: model is not a module.
        ValueError: steps that are negative, or a freeze before there was anything to observe.

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
        ['observe', 'quantize', 'freeze']
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
        """ "observe", "quantize" or "freeze"."""
        if self.freeze_step is not None and self.steps >= self.freeze_step:
            return "freeze"
        return "quantize" if self.steps >= self.observe_steps else "observe"

    def step(self) -> None:
        """Count a step; the next one runs in the stage that is due then."""
        before = self.stage
        self.steps += 1
        if self.stage != before:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "steps": self.steps,
            "observe_steps": self.observe_steps,
            "freeze_step": self.freeze_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken; the model's stage is set accordingly.

        Raises:
            ValueError: an entry is missing, or of a value that it cannot have.
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
        {"observe": observe, "quantize": quantize, "freeze": freeze}[self.stage](self.model)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"QATSchedule: {name} must be an integer of at least 0, got {value!r}")
    return value


__all__ = ["QATSchedule", "freeze", "observe", "quantize"]
