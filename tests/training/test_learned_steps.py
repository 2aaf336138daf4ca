"""Learned quantizers in training: steps stay positive, states resume, processes agree."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same_bits, floats, generator
from support.learned import QUANTIZERS, gradients
from support.processes import NoWaiting, in_processes, initial_steps, lsq_in_process, lsq_net, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchquant import LSQPlusQuantizer

# ---------------------------------------------------------------- steps stay positive


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(QUANTIZERS)),
    rates=st.lists(st.floats(1e-3, 2.0**66), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_no_learning_rate_makes_a_scale_negative(name: str, rates: list[float], seed: int) -> None:
    quantizer, x = QUANTIZERS[name](), floats(4, 8, seed=seed)
    upstream = torch.randn(4, 8, generator=generator(seed))
    quantizer(x)
    for rate in rates:
        gradients(quantizer, x, upstream)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                assert parameter.grad is not None
                # Even if the optimizer's step overflows float32, the result must be a number.
                parameter -= (rate * parameter.grad.double()).clamp(-1e38, 1e38)
        y = quantizer(x)
        assert bool(y.isfinite().all())
        scale, zero_point = quantizer.qparams()  # type: ignore[operator]
        assert bool((scale >= 2.0**-126).all())
        floor = quantizer.alpha if name == "pact" else quantizer.step
        assert isinstance(floor, Tensor) and bool((floor > 0).all())
        assert bool((zero_point >= quantizer.qmin).all())  # type: ignore[operator]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_recovery_from_an_absurd_step(name: str, optimizer: Callable[..., Any]) -> None:
    quantizer, x = QUANTIZERS[name](), torch.randn(4, 8, generator=generator(0))
    if name == "pact" or name == "lsq_unsigned":
        x = x.abs()
    quantizer(x)
    nothing = x.square().mean().item()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 1e6
    assert (quantizer(x) - x).square().mean().item() > 0.9 * nothing
    updates = optimizer(quantizer.parameters(), lr=0.02)
    for _ in range(300):
        updates.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        updates.step()
    assert (quantizer(x) - x).square().mean().item() < 0.25 * nothing


# ---------------------------------------------------------------- state


def steps_of_training(quantizer: nn.Module, updates: Any, seeds: range) -> None:
    for seed in seeds:
        updates.zero_grad()
        x = floats(4, 8, seed=seed)
        (quantizer(x) - x.float()).square().mean().backward()
        updates.step()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_checkpoint_resumes_with_the_same_bits(name: str, assign: bool) -> None:
    quantizer = QUANTIZERS[name]()
    updates = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    steps_of_training(quantizer, updates, range(3))
    saved = io.BytesIO()
    torch.save((quantizer.state_dict(), updates.state_dict()), saved)
    saved.seek(0)
    state, updates_state = torch.load(saved)
    other = QUANTIZERS[name]()
    other.load_state_dict(state, assign=assign)
    other_updates = torch.optim.Adam(other.parameters(), lr=0.01)
    other_updates.load_state_dict(updates_state)
    steps_of_training(quantizer, updates, range(3, 6))
    steps_of_training(other, other_updates, range(3, 6))
    for key, value in quantizer.state_dict().items():
        assert_same_bits(other.state_dict()[key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_copies_are_equal_and_independent(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    x = floats(4, 8, seed=1)
    expected = quantizer(x).detach()
    for other in (copy.deepcopy(quantizer), torch.load(buffer, weights_only=False)):
        assert_same_bits(other(x).detach(), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= 3
        assert_same_bits(quantizer(x).detach(), expected)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_conversions_of_the_model_leave_the_steps(
    name: str, convert: Callable[[nn.Module], nn.Module]
) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    before = copy.deepcopy(quantizer.state_dict())
    model = convert(nn.Sequential(nn.Linear(4, 4), quantizer))
    assert list(quantizer.parameters()) == [p for p in model.parameters() if p.dim() == 1][1:]
    for key, value in before.items():
        assert_same_bits(quantizer.state_dict()[key], value, key)
    low = {key: value.bfloat16() for key, value in before.items()}
    quantizer.load_state_dict(low)
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_autocast(name: str) -> None:
    quantizer, x = QUANTIZERS[name](), floats(4, 8)
    plain = copy.deepcopy(quantizer)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(quantizer, x, torch.ones(4, 8))
        assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    for key, value in gradients(plain, x, torch.ones(4, 8)).items():
        assert_same_bits(got[key], value, key)


def test_a_state_dict_holds_what_is_used() -> None:
    quantizer = LSQPlusQuantizer(4)
    quantizer(floats(4, 8))
    with torch.no_grad():
        quantizer.step.fill_(-3.0)
    state = quantizer.state_dict()
    assert state["step"].item() == 2.0**-126
    assert abs(state["offset"].item()) <= 8 * 2.0**-126


def test_meta_then_loaded() -> None:
    with torch.device("meta"):
        quantizer = LSQPlusQuantizer(4)
    source = LSQPlusQuantizer(4)
    source(floats(4, 8))
    quantizer.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(quantizer(floats(4, 8)).detach(), source(floats(4, 8)).detach())


# ---------------------------------------------------------------- inside training


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    updates = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    steps_of_training(quantizer, updates, range(1))
    with NoWaiting():
        steps_of_training(quantizer, updates, range(1, 3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    results = []
    for recompute in (True, False):
        quantizer = QUANTIZERS[name]()
        updates = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        for seed in range(3):
            x = floats(4, 8, seed=seed).requires_grad_()
            updates.zero_grad()
            run = checkpoint(quantizer, x, use_reentrant=reentrant) if recompute else quantizer(x)
            run.square().sum().backward()
            updates.step()
        assert x.grad is not None
        results.append({**quantizer.state_dict(), "input": x.grad})
    for key, value in results[1].items():
        assert_same_bits(results[0][key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_used_twice_before_the_backward(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    x, y = floats(4, 8), floats(4, 8, seed=1)
    quantizer(x)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter -= 1e3  # so that the first use projects
    apart = [gradients(quantizer, part, torch.ones(4, 8)) for part in (x, y)]
    quantizer.zero_grad()
    (quantizer(x).sum() + quantizer(y).sum()).backward()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, apart[0][key] + apart[1][key])


@pytest.mark.parametrize(
    ("name", "backend"),
    [("lsq", "inductor"), ("lsq_plus", "inductor"), *((name, "aot_eager") for name in QUANTIZERS)],
)
def test_compiled_training(name: str, backend: str) -> None:
    torch.compiler.reset()
    results = []
    for compiled in (True, False):
        quantizer = QUANTIZERS[name]()
        call = quantizer
        if compiled:
            call = torch.compile(quantizer, fullgraph=True, backend=backend)
        updates = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        for seed in range(4):
            x = floats(4, 8, seed=seed).requires_grad_()
            updates.zero_grad()
            y = call(x)
            y.square().sum().backward()
            updates.step()
            if seed == 1:  # the next forward has to repair this
                with torch.no_grad():
                    for parameter in quantizer.parameters():
                        parameter -= 1e3
        assert x.grad is not None
        results.append({**quantizer.state_dict(), "input": x.grad, "output": y.detach()})
    for key, value in results[1].items():
        assert_same_bits(results[0][key], value, key)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_exported_for_evaluation(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    quantizer(floats(4, 8))
    quantizer.eval()
    x = floats(4, 8, seed=1)
    program = torch.export.export(quantizer, (x,))
    assert_same_bits(program.module()(x), quantizer(x).detach())


# ---------------------------------------------------------------- processes


@pytest.mark.cpu_only("starts processes, which do not run on the path")
def test_two_processes_train_as_one() -> None:
    batches = [torch.randn(8, 8, generator=generator(seed)) * (1 + seed) for seed in range(6)]
    first = initial_steps(lsq_net(), batches[0])
    net = lsq_net()
    train(net, batches)
    for initial, replicated, (message, sharded) in in_processes(lsq_in_process, batches):
        for key, value in first.items():
            torch.testing.assert_close(initial[key], value, rtol=1e-6, atol=1e-7, msg=key)
        assert "the step must be initialised before fully_shard" in message
        assert "run one batch in training mode before sharding" in message
        for key, value in net.state_dict().items():
            for other in (replicated, sharded):
                torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)
