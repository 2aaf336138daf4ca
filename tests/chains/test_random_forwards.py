"""Random forwards: programs, the interpreter, the author's lines with rounding, and float agree."""

import copy
import warnings
from typing import Any

import pytest
import torch
from support.forwards import assert_same, interpreted, region_in, tensors
from support.random_forwards import CHANNELS, Rounding, module_of
from torch import Tensor

import torchquant
from torchquant.convert.regions import regions_in

Int8, Intx = (
    torchquant.Int8StaticActivationInt8WeightConfig,
    torchquant.IntxActivationIntxWeightConfig,
)


def batches(seed: int) -> list[Tensor]:
    """Two shapes for the calibration, and others; some channels_last, one without a batch."""
    generator = torch.Generator().manual_seed(seed)
    first = (1, 3)[seed % 2]
    shapes = ((first, 8, 8), (first, 8, 8), (2, 8, 12), (1, 8, 8), (3, 4, 8))
    made = [torch.randn(n, CHANNELS, h, w, generator=generator) for n, h, w in shapes]
    made[seed % 5] = made[seed % 5].contiguous(memory_format=torch.channels_last)
    return [*made, made[2][0]]


def config_of(seed: int) -> Any:
    if seed % 3:
        return Int8(observer="minmax")
    return Intx(activation_bits=(4, 6)[seed % 2], weight_bits=8, static=True)


def check(seed: int) -> str:
    """Compare everything. Returns "region", or why there is none."""
    model, reference, made = module_of(seed)
    real = copy.deepcopy(model)
    given = batches(seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [run(real, x) for x in given]
        if wanted[0] is None or wanted[1] is None:
            return "the float model does not run"
        torchquant.prepare_(model, config_of(seed), filter_fn=lambda module, name: True)
        try:
            torchquant.calibrate(model, given[:2], progress=False)
        except ValueError as error:
            assert "it saw only zeros" in str(error)
            return "only zeros"
        report = torchquant.convert_(model)
        if not regions_in(model):
            return str([region.reason for region in report.regions])
        region = region_in(model)
        assert len(region.trace.calls) == made.calls, made.source
        rounding = Rounding(region)
        for number, (x, float_result) in enumerate(zip(given, wanted, strict=True)):
            if (
                float_result is None
            ):  # a line does not take these sizes; programs skip useless lines
                continue
            got = [model(x.clone()) for _ in range(2)]
            assert_same(got[0], got[1])
            assert_same(got[0], interpreted(model, x.clone()))
            assert_same(got[0], reference(model, x.clone(), rounding))
            if number < 2 and seed % 3:
                assert_near(got[0], float_result)
    if seed % 4 == 0:
        check_gradients(model, given[0])
    return "region"


def run(model: Any, x: Tensor) -> Any:
    """The result, or None if the model does not take the sizes."""
    try:
        return model(x.clone())
    except (RuntimeError, ValueError, IndexError):
        return None


def assert_near(got: Any, wanted: Any) -> None:
    """Rounded values can be far from float ones in random networks, but not everywhere."""
    for mine, float_one in zip(tensors(got), tensors(wanted), strict=True):
        assert mine.shape == float_one.shape and mine.dtype == float_one.dtype
        size = float_one.norm() + 0.05 * float_one.numel() ** 0.5
        assert (mine - float_one).norm() <= 0.25 * size


def check_gradients(model: Any, x: Tensor) -> None:
    """The first call with gradients runs the interpreter, the second one a program."""
    found = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        losses = [t.square().sum() for t in tensors(model(given)) if t.requires_grad]
        model.zero_grad()
        torch.autograd.backward(losses)
        found.append([given.grad, *(p.grad for p in model.parameters())])
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part < 2 else pytest.mark.slow) for part in range(4)]
)
def test_random_forwards(part: int) -> None:
    results = [check(seed) for seed in range(10 * part, 10 * part + 10)]
    assert results.count("region") >= 8, results


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_forwards(part: int) -> None:
    results = [check(seed) for seed in range(1000 + 50 * part, 1050 + 50 * part)]
    assert results.count("region") >= 40, results


def test_the_reference_notices_a_missing_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounding, "round", lambda self, call, value: value)
    with pytest.raises(AssertionError):
        for seed in range(5):
            check(seed)
