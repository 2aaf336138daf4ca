"""Regions in training: forwards that differ between modes, copies, state dicts, other callers."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chain_models import Functional, Gated, UNet, conv_norm, images
from support.chains import input_of
from support.processes import in_processes
from support.qat_models import CONFIGS
from support.trained_regions import (
    STATIC,
    assert_converts,
    converted_copy,
    region_in_training,
    train,
    trained,
    trained_alone,
    trained_in_process,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torchquant
from torchquant import prepare_qat_, qat, verify
from torchquant.convert.regions import regions_in
from torchquant.nn.base import TrainedModule
from torchquant.training.observers import Observer


class DropPath(nn.Module):
    """Stochastic depth as torchvision and timm have it: sizes decide in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = [x.shape[0]] + [1] * (x.dim() - 1)
        return x * torch.empty(shape).bernoulli_(0.5) / 0.5


class Drops(nn.Module):
    """A dropout module, a functional dropout, stochastic depth, and a head of training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_norm(3, 16), conv_norm(16, 16)
        self.last = nn.Conv2d(16, 16, 1)
        self.path, self.drop = DropPath(), nn.Dropout(0.5, inplace=True)
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.aux = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.path(self.body(x)))
        aux = self.aux(x) if self.training else None
        x = F.dropout(self.last(x), 0.5, self.training)
        x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
        x = self.head(F.relu(self.fc(self.drop(x))))
        return (x, aux) if self.training else x


def train_drops(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        model.zero_grad()
        output, aux = model(x)
        (output.square().mean() + aux.square().mean()).backward()
    model.eval()


def test_what_training_drops_is_dropped() -> None:
    torch.manual_seed(0)
    model, x = Drops(), images(4)
    report = prepare_qat_(model, STATIC, filter_fn="*")
    assert [(one.name, one.action) for one in report.regions] == [("", "found")]
    train_drops(model, x)
    region = region_in_training(model)
    assert not region.failure and [record.training for record in region.records] == [False, True]
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    qat.freeze_(model)
    model.train()
    with torch.no_grad(), torch.random.fork_rng():
        outputs = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            outputs.append(model(x)[0])
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert_converts(model, x)
    torchquant.convert_(model)
    assert type(model.aux).__name__ == "QuantizedConv2d"  # it trained, too


def test_a_dropout_drops_rounded_values() -> None:
    """In training, a layer behind it gets multiples of ``scale / (1 - p)``, or 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, 64))
    prepare_qat_(model, STATIC)
    x = torch.randn(16, 64)
    train(model, x)
    qat.freeze_(model)
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for mode in (True, False):
        model.train(mode)(x)
    scale, _ = model[3].input_quantizer.qparams()
    steps = seen[0] * 0.75 / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert 0.1 < float((seen[0] == 0).sum() - (seen[1] == 0).sum()) / seen[0].numel() < 0.4
    quantizer = model[3].input_quantizer
    assert float(quantizer.observer.max_val) == pytest.approx(float(seen[1].max()), rel=0.6)
    assert float(seen[0].max()) > 127 * float(scale)  # no clipping of what the dropout scales up


class Counts(nn.Module):
    """What training does depends on the sizes of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(3, 16), nn.ReLU(), conv_norm(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.training and x.shape[0] > 2:
            y = y * 2
        return y


def test_a_forward_that_only_evaluation_can_follow() -> None:
    torch.manual_seed(0)
    model, x = Counts(), images(4)
    report = prepare_qat_(model, STATIC, filter_fn="*")
    refused, found = sorted(report.regions, key=lambda one: one.name)
    assert refused.action == "float" and refused.reason.startswith("in training mode, what its")
    assert (found.name, found.action) == ("body", "found")
    train(model, x)
    assert_converts(model, x)


def test_parts_in_another_mode() -> None:
    model, x = Drops(), images(4)
    prepare_qat_(model, STATIC, filter_fn="*")
    train_drops(model, x)
    model.stem.eval()  # frozen parts of a model: no record depends on their mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training = True
        model(x)
    model.path.eval()
    model(x)
    model.head = nn.Linear(16, 8)
    with pytest.warns(RuntimeWarning, match=r"Drops.head was changed"):
        model(x)


# ---------------------------------------------------------------- state


class Products(nn.Module):
    """No layer reads the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.third, self.head = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(self.second(x) * self.third(x))


def fresh(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = Products()
    prepare_qat_(model, STATIC, filter_fn="*", **options)
    return model


@pytest.mark.parametrize("example", [False, True])
def test_a_state_dict_from_the_middle_of_training(example: bool, tmp_path: Path) -> None:
    model, x = trained(Products)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = fresh(example_inputs=x[:1]) if example else fresh()
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    if not example:
        with pytest.raises(ValueError, match=r"pass example_inputs to prepare_qat_"):
            torchquant.convert_(other)
    with torch.no_grad():
        wanted = model(x)
        if not example:
            assert torch.equal(other.eval()(x), wanted)
        converted, _ = converted_copy(other)
        assert torch.equal(converted.eval()(x), wanted)
    for one in (model, other):
        train(one, x, 1)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_state_dict_from_before_the_first_batch() -> None:
    model, x = trained(Products)
    model.load_state_dict(fresh().state_dict())
    train(model, x)
    other = fresh()
    train(other, x)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str, tmp_path: Path) -> None:
    model, x = trained(Functional)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert region_in_training(other).root is other
    for one in (model, other):
        train(one, x)
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torchquant.convert_(other)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        torchquant.save(other, tmp_path / "model.safetensors")
        loaded = torchquant.load(tmp_path / "model.safetensors", Functional().eval())
        assert torch.equal(model(x), loaded(x))


