"""Specification, wrapper and schema of an operator have one name and the same arguments."""

import inspect
from typing import Any

import pytest
import torch
from cases import OPERATORS, Case, all_cases, schema
from support import assert_same_bits
from support.aten import Packed, flat
from torch import Tensor

from torchquant import functional, ops
from torchquant.scheme import PerAxis, PerGroup

# Packing moves integers in memory and computes nothing: csrc/formats describes it.
WITHOUT_SPECIFICATION = {
    "pack_weight",
    "unpack_weight",
    "pack_conv_weight",
    "unpack_conv_weight",
    "pack_intx_weight",
    "unpack_intx_weight",
}

# The operators on weights of 2 to 8 bits: `bits` and `group_size` are those of the weight, which
# holds its scales and zero points when it is packed.
INTX = {operator for operator in OPERATORS if "intx" in operator}
# The operators whose `bits` and `group_size` keep their names.
BY_NAME = INTX | {"quantize_kv", "dequantize_kv", "attention_cached"}
PACKED_INTX = INTX - {"quantize_pack_intx", "qat_linear_intx"}  # these take float weights

# The wrappers have one argument for which elements share a scale.
GRANULARITY = {"axis": "granularity", "group_size": "granularity"}

# The specification takes the int8 weight, whose shape includes out_features, and bool masks.
CANONICAL = {"packed": "weight", "bits": "mask"}
TOLD_BY_THE_WEIGHT = {
    "int8_mm": {"out_features"},
    "linear_dynamic": {"out_features"},
    "linear_static": {"out_features"},
    "conv_dynamic": {"weight_shape"},
    "conv_static": {"weight_shape"},
} | {
    operator: {"out_features", "has_zero_point"}
    if operator.startswith("linear")
    else {"num_embeddings", "embedding_dim", "has_zero_point"}
    for operator in PACKED_INTX
}
# Arguments of the specification only: an oracle's precision, the bits of linear_dynamic, and what
# a packed weight of 2 to 8 bits holds.
ONLY_IN_THE_SPECIFICATION = {
    "fake_quantize_learned_backward": {"dtype"},
    "quantize_per_token": {"bits"},
} | {operator: {"weight_scale", "weight_zero_point"} for operator in PACKED_INTX}


def canonical(operator: str, name: str) -> str:
    """The specification's name of an argument."""
    return name if operator in BY_NAME and name == "bits" else CANONICAL.get(name, name)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_wrapper_has_the_schemas_arguments(operator: str) -> None:
    granularity = {} if operator in BY_NAME else GRANULARITY
    renamed = dict.fromkeys(granularity.get(a.name, a.name) for a in schema(operator))
    got = parameters(getattr(ops, operator))
    if "granularity" in renamed:  # its place differs: in the schema it is before dtype
        assert sorted(got) == sorted(renamed)
    else:
        assert got == list(renamed)


@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - WITHOUT_SPECIFICATION))
def test_the_specification_has_the_wrappers_arguments(operator: str) -> None:
    told = TOLD_BY_THE_WEIGHT.get(operator, set())
    names = parameters(getattr(ops, operator))
    assert told <= set(names)
    wanted = [canonical(operator, name) for name in names if name not in told]
    extra = ONLY_IN_THE_SPECIFICATION.get(operator, set())
    got = parameters(getattr(functional, operator))
    assert extra <= set(got)
    assert [name for name in got if name not in extra] == wanted


@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - WITHOUT_SPECIFICATION))
def test_defaults_of_the_specification_are_the_wrappers(operator: str) -> None:
    specified = inspect.signature(getattr(functional, operator)).parameters
    for name, parameter in inspect.signature(getattr(ops, operator)).parameters.items():
        if name in specified and (operator, name) != ("quantize", "dtype"):  # None: by the range
            assert specified[name].default == parameter.default, name


def test_specifications_and_wrappers_have_files_of_one_name() -> None:
    for operator in sorted(set(OPERATORS) - WITHOUT_SPECIFICATION):
        module = getattr(ops, operator).__module__.rpartition(".")[2]
        specification = getattr(functional, operator).__module__.rpartition(".")[2]
        if operator != "fake_quantize":  # the forward pass is an affine map; the rest is training's
            assert module == specification, operator


# ---------------------------------------------------------------- every case


def specified(case: Case) -> tuple[Tensor, ...]:
    """The specification's results of a case, in the operator's form."""
    values = case.arguments(gradients=False)
    for name, value in case.given.items():
        if isinstance(value, Packed):
            del values[name]
            values |= value.canonical
    for name in TOLD_BY_THE_WEIGHT.get(case.operator, set()):
        values.pop(name, None)
    if "bits" in values and case.operator not in BY_NAME:
        values["mask"] = functional.unpack_bits(values.pop("bits"), values["grad"].shape)
    if (axis := values.pop("axis", None)) is not None:
        values["granularity"] = PerAxis(axis)
    if case.operator not in BY_NAME and (size := values.pop("group_size", None)) is not None:
        values["granularity"] = PerGroup(size)
    if case.operator == "quantize":
        values.setdefault("dtype", torch.int8)
    results = list(flat(getattr(functional, case.operator)(**values)))
    if case.operator == "quantize_pack":
        results[0] = ops.pack_weight(results[0])
    if case.operator == "quantize_pack_intx":
        q, scale, zero_point = results
        sizes = {"bits": values["bits"], "group_size": values.get("group_size")}
        own = None if values["symmetric"] else zero_point
        results[0] = ops.pack_intx_weight(q, scale, own, **sizes)
    masks = ("in_range", "positive", "fake_quantize_mask")
    if case.operator in masks:
        results[-1] = functional.pack_bits(results[-1])
    return tuple(results)


@pytest.mark.parametrize(
    "case",
    [case for case in all_cases() if case.operator not in WITHOUT_SPECIFICATION],
    ids=lambda case: case.id,
)
def test_the_bits_of_the_specification(case: Case) -> None:
    expected = specified(case)
    for number, got in enumerate(flat(case.call(gradients=False))):
        want = expected[number]
        sums = case.operator == "fake_quantize_learned_backward" and number > 0
        if sums or case.operator == "mm_fake_quantized":  # no promised order
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            largest = float(want.abs().max()) if want.numel() else 0.0
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * largest)
        else:
            assert_same_bits(got, want)
