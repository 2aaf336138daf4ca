"""Prepared models in many kinds of training loops: each batch counts once, no state is lost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_bits
from support.processes import in_processes
from support.training import (
    CONFIGS,
    FEATURES,
    MLP,
    alone,
    batches,
    counts,
    every_training,
    gradients,
    loss_of,
    prepared,
    ranges,
    sgd,
    train,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import torchquant
from torchquant import QATConfig, QATSchedule, convert_, prepare_qat_, qat, verify

config_names = pytest.mark.parametrize("name", CONFIGS)


def assert_same_state(got: nn.Module, expected: nn.Module, *, bits: bool = True) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        if bits:
            assert_same_bits(ours[key], theirs[key], key)
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


def check_converted(model: nn.Module, x: Tensor) -> None:
    converted = copy.deepcopy(model)
    convert_(converted)
    for training in (False, True):
        assert verify(model, converted, [x], training=training).exact


# ---------------------------------------------------------------- one process


@config_names
def test_a_plain_loop(name: str) -> None:
    model = prepared(CONFIGS[name])
    losses = train(model, 15 * batches(4))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    check_converted(model, batches(1)[0][0])


@config_names
def test_gradient_accumulation(name: str) -> None:
    """Two halves give the gradients of the whole: only observed ranges depend on the batch."""
    model = prepared(CONFIGS[name])
    (whole,) = batches(1)
    loss_of(model, whole)  # ranges and first steps
    qat.freeze_(model)
    twin = copy.deepcopy(model)
    loss_of(model, whole).backward()
    for x, labels in zip(whole[0].chunk(2), whole[1].chunk(2), strict=True):
        (loss_of(twin, (x, labels)) / 2).backward()
    expected, got = gradients(model), gradients(twin)
    assert list(got) == list(expected)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-6)


def test_observers_look_at_every_part_of_an_accumulated_batch() -> None:
    model = prepared(CONFIGS["static"])
    ((x, labels),) = batches(1)
    for part in zip(x.chunk(4), labels.chunk(4), strict=True):
        loss_of(model, part).backward()
    assert counts(model) == {4}


class Checkpointed(nn.Module):
    def __init__(self, model: MLP, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for part in (self.model.first, self.model.second):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        logits: Tensor = self.model.head(x)
        return logits


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@config_names
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    """The second forward inside backward counts nothing and changes nothing."""
    model, plain = prepared(CONFIGS[name]), prepared(CONFIGS[name])
    data = batches(3)
    train(Checkpointed(model, reentrant), [(x.clone(), labels) for x, labels in data], sgd(model))
    train(plain, data)
    assert_same_state(model, plain)
    if name == "static":
        assert counts(model) == {3}


@config_names
def test_autocast(name: str) -> None:
    model = prepared(CONFIGS[name])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch[0])
        assert output.dtype == torch.bfloat16
        return nn.functional.cross_entropy(output.float(), batch[1])

    losses = train(model, 15 * batches(4), loss=loss)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        check_converted(model, batches(1)[0][0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@config_names
def test_a_compiled_step(name: str, backend: str) -> None:
    """Compiled layers give the bits of eager mode in a training step."""
    model, plain = prepared(CONFIGS[name]), prepared(CONFIGS[name])
    data = batches(3)
    for net in (model, plain):
        loss_of(net, data[0])  # first steps and ranges exist before anything is compiled
    compiled = torch.compile(model, backend=backend)
    for batch in data:
        output, expected = compiled(batch[0]), plain(batch[0])
        assert_same_bits(output.detach(), expected.detach())
    assert_same_state(model, plain)
    loss_of(compiled, data[0]).backward()
    loss_of(plain, data[0]).backward()
    got, wanted = gradients(model), gradients(plain)
    assert list(got) == list(wanted)
    for key in got:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-7)
    train(compiled, data, sgd(model))
    train(plain, data)
    assert_same_state(model, plain, bits=False)
    torch._dynamo.reset()


def test_frozen_dynamic_layers_compile_to_one_graph() -> None:
    for name in CONFIGS:
        model = prepared(CONFIGS[name])
        ((x, _),) = batches(1)
        model(x)
        qat.freeze_(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(x).detach(), model(x).detach(), name)
        torch._dynamo.reset()


@config_names
def test_resumed_in_the_middle_of_a_schedule(name: str, tmp_path: Path) -> None:
    """Training from a checkpoint of any stage gives the bits of uninterrupted training."""
    data = batches(8)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, QATSchedule]:
        model = prepared(CONFIGS[name])
        optimizer = torch.optim.AdamW(torchquant.parameter_groups(model, 0.01), lr=1e-3)
        return model, optimizer, QATSchedule(model, observe_steps=2, freeze_step=6)

    model, optimizer, schedule = start()
    losses = train(model, data, optimizer, schedule)
    for stop in (1, 2, 4, 6, 7):
        first, first_optimizer, first_schedule = start()
        train(first, data[:stop], first_optimizer, first_schedule)
        states = [first.state_dict(), first_optimizer.state_dict(), first_schedule.state_dict()]
        torch.save(states, tmp_path / "checkpoint.pt")
        resumed, resumed_optimizer, resumed_schedule = start()
        parts = (resumed, resumed_optimizer, resumed_schedule)
        for part, state in zip(parts, torch.load(tmp_path / "checkpoint.pt"), strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        rest = train(resumed, data[stop:], resumed_optimizer, resumed_schedule)
        assert rest == losses[stop:]
        assert_same_state(resumed, model)
        assert resumed_schedule.stage == schedule.stage == "freeze"


@config_names
def test_clipping_scaling_and_a_frozen_layer(name: str) -> None:
    model = prepared(CONFIGS[name])
    model.first.requires_grad_(False)
    before = {k: v.clone() for k, v in model.first.state_dict().items() if "weight" in k}
    optimizer = sgd(model)
    for batch in batches(3):
        optimizer.zero_grad(set_to_none=True)
        (1024 * loss_of(model, batch)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = model.first.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert all(p.grad is None for p in model.first.parameters())
    check_converted(model, batches(1)[0][0])


def test_distillation_from_the_float_model() -> None:
    """The recipe of the README: distillation brings the student closer to the float model."""
    torch.manual_seed(0)
    teacher = MLP().eval()
    student = copy.deepcopy(teacher).train()
    prepare_qat_(student, QATConfig(weight_bits=2, learned_weights=True))
    held_out = torch.randn(256, FEATURES, generator=torch.Generator().manual_seed(5))

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(held_out) - teacher(held_out)).square().mean().item()

    before = distance(student)
    optimizer = torch.optim.AdamW(torchquant.parameter_groups(student), lr=1e-3)
    for x, _ in batches(60):
        with torch.no_grad():
            target = teacher(x).softmax(-1)
        loss = nn.functional.cross_entropy(student(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance(student) < 0.7 * before


# ---------------------------------------------------------------- two processes


STEPS = 5


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    return batches(STEPS)


def check_processes(results: list[Any], name: str, data: list[tuple[Tensor, Tensor]]) -> None:
    (first, last), expected = alone(name, data)
    for (seen_first, seen_last), state in results:
        for layer, value in first.items():
            assert_same_bits(seen_first[layer], value, f"{layer}, range of the first batch")
        for layer, value in last.items():
            torch.testing.assert_close(seen_last[layer], value, rtol=1e-3, atol=1e-4)
        if last:  # the input of the model does not depend on weights
            assert_same_bits(seen_last["first.0"], last["first.0"], "range of all batches")
        assert list(state) == list(expected)
        for key in expected:
            torch.testing.assert_close(state[key], expected[key], rtol=1e-3, atol=1e-5)
    (_, ours), (_, theirs) = results
    for key in ours:
        assert_same_bits(ours[key], theirs[key], f"{key} of the two processes")
    model = prepared(CONFIGS[name])
    model.load_state_dict(ours)
    check_converted(model, data[0][0])


@pytest.fixture(scope="module")
def trained_in_processes(data: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """What each of the two processes has after all trainings, one after the other."""
    return in_processes(every_training, list(CONFIGS), data)


@config_names
@pytest.mark.parametrize("way", ["distributed", "sharded"])
def test_two_processes(
    way: str, name: str, trained_in_processes: list[Any], data: list[tuple[Tensor, Tensor]]
) -> None:
    """Two processes with half a batch each train like one process with the whole batch."""
    check_processes([result[way][name] for result in trained_in_processes], name, data)


def test_the_ranges_helper_sees_all_layers() -> None:
    model = prepared(CONFIGS["static"])
    assert list(ranges(model)) == ["first.0", "second.0", "head"]
