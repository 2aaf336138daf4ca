"""torchquant_aten, the operators in plain ATen, on every call of tests/cases.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import NAMESPACE, Case, all_cases, cases
from support import Shape, assert_same_bits
from support.aten import ATEN, DEVICES, flat
from torch import Tensor
from torch._subclasses import FakeTensorMode

# Rows and sums that CUDA's integer product reads in place, without a copy into aligned memory.
ALIGNED = [
    replace(case, name=f"{case.name}, aligned")
    for operator in ("pack_weight", "unpack_weight", "int8_mm", "linear_dynamic", "linear_static")
    for case in cases(operator, Shape(32, 16, 64))
]
CASES = pytest.mark.parametrize("case", [*all_cases(), *ALIGNED], ids=lambda case: case.id)


def results(namespace: Any, case: Case, device: str = "cpu") -> tuple[Tensor, ...]:
    """On the CPU; a packed weight as the integers that it holds, since each layout differs."""
    found = flat(case.call(namespace, device, gradients=False))
    if case.operator in ("pack_weight", "quantize_pack"):
        sizes = case.given["weight"].shape
        found = (namespace.unpack_weight(found[0], *sizes), *found[1:])
    if case.operator == "pack_conv_weight":
        sizes = case.given["weight"].shape
        found = (namespace.unpack_conv_weight(found[0], list(sizes), case.given["groups"]),)
    if case.operator == "pack_intx_weight":
        given = case.given
        rest = (given["bits"], given.get("group_size"), "weight_zero_point" in given)
        found = namespace.unpack_intx_weight(found[0], *given["weight"].shape, *rest)
    if case.operator == "quantize_pack_intx":
        given = case.given
        rest = (given["bits"], given.get("group_size"), not given["symmetric"])
        integers, *_ = namespace.unpack_intx_weight(found[0], *given["weight"].shape, *rest)
        found = (integers, *found[1:])
    assert all(tensor.device.type == device for tensor in found)
    return tuple(tensor.cpu() for tensor in found)


@CASES
def test_the_bits_of_the_kernels(case: Case) -> None:
    expected = results(NAMESPACE, case)
    for device in DEVICES:
        for number, got in enumerate(results(ATEN, case, device)):
            want = expected[number]
            if case.operator == "fake_quantize_learned_backward" and number > 0:
                # The sums have an order of their own here; test_aten_training.py has the bound.
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                largest = float(want.abs().max())
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * largest)
            else:
                assert_same_bits(got, want)


@CASES
def test_schema(case: Case) -> None:
    """Neither aliases nor writes to its arguments, as the schema says."""
    operator = getattr(ATEN, case.operator).default
    values = case.arguments(ATEN, gradients=False)
    torch.library.opcheck(operator, (), values, test_utils="test_schema")


@CASES
def test_autograd_and_autocast_stay_outside(case: Case) -> None:
    """The gradients are torchquant's; nothing inside is recorded or rounded."""
    values = case.arguments(ATEN, gradients=False)
    expected = getattr(ATEN, case.operator).default(**values)
    leaves = {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in values.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(ATEN, case.operator).default(**leaves)
    for got, want in zip(flat(found), flat(expected), strict=True):
        assert not got.requires_grad
        assert_same_bits(got, want)


@CASES
def test_a_gpu_without_values(case: Case) -> None:
    """Fake tensors of a GPU: no step waits for a value, and none leaves the device."""
    values = case.arguments(ATEN, gradients=False)
    expected = flat(getattr(ATEN, case.operator).default(**values))
    with FakeTensorMode():

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )

        found = getattr(ATEN, case.operator).default(**{k: fake(v) for k, v in values.items()})
        for got, want in zip(flat(found), expected, strict=True):
            assert got.device.type == "cuda"
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
