"""The stages of training and their schedule."""

import copy
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.qat_models import STATIC, Classifier, tokens
from torch import Tensor, nn

from torchquant import QATSchedule, convert_, prepare_qat_, qat
from torchquant.training.observers import Observer


def ranges(model: nn.Module) -> list[Tensor]:
    return [m.min_val.clone() for m in model.modules() if isinstance(m, Observer)]


def test_the_stages() -> None:
    model = Classifier()
    expected = model(tokens())
    prepare_qat_(model, STATIC)
    qat.observe_(model)
    assert_same_bits(model(tokens()), expected, "float")
    first = ranges(model)
    assert all(r.isfinite().all() for r in first)
    qat.train_(model)
    assert not torch.equal(model(tokens(1)), Classifier()(tokens(1)))
    second = ranges(model)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    qat.freeze_(model)
    frozen = model(tokens(2))
    assert all(torch.equal(a, b) for a, b in zip(second, ranges(model), strict=True))
    converted = copy.deepcopy(model)
    convert_(converted)
    assert_same_bits(converted(tokens(2)), frozen, "training mode with frozen ranges")


def test_evaluation_does_not_observe() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    model(tokens())
    before = ranges(model)
    model.eval()(tokens(1))
    assert all(torch.equal(a, b) for a, b in zip(before, ranges(model), strict=True))


def test_a_schedule() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    schedule = QATSchedule(nn.Sequential(model), observe_steps=2, freeze_step=4)
    stages = []
    for _ in range(6):
        stages.append(schedule.stage)
        schedule.step()
    assert stages == ["observe", "observe", "train", "train", "freeze", "freeze"]


def test_a_schedule_continues_from_its_state() -> None:
    model = Classifier()
    prepare_qat_(model, STATIC)
    schedule = QATSchedule(model, observe_steps=1, freeze_step=3)
    model(tokens())
    for _ in range(3):
        schedule.step()
    other = Classifier()
    prepare_qat_(other, STATIC)
    resumed = QATSchedule(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert (resumed.stage, resumed.steps) == ("freeze", 3)
    before = ranges(other)
    assert_same_bits(other(tokens(1)), model(tokens(1)))
    assert all(torch.equal(a, b) for a, b in zip(before, ranges(other), strict=True))


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((-1, None), "observe_steps must be an integer of at least 0, got -1"),
        ((1.5, None), "observe_steps must be an integer of at least 0, got 1.5"),
        ((5, 3), "freeze_step must be None, or at least 1 and at least observe_steps = 5, got 3"),
        ((0, 0), "freeze_step must be None, or at least 1 and at least observe_steps = 0, got 0"),
    ],
)
def test_a_schedule_with_invalid_bounds(bounds: tuple[Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        QATSchedule(Classifier(), *bounds)


def test_a_schedule_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"QATSchedule: model must be an nn\.Module, got str"):
        QATSchedule("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one without freeze_step, observe_steps"):
        QATSchedule(Classifier()).load_state_dict({"steps": 3})