# ---------------------------------------------------------------- verbs


def test_example_inputs_decide_before_the_first_batch() -> None:
    model, x = UNet(), images(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"prepare_qat_: example_inputs must be a batch"):
        prepare_qat_(model, STATIC, example_inputs=x[0, 0])
    assert not regions_in(model) and type(model.head) is nn.Conv2d
    state = torch.get_rng_state()
    report = prepare_qat_(model, STATIC, example_inputs=x)
    assert torch.equal(state, torch.get_rng_state())
    (row,) = report.regions
    assert row.action == "trained" and row.share is not None and row.share > 0.9
    assert str(row).startswith("trained: the model (UNet): ")
    state_dict = model.state_dict()
    assert all(torch.equal(before[key], state_dict[key]) for key in before if key in state_dict)
    assert not model.third[0][0].was_called
    train(model, x)
    assert_converts(model, x)


def test_several_calls_prepare_one_region() -> None:
    torch.manual_seed(0)
    model, x = Functional(), input_of(Functional)
    prepare_qat_(model, STATIC, filter_fn="second*")
    train(model, x)
    observer = region_in_training(model).root.second[0].input_quantizer.observer
    report = prepare_qat_(model, STATIC, filter_fn="*")
    assert len(report.regions) == 1 and int(observer.num_batches) == 2
    train(model, x)
    assert int(observer.num_batches) == 4
    region = assert_converts(model, x)
    assert region.plan is not None and len(region.plan.layers) == 4
    torchquant.to_float_(model)
    assert not regions_in(model) and not any("quantize" in key for key in model.state_dict())


def test_ranges_without_training() -> None:
    """Only the layers are in training mode, in the stage that computes in float."""
    torch.manual_seed(0)
    model, x = UNet().eval(), images(2)
    prepare_qat_(model, STATIC, filter_fn="*")
    qat.observe_(model)
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.train()
    qat.freeze_statistics_(model)
    with torch.no_grad():
        model(x)
    qat.freeze_(model)
    assert_converts(model, x)


def test_hooks_see_each_call_once() -> None:
    torch.manual_seed(0)
    model, x = Functional(), input_of(Functional)
    prepare_qat_(model, STATIC, filter_fn="*")
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *args, name=name: seen.append(name))
        for name, module in model.named_modules()
        if name in ("first", "second.0", "fc")
    ]
    train(model, x, 2)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == ["fc", "fc", "first", "first", "second.0", "second.0"]
    assert_converts(model, x)


def test_verify_finds_no_difference() -> None:
    model, x = trained(Gated)
    converted, _ = converted_copy(model)
    for training in (False, True):
        report = verify(model, converted, [x, x[:1]], training=training)
        assert report.exact and report.outputs.values
    assert region_in_training(model)._simulations


# ---------------------------------------------------------------- other callers


def test_gradient_checkpointing() -> None:
    states, grads = [], []
    for way in (False, True):
        model, x = trained(Functional)
        qat.freeze_statistics_(model)  # their change would show in the second forward
        model.train().zero_grad()
        output = checkpoint(model, x, use_reentrant=False) if way else model(x)
        output.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        states.append({n: m.state_dict() for n, m in model.named_modules() if _observes(m)})
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    for name, state in states[0].items():
        assert all(torch.equal(value, states[1][name][key]) for key, value in state.items())


def _observes(module: nn.Module) -> bool:
    return isinstance(module, Observer)


def test_autocast() -> None:
    model, x = trained(Functional)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, x)
        converted, _ = converted_copy(model)
        with torch.no_grad():
            assert torch.equal(model(x), converted(x))
        assert verify(model, converted, [x]).exact


def test_transforms_of_torch_run_the_forward_of_the_class() -> None:
    model, x = trained(Functional)
    qat.freeze_(model)
    with torch.no_grad():
        got = torch.func.vmap(lambda sample: model(sample[None])[0], chunk_size=1)(x[:1])
    assert got.shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_compiled_training(before: bool) -> None:
    """Compiled before the first batch, layers round their own inputs; afterwards, the region."""
    torch.manual_seed(0)
    model, x = Functional(), input_of(Functional)
    prepare_qat_(model, STATIC, filter_fn="*", example_inputs=None if before else x)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for one in (compiled, plain):
        train(one, x)
    if not before:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), plain(x), atol=1e-4, rtol=1e-3)
            assert_converts(model, x)
    else:
        other = copy.deepcopy(model)
        report = torchquant.convert_(other)
        assert [row.action for row in report.regions] == ["float"]
        assert "no batch reached it" in report.regions[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8_static", "w4a4_learned"])
def test_two_processes_train_one_region(name: str) -> None:
    """Ranges of all values are those of the whole batch."""
    batches = [images(4), images(4, seed=1)]
    state, wanted = trained_alone(batches, CONFIGS[name])
    (first, got), (second, other) = in_processes(trained_in_process, batches, CONFIGS[name])
    assert torch.equal(got, other) and first.keys() == second.keys() == state.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    torch.testing.assert_close(first["chain_scale"], state["chain_scale"], rtol=1e-3, atol=1e-6)
    assert float((got - wanted).norm()) < 0.05 * float(wanted.norm())
