"""Every operator as torch sees it: schema, fake kernel, tracing, devices."""

import inspect
import re
from typing import Any

import pytest
import torch
from cases import NAMESPACE, OPERATORS, Case, all_cases, cases, schema
from support import assert_same_bits
from support.aten import ATEN, flat
from torch import Tensor

from torchquant.ops import _register

CASES = pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)


# ---------------------------------------------------------------- torch's own checks


@CASES
def test_opcheck(case: Case) -> None:
    """Schema, fake kernel, autograd registration, tracing with fixed and with symbolic shapes."""
    operator = getattr(NAMESPACE, case.operator).default
    torch.library.opcheck(operator, (), case.arguments())


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_calls_have_the_same_bits(name: str) -> None:
    """All cases of an operator in one graph: most of the time goes by the graph, not the call."""
    torch._dynamo.reset()
    operator = getattr(NAMESPACE, name).default

    def calls(every: list[dict[str, Any]]) -> list[Any]:
        return [operator(**arguments) for arguments in every]

    every = [case.arguments() for case in cases(name)]
    compiled = torch.compile(calls, backend="aot_eager", fullgraph=True)
    for case, ours, wanted in zip(cases(name), compiled(every), calls(every), strict=True):
        for got, expected in zip(flat(ours), flat(wanted), strict=True):
            assert_same_bits(got.detach(), expected.detach(), case.id)


# ---------------------------------------------------------------- fake kernels


@CASES
def test_the_fake_kernel_gives_the_results_form(case: Case) -> None:
    """Arguments by position, as the dispatcher passes them, on the meta device."""
    values = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in case.arguments(gradients=False).items()
    }
    args, kwargs = by_position(case.operator, values)
    got = flat(getattr(NAMESPACE, case.operator).default(*args, **kwargs))
    for fake, real in zip(got, flat(case.call(gradients=False)), strict=True):
        assert fake.is_meta
        assert (fake.dtype, fake.shape) == (real.dtype, real.shape)
        assert fake.stride() == real.stride()


def by_position(operator: str, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments up to the first that is left out, and the rest."""
    names = [argument.name for argument in schema(operator)]
    count = next((i for i, name in enumerate(names) if name not in values), len(names))
    rest = {name: values[name] for name in names[count:] if name in values}
    return [values[name] for name in names[:count]], rest


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_kernels_have_the_defaults_of_the_schema(operator: str) -> None:
    parameters = inspect.signature(_register.KERNELS[operator]).parameters
    defaults = {
        name: str(parameter.default)
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty
    }
    expected = {
        argument.name: _default(argument)
        for argument in schema(operator)
        if argument.has_default_value()
    }
    assert defaults == expected


def _default(argument: Any) -> str:
    value = argument.default_value
    if "ScalarType" in str(argument.real_type) and value is not None:
        return {1: "torch.int8", 6: "torch.float32"}[value]
    return str(value)


def wrong_order(scale: Tensor, input: Tensor, zero_point: Tensor | None) -> None: ...


def without_defaults(input: Tensor, bits: Tensor) -> None: ...


def test_a_fake_kernel_of_other_parameters_is_refused() -> None:
    message = (
        "the fake kernel of torchquant::minmax must have the parameters of its schema, "
        "(input, axis, group_size), the last 2 with a default, got (scale, input, zero_point)"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        _register.fake("minmax")(wrong_order)
    with pytest.raises(TypeError, match=r"the last 2 with a default, got \(input, bits\)$"):
        _register.fake("minmax")(without_defaults)


# ---------------------------------------------------------------- devices


def tensor_arguments(operator: str) -> list[str]:
    return [a.name for a in schema(operator) if "Tensor" in str(a.type)]


ELSEWHERE = [
    (operator, name)
    for operator in OPERATORS
    for name in tensor_arguments(operator)
    if len(tensor_arguments(operator)) > 1
]


@pytest.mark.parametrize(("operator", "name"), ELSEWHERE, ids=[f"{o}-{n}" for o, n in ELSEWHERE])
@pytest.mark.parametrize("namespace", [NAMESPACE, ATEN], ids=["fake_kernels", "fallback"])
def test_a_tensor_on_another_device_is_refused(namespace: Any, operator: str, name: str) -> None:
    """Fake kernels and kernels use the same words. Without the check nobody writes the result."""
    tensors = tensor_arguments(operator)
    reference = "input" if "input" in tensors else tensors[0]
    ran = 0
    for case in cases(operator):
        values = case.arguments(namespace, gradients=False)
        others = [other for other in tensors if values.get(other) is not None and other != name]
        if values.get(name) is None or not others:
            continue
        values[name] = values[name].to("meta")
        if name == reference:  # the first that is checked
            any_other = f"({'|'.join(others)})"
            wanted = f"{operator}: {any_other} must be on the {reference}'s device meta, got cpu"
        else:
            wanted = f"{operator}: {name} must be on the {reference}'s device cpu, got meta"
        with pytest.raises(ValueError, match=f"^{wanted}; move it with .to\\(device\\)$"):
            getattr(namespace, operator).default(**values)
        ran += 1
    assert ran > 0


def test_tensors_of_a_list_are_checked_each() -> None:
    values = {"input": torch.ones(2), "others": [torch.ones(2), None, torch.ones(2, device="meta")]}
    found = [pair for name in values for pair in _register._flat(name, values)]
    assert [name for name, _ in found] == ["input", "others[0]", "others[2]"]
    message = "try: others[2] must be on the input's device cpu, got meta; move it with .to(device)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _register.require_one_device("try", "input", dict(found))
