"""Every operator on a GPU: the CPU's bits on each path, and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    FLOATS,
    assert_same_bits,
    floats,
    integers,
    positive,
)
from support.aten import ATEN, KERNELS, arguments, flat
from support.gpu import (
    CASES,
    CUDA,
    Case,
    no_tuning,  # noqa: F401  (a fixture)
    on_gpu,
)
from torch import Tensor

from torchquant import cuda
from torchquant.cuda.host import FAMILY_OF

# A kernel that fails leaves its operator to ATen with a message: here that is a failure.
pytestmark = pytest.mark.filterwarnings("error:torchquant:RuntimeWarning")

DRAWS = st.data()

# Results whose sums have no promised order, and a composition of others: tests of their own below.
OTHERS = {
    *("fake_quantize_learned_backward", "mm_fake_quantized", "qat_linear"),
    "qat_linear_intx",
}

PACKS = {"pack_weight", "quantize_pack"}  # whose first result is in the device's own layout


def compare(name: str, args: tuple[Any, ...], namespace: Any, device: str) -> None:
    """``namespace``'s operator on ``device`` gives the bits of the CPU's kernel."""
    positional, _ = arguments(KERNELS, "cpu", *args)
    expected = list(flat(getattr(KERNELS, name)(*positional)))
    positional, _ = arguments(namespace, device, *args)
    got = list(flat(getattr(namespace, name)(*positional)))
    if name in PACKS:
        n, k = args[0].shape
        expected[0] = KERNELS.unpack_weight(expected[0], n, k)
        got[0] = namespace.unpack_weight(got[0], n, k)
    if name == "pack_conv_weight":
        sizes = (list(args[0].shape), args[1])
        expected[0] = KERNELS.unpack_conv_weight(expected[0], *sizes)
        got[0] = namespace.unpack_conv_weight(got[0], *sizes)
    if name == "pack_intx_weight":
        weight, _, zeros, bits, group_size = args
        sizes = (*weight.shape, bits, group_size, zeros is not None)
        expected = list(KERNELS.unpack_intx_weight(expected[0], *sizes))
        got = list(namespace.unpack_intx_weight(got[0], *sizes))
    if name == "quantize_pack_intx":
        weight, _, bits, group_size, *_, symmetric = args
        sizes = (*weight.shape, bits, group_size, not symmetric)
        expected[0] = KERNELS.unpack_intx_weight(expected[0], *sizes)[0]
        got[0] = namespace.unpack_intx_weight(got[0], *sizes)[0]
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.device.type == device
        if name == "linear_intx" and namespace is KERNELS and device == CUDA:
            finite = b.isfinite()  # the device's own product: its sums have no promised order
            largest = float(b[finite].abs().max()) if finite.any() else 0.0
            tolerance = 1e-4 if b.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(
                a.cpu()[finite], b[finite], rtol=tolerance, atol=tolerance * largest
            )
            continue
        assert_same_bits(a.cpu(), b, f"{name}, result {i}")


@pytest.mark.parametrize("name", CASES)
@given(data=DRAWS)
@settings(max_examples=5, suppress_health_check=list(HealthCheck))
def test_cases_of_operators_on_the_cpu(name: str, data: Any) -> None:
    """That the cases below are right; test_aten_*.py have more of them."""
    compare(name, CASES[name](Case(data)), ATEN, "cpu")


@on_gpu
@pytest.mark.parametrize("path", ["triton", "aten"])
@pytest.mark.parametrize("name", CASES)
@given(data=DRAWS)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_the_cpus_bits(name: str, path: str, data: Any) -> None:
    if path not in cuda.available_paths():
        pytest.skip(f"path {path}: not on this GPU")
    with cuda.use_path(path):
        compare(name, CASES[name](Case(data)), KERNELS, CUDA)
        if path == "triton" and name in FAMILY_OF:
            assert (name, 0) in cuda.paths._dispatcher._sound, "Triton's kernel ran"


def test_every_operator_has_cases() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if "torchquant::" in name}
    assert {name.removeprefix("torchquant::") for name in names} == CASES.keys() | OTHERS


@on_gpu
@pytest.mark.parametrize("granularity", ["tensor", "axis", "group"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_a_learned_step(granularity: str, dtype: torch.dtype) -> None:
    """Input's to the bit; the step's and the offset's up to the order of sums, but each time so."""
    shape, layout = {
        "tensor": ((1,), (None, None)),
        "axis": ((65,), (0, None)),
        "group": ((65, 4), (None, 100)),
    }[granularity]
    x, grad = floats(65, 333).to(dtype), floats(65, 333, seed=1).to(dtype)
    zero = integers(*shape).to(torch.int32)
    call = (grad, x, positive(*shape), zero, -8, 7, *layout)
    expected = KERNELS.fake_quantize_learned_backward(*call)
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in call]
    got = KERNELS.fake_quantize_learned_backward(*moved)
    assert_same_bits(got[0].cpu(), expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4 * float(b.abs().max()))
    for _ in range(3):
        again = KERNELS.fake_quantize_learned_backward(*moved)
        assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@on_gpu
def test_the_product_of_a_gradient_and_a_fake_quantized_weight() -> None:
    call = (floats(33, 65), floats(65, 129, seed=1), positive(65), None, -8, 7)
    got = KERNELS.mm_fake_quantized(*(a.cuda() if isinstance(a, Tensor) else a for a in call))
    expected = KERNELS.mm_fake_quantized(*call)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@on_gpu
def test_a_training_forward() -> None:
    call = (floats(33, 65), floats(37, 65, seed=1), floats(37), None, None, None, -128, 127, True)
    rest = (None, -8, 7, True, "relu")
    got = KERNELS.qat_linear(*(a.cuda() if isinstance(a, Tensor) else a for a in call), *rest)
    assert_same_bits(got.cpu(), KERNELS.qat_linear(*call, *rest))
