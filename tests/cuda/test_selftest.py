"""The small cases that every kernel must pass on a GPU before its results count."""

import pytest
import torch
from support import triton as support_triton

from torchquant.cuda.host import FAMILY_OF, CudaHost

selftest = support_triton.module("selftest")
ATEN = torch.ops.torchquant_aten
# numpy, with which the interpreter computes, warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", FAMILY_OF)
def test_the_kernels_pass(name):
    aten = getattr(ATEN, name).default
    kernel = CudaHost().kernel(name)
    covered = []

    def counted(*arguments):
        result = kernel(*arguments)
        covered.append(result is not NotImplemented)
        return result

    try:
        assert selftest.check(name, counted, aten, support_triton.DEVICE) is None
    finally:
        support_triton.module("gemm.run").set_chooser(None)
    assert covered and all(covered), "the cases are no use if the kernel refuses them"


@pytest.mark.parametrize("name", FAMILY_OF)
def test_one_wrong_bit_is_found(name):
    aten = getattr(ATEN, name).default

    def flipped(*arguments):
        result = aten(*arguments)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        last = results[-1].clone()
        flat = last.view(-1).view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[last.element_size()]
        )
        finite = last.view(-1).isfinite().nonzero()
        flat[finite[len(finite) // 2]] ^= 1
        results[-1] = last
        return results[0] if isinstance(result, torch.Tensor) else results

    assert "1 of " in selftest.check(name, flipped, aten, torch.device("cpu"))


@pytest.mark.parametrize("name", FAMILY_OF)
def test_samples_are_the_same_every_time_and_leave_the_generator_alone(name):
    torch.manual_seed(3)
    first = list(selftest.samples(name, torch.device("cpu")))
    second = list(selftest.samples(name, torch.device("cpu")))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
            else:
                assert x == y


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_samples_do_not_depend_on_defaults(setting):
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        aten = ATEN.quantize_rows.default
        assert selftest.check("quantize_rows", aten, aten, torch.device("cpu")) is None
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_an_operator_without_samples_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        list(selftest.samples("nothing", torch.device("cpu")))
