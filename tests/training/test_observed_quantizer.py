"""ObservedQuantizer: the observer's scales, the switches, and its state."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from support import FLOATS, NAN, assert_same_bits, floats
from support.processes import NoWaiting
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchquant import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObservedQuantizer,
    Observer,
    PerAxis,
    PerGroup,
    functional,
)

OBSERVERS: dict[str, Callable[[], Observer]] = {
    "moving_average": MovingAverageMinMaxObserver,
    "four_bits_unsigned": lambda: MinMaxObserver(bits=4, signed=False),
    "symmetric_channels": lambda: MinMaxObserver(symmetric=True, granularity=PerAxis(0)),
    "last_axis": lambda: MinMaxObserver(granularity=PerAxis(-1)),
    "groups": lambda: MinMaxObserver(bits=3, granularity=PerGroup(3)),
}


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_rounds_to_what_the_integers_stand_for(
    make: Callable[[], Observer], dtype: torch.dtype
) -> None:
    quantizer = ObservedQuantizer(make())
    x = floats(4, 8, dtype=dtype)
    y = quantizer(x)
    scale, zero_point = quantizer.qparams()
    granularity = quantizer.observer.granularity
    q = functional.quantize(
        x,
        scale,
        zero_point,
        qmin=quantizer.qmin,
        qmax=quantizer.qmax,
        granularity=granularity,
        dtype=torch.int8 if quantizer.qmin < 0 else torch.uint8,
    )
    expected = functional.dequantize(q, scale, zero_point, granularity=granularity, dtype=dtype)
    assert_same_bits(y, expected)


def test_the_gradient_passes_where_the_range_reaches() -> None:
    quantizer = ObservedQuantizer(MinMaxObserver(bits=4, symmetric=True))
    quantizer(torch.tensor([-7.0, 7.0]))
    x = torch.tensor([-9.0, -8.4, -7.0, 0.3, 7.4, 7.6]).requires_grad_()
    quantizer.freeze()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_autocast_keeps_the_inputs_dtype_and_float32_scales() -> None:
    quantizer = ObservedQuantizer()
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(floats(2, 4)).dtype == torch.float32
        assert quantizer(floats(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert quantizer.qparams()[0].dtype == torch.float32


# ---------------------------------------------------------------- switches


def test_stages() -> None:
    quantizer = ObservedQuantizer(MovingAverageMinMaxObserver(1.0), fake_quant_enabled=False)
    x = torch.tensor([-1.0, 2.0])
    assert quantizer(x) is x  # observes
    assert quantizer.enable_fake_quant() is quantizer
    observed = quantizer.qparams()[0].clone()
    assert quantizer(2 * x) is not x
    assert quantizer.qparams()[0].item() == 2 * observed.item()
    quantizer.eval()(9 * x)  # evaluation does not observe
    quantizer.train().freeze()(9 * x)  # nor does a frozen quantizer
    assert quantizer.qparams()[0].item() == 2 * observed.item()
    assert quantizer(9 * x).max() < 4.1
    quantizer.enable_observer()(9 * x)
    assert quantizer.qparams()[0].item() == pytest.approx(9 * observed.item())
    assert quantizer.enable_fake_quant(False)(x) is x
    assert quantizer.observing and not quantizer.quantizing


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_a_checkpoint_resumes_in_its_stage(make: Callable[[], Observer], assign: bool) -> None:
    quantizer = ObservedQuantizer(make(), fake_quant_enabled=False)
    quantizer(floats(4, 8))
    quantizer.enable_fake_quant()
    for freeze in (False, True):
        if freeze:
            quantizer.freeze()
        other = ObservedQuantizer(make(), fake_quant_enabled=False)
        other.load_state_dict(copy.deepcopy(quantizer.state_dict()), assign=assign)
        reference = copy.deepcopy(quantizer)
        for seed in (1, 2):
            x = floats(4, 8, seed=seed)
            assert_same_bits(other(x), reference(x))
        for name, value in reference.state_dict().items():
            assert_same_bits(other.state_dict()[name], value, name)


def test_pickled_in_the_middle() -> None:
    quantizer = ObservedQuantizer()
    quantizer(floats(2, 4))
    buffer = io.BytesIO()
    torch.save(quantizer.freeze(), buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert_same_bits(other(floats(2, 4, seed=1)), quantizer(floats(2, 4, seed=1)))


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_conversions_of_the_model_leave_the_scales(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(ObservedQuantizer(), nn.Linear(4, 4))
    model(floats(2, 4))
    before = copy.deepcopy(model[0].state_dict())
    after = convert(model)[0].state_dict()  # type: ignore[index]
    for name, value in before.items():
        assert_same_bits(after[name], value, name)


# ---------------------------------------------------------------- inside training


def test_nothing_waits_for_the_device() -> None:
    quantizer = ObservedQuantizer()
    quantizer(floats(4, 8))
    x = floats(4, 8, seed=1).requires_grad_()
    with NoWaiting():
        quantizer(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), ObservedQuantizer(), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    for seed in range(3):
        x = floats(2, 4, seed=seed).requires_grad_()
        y = x.detach().clone().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        plain(y).square().sum().backward()
        assert x.grad is not None and y.grad is not None
        assert_same_bits(x.grad, y.grad)
    for name, value in plain.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


@pytest.mark.parametrize(
    ("make", "backend"),
    [(OBSERVERS["moving_average"], "inductor")]
    + [(make, "aot_eager") for make in OBSERVERS.values()],
    ids=["moving_average-inductor", *OBSERVERS],
)
def test_compiled_training(make: Callable[[], Observer], backend: str) -> None:
    torch.compiler.reset()
    quantizer = ObservedQuantizer(make())
    plain = copy.deepcopy(quantizer)
    call = torch.compile(quantizer, fullgraph=True, backend=backend)
    for seed in range(3):
        x = floats(4, 8, seed=seed).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = call(x), plain(y)
        assert_same_bits(out.detach(), expected.detach())
        out.square().sum().backward()
        expected.square().sum().backward()
        assert x.grad is not None and y.grad is not None
        assert_same_bits(x.grad, y.grad)
    for name, value in plain.state_dict().items():
        assert_same_bits(quantizer.state_dict()[name], value, name)
    plain.eval(), quantizer.eval()
    assert_same_bits(call(x).detach(), plain(x).detach())


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_exported_for_evaluation(make: Callable[[], Observer]) -> None:
    quantizer = ObservedQuantizer(make())
    quantizer(floats(4, 8))
    quantizer.eval()
    x = floats(4, 8, seed=1)
    program = torch.export.export(quantizer, (x,))
    assert_same_bits(program.module()(x), quantizer(x))


def test_used_twice_before_the_backward() -> None:
    quantizer = ObservedQuantizer(MovingAverageMinMaxObserver(1.0))
    x, y = floats(2, 4).requires_grad_(), floats(2, 4, seed=1).requires_grad_()
    (quantizer(x).sum() + quantizer(y).sum()).backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_a_batch_without_finite_values_stays_visible() -> None:
    quantizer = ObservedQuantizer()
    quantizer(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        assert quantizer(torch.tensor([NAN, 1.0])).isnan().tolist() == [True, False]


# ---------------------------------------------------------------- errors


def test_no_range_yet() -> None:
    for quantizer in (ObservedQuantizer().eval(), ObservedQuantizer().freeze()):
        quantizer.set_layer_name("layers.3")
        with pytest.raises(
            RuntimeError, match=r"ObservedQuantizer of layers.3: there is no range yet"
        ):
            quantizer(torch.ones(2))
        with pytest.raises(RuntimeError, match="run batches in training mode"):
            quantizer.qparams()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channels = ObservedQuantizer(MinMaxObserver(granularity=PerAxis(0))).eval()
        with pytest.raises(RuntimeError, match="there is no range yet"):
            channels(torch.ones(2, 2))


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "observer": (
        lambda: ObservedQuantizer(nn.Identity()),  # type: ignore[arg-type]
        TypeError,
        r"ObservedQuantizer: observer must be a torchquant observer .*, got Identity",
    ),
    "integers": (
        lambda: ObservedQuantizer()(torch.ones(2, dtype=torch.int8)),
        TypeError,
        r"ObservedQuantizer: input must be float32, bfloat16 or float16, got int8 \[2\]",
    ),
    "device": (
        lambda: ObservedQuantizer()(torch.ones(2, device="meta")),
        ValueError,
        r"ObservedQuantizer: input must be on the module's device cpu, got meta; move",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
