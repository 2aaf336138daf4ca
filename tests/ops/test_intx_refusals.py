"""Wrong arguments of the operators on weights of 2 to 8 bits raise, and change nothing."""

import re

import pytest
import torch
from support import assert_same_bits, floats, integers, positive
from support.aten import ATEN
from support.intx_cases import few_bits
from support.refusals import Refusals

from torchquant import functional, ops

N, K = 20, 70
WEIGHT, SCALE = few_bits(N, K, bits=4), positive(N, 3)
ZERO, BIAS, X = few_bits(N, 3, bits=4, seed=3), floats(N, seed=4), floats(6, K)
PACKED = ops.pack_intx_weight(WEIGHT, SCALE, bits=4, group_size=32)
ONE, SEVEN = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)
SHAPE = list(PACKED.shape)


def pack(weight=WEIGHT, scale=SCALE, zero=None, **changes):
    return ops.pack_intx_weight(weight, scale, zero, **{"bits": 4, "group_size": 32, **changes})


def unpack(packed=PACKED, outputs=N, inputs=K, **changes):
    how = {"bits": 4, "group_size": 32, **changes}
    return ops.unpack_intx_weight(packed, outputs, inputs, **how)


def dynamic(input=X, packed=PACKED, bias=None, **changes):
    how = {"out_features": N, "bits": 4, "group_size": 32, **changes}
    return ops.linear_dynamic_intx(input, packed, bias, **how)


def static(input=X, scale=ONE, zero=SEVEN, packed=PACKED, bias=None, **changes):
    how = {"out_features": N, "bits": 4, "group_size": 32, **changes}
    return ops.linear_static_intx(input, scale, zero, packed, bias, **how)


def deep(inputs, bits):
    return ops.pack_intx_weight(
        torch.zeros(1, inputs, dtype=torch.int8), torch.ones(1, 1), bits=bits, group_size=inputs
    )


NAMES = (
    "none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, relu6, hardswish, hardsigmoid, leaky_relu"
)
PACKED_FOR = (
    f"packed must be the uint8 {SHAPE} result of pack_intx_weight on cpu for this call's "
    "out_features, in_features, bits and group_size, got {}; a weight packed on another type of "
    "device goes through unpack_intx_weight there and pack_intx_weight here"
)
MADE_FOR = (
    f"packed was made for out_features = {N}, in_features = {K}, bits = 4, group_size = 32 "
    "(layout 1), but this call has out_features = {}, in_features = {}, bits = 4, "
    "group_size = {} (layout 1); pack the weight again with pack_intx_weight"
)

REFUSALS: Refusals = {
    # pack_intx_weight
    "pack: float weight": (
        lambda: pack(X),
        TypeError,
        f"pack_intx_weight: weight must be int8 [out_features, in_features], got float32 [6, {K}]; "
        "quantize it first (torchquant.ops.quantize)",
    ),
    "pack: one dimension": (
        lambda: pack(WEIGHT[0]),
        ValueError,
        f"pack_intx_weight: weight must be int8 [out_features, in_features], got int8 [{K}]",
    ),
    "pack: no outputs": (
        lambda: pack(WEIGHT[:0], SCALE[:0]),
        ValueError,
        "pack_intx_weight: out_features must be between 1 and 2147483647, got 0",
    ),
    "pack: no inputs": (
        lambda: pack(WEIGHT[:, :0]),
        ValueError,
        "pack_intx_weight: in_features must be between 1 and 8388608, got 0",
    ),
    "pack: too many inputs": (
        lambda: pack(WEIGHT[:1, :1].expand(1, 2**23 + 1)),
        ValueError,
        "pack_intx_weight: in_features must be between 1 and 8388608, got 8388609",
    ),
    "pack: one bit": (
        lambda: pack(bits=1),
        ValueError,
        "pack_intx_weight: bits must be from 2 to 8, got 1",
    ),
    "pack: nine bits": (
        lambda: pack(bits=9),
        ValueError,
        "pack_intx_weight: bits must be from 2 to 8, got 9",
    ),
    "pack: groups of nothing": (
        lambda: pack(group_size=0),
        ValueError,
        "pack_intx_weight: group_size must be None (one scale per output channel) or between 1 "
        f"and in_features = {K}, got 0",
    ),
    "pack: groups of less than nothing": (
        lambda: pack(group_size=-32),
        ValueError,
        "pack_intx_weight: group_size must be None (one scale per output channel) or between 1 "
        f"and in_features = {K}, got -32",
    ),
    "pack: groups longer than a row": (
        lambda: pack(group_size=K + 1),
        ValueError,
        "pack_intx_weight: group_size must be None (one scale per output channel) or between 1 "
        f"and in_features = {K}, got {K + 1}",
    ),
    "pack: integers of more bits": (
        lambda: pack(integers(N, K).clamp(min=-100)),
        ValueError,
        "pack_intx_weight: weight must be from -8 to 7 for bits = 4, got -100",
    ),
    "pack: an integer too large": (
        lambda: pack(WEIGHT.clone().fill_(8)),
        ValueError,
        "pack_intx_weight: weight must be from -8 to 7 for bits = 4, got 8",
    ),
    "pack: a zero point of more bits": (
        lambda: pack(zero=ZERO - 2),
        ValueError,
        "pack_intx_weight: weight_zero_point must be from -8 to 7 for bits = 4, got -10",
    ),
    "pack: scales of channels for groups": (
        lambda: pack(scale=SCALE[:, 0]),
        ValueError,
        f"pack_intx_weight: weight_scale must be float32 [{N}, 3], got float32 [{N}]",
    ),
    "pack: scales of groups for channels": (
        lambda: pack(group_size=None),
        ValueError,
        f"pack_intx_weight: weight_scale must be float32 [{N}], got float32 [{N}, 3]",
    ),
    "pack: too few groups": (
        lambda: pack(scale=SCALE[:, :2]),
        ValueError,
        f"pack_intx_weight: weight_scale must be float32 [{N}, 3], got float32 [{N}, 2]",
    ),
    "pack: float64 scales": (
        lambda: pack(scale=SCALE.double()),
        TypeError,
        f"pack_intx_weight: weight_scale must be float32, got float64 [{N}, 3]; "
        "convert it with .to(torch.float32)",
    ),
    "pack: int32 zero points": (
        lambda: pack(zero=ZERO.int()),
        TypeError,
        f"pack_intx_weight: weight_zero_point must be int8, got int32 [{N}, 3]; "
        "convert it with .to(torch.int8)",
    ),
    "pack: too few zero points": (
        lambda: pack(zero=ZERO[:, :1]),
        ValueError,
        f"pack_intx_weight: weight_zero_point must be int8 [{N}, 3], got int8 [{N}, 1]",
    ),
    "pack: a scale of too many inputs": (
        lambda: deep(65_794, 7),
        ValueError,
        "pack_intx_weight: a scale must have at most 65793 inputs for sums that fit int32, got "
        "65794; pass a smaller group_size",
    ),
    "pack: a scale of too many inputs of 8 bits": (
        lambda: deep(33_026, 8),
        ValueError,
        "pack_intx_weight: a scale must have at most 33025 inputs for sums that fit int32, got "
        "33026; pass a smaller group_size",
    ),
    "pack: a channel of too many inputs": (
        lambda: pack(WEIGHT[:1, :1].expand(1, 65_794), torch.ones(1), group_size=None),
        ValueError,
        "pack_intx_weight: a scale must have at most 65793 inputs for sums that fit int32, got "
        "65794; pass a smaller group_size",
    ),
    # unpack_intx_weight
    "unpack: int8": (
        lambda: unpack(PACKED.view(torch.int8)),
        TypeError,
        "unpack_intx_weight: packed must be the uint8 result of pack_intx_weight, got int8 "
        f"{SHAPE}",
    ),
    "unpack: outputs beyond 32 bits": (
        lambda: unpack(outputs=2**31),
        ValueError,
        f"unpack_intx_weight: out_features must be between 1 and 2147483647, got {2**31}",
    ),
    "unpack: other outputs": (
        lambda: unpack(outputs=33),
        ValueError,
        "unpack_intx_weight: "
        + PACKED_FOR.replace(str(SHAPE), str([3, SHAPE[1]])).format(f"uint8 {SHAPE}"),
    ),
    "unpack: other inputs in as many blocks": (
        lambda: unpack(inputs=K + 1),
        ValueError,
        "unpack_intx_weight: " + MADE_FOR.format(N, K + 1, 32),
    ),
    # linear_dynamic_intx
    "dynamic: integer input": (
        lambda: dynamic(integers(6, K)),
        TypeError,
        "linear_dynamic_intx: input must be float32, bfloat16 or float16, got int8 "
        f"[6, {K}]; convert it with .to(torch.float32)",
    ),
    "dynamic: scalar": (
        lambda: dynamic(X[0, 0]),
        ValueError,
        "linear_dynamic_intx: input must have at least 1 dimension, got float32 []",
    ),
    "dynamic: empty rows": (
        lambda: dynamic(X[:, :0]),
        ValueError,
        "linear_dynamic_intx: in_features must be between 1 and 8388608, got 0",
    ),
    "dynamic: input too short": (
        lambda: dynamic(X[:, :65]),
        ValueError,
        "linear_dynamic_intx: " + MADE_FOR.format(N, 65, 32),
    ),
    "dynamic: input shorter than a group": (
        lambda: dynamic(X[:, :31]),
        ValueError,
        "linear_dynamic_intx: group_size must be None (one scale per output channel) or between "
        "1 and in_features = 31, got 32",
    ),
    "dynamic: no outputs": (
        lambda: dynamic(out_features=0),
        ValueError,
        "linear_dynamic_intx: out_features must be between 1 and 2147483647, got 0",
    ),
    "dynamic: other outputs in as many tiles": (
        lambda: dynamic(out_features=N + 1),
        ValueError,
        "linear_dynamic_intx: " + MADE_FOR.format(N + 1, K, 32),
    ),
    "dynamic: another group size in as many blocks": (
        lambda: dynamic(group_size=31),
        ValueError,
        "linear_dynamic_intx: " + MADE_FOR.format(N, K, 31),
    ),
    "dynamic: a tile too few": (
        lambda: dynamic(packed=PACKED[:1]),
        ValueError,
        "linear_dynamic_intx: " + PACKED_FOR.format(f"uint8 [1, {SHAPE[1]}]"),
    ),
    "dynamic: bits": (
        lambda: dynamic(bits=9),
        ValueError,
        "linear_dynamic_intx: bits must be from 2 to 8, got 9",
    ),
    "dynamic: int32 bias": (
        lambda: dynamic(bias=BIAS.int()),
        TypeError,
        "linear_dynamic_intx: bias must be float32, bfloat16 or float16, got int32 "
        f"[{N}]; convert it with .to(torch.float32)",
    ),
    "dynamic: a bias too short": (
        lambda: dynamic(bias=BIAS[:-1]),
        ValueError,
        f"linear_dynamic_intx: bias must be float32 [{N}] with one value per output channel, "
        f"got float32 [{N - 1}]",
    ),
    "dynamic: an unknown activation": (
        lambda: dynamic(activation="swish"),
        ValueError,
        f"linear_dynamic_intx: activation must be one of {NAMES}, got 'swish'",
    ),
    "dynamic: integer output": (
        lambda: dynamic(output_dtype=torch.int8),
        TypeError,
        "linear_dynamic_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "dynamic: activation_bits": (
        lambda: dynamic(activation_bits=1),
        ValueError,
        "linear_dynamic_intx: activation_bits must be from 2 to 8, got 1",
    ),
    # linear_static_intx
    "static: integer input": (
        lambda: static(integers(6, K)),
        TypeError,
        "linear_static_intx: input must be float32, bfloat16 or float16, got int8 "
        f"[6, {K}]; convert it with .to(torch.float32)",
    ),
    "static: scalar": (
        lambda: static(X[0, 0]),
        ValueError,
        "linear_static_intx: input must have at least 1 dimension, got float32 []",
    ),
    "static: a scale for each row": (
        lambda: static(scale=positive(6, 1)),
        ValueError,
        "linear_static_intx: input_scale must hold one value (float input is quantized per "
        f"tensor), got float32 [6, 1] for input float32 [6, {K}]",
    ),
    "static: float64 scale": (
        lambda: static(scale=ONE.double()),
        TypeError,
        "linear_static_intx: input_scale must be float32, got float64 [1]; "
        "convert it with .to(torch.float32)",
    ),
    "static: a scale of zero": (
        lambda: static(scale=torch.zeros(1)),
        ValueError,
        "linear_static_intx: input_scale must be finite and at least 2^-126, got 0",
    ),
    "static: int8 zero point": (
        lambda: static(zero=SEVEN.to(torch.int8)),
        TypeError,
        "linear_static_intx: input_zero_point must be int32, got int8 [1]; "
        "convert it with .to(torch.int32)",
    ),
    "static: two zero points": (
        lambda: static(zero=SEVEN.expand(2)),
        ValueError,
        "linear_static_intx: input_zero_point must hold one value (float input is quantized per "
        f"tensor), got int32 [2] for input float32 [6, {K}]",
    ),
    "static: a zero point outside the range": (
        lambda: static(input_qmin=-5),
        ValueError,
        "linear_static_intx: input_zero_point must be from input_qmin = -5 to input_qmax = 127, "
        "got -7",
    ),
    "static: no range": (
        lambda: static(input_qmin=7, input_qmax=7),
        ValueError,
        "linear_static_intx: input_qmin < input_qmax must lie within -128 .. 127, got 7 and 7",
    ),
    "static: a range beyond int8": (
        lambda: static(input_qmin=0, input_qmax=255),
        ValueError,
        "linear_static_intx: input_qmin < input_qmax must lie within -128 .. 127, got 0 and 255",
    ),
    "static: input too short": (
        lambda: static(X[:, :65]),
        ValueError,
        "linear_static_intx: " + MADE_FOR.format(N, 65, 32),
    ),
    "static: int32 bias": (
        lambda: static(bias=BIAS.int()),
        TypeError,
        "linear_static_intx: bias must be float32, bfloat16 or float16, got int32 "
        f"[{N}]; convert it with .to(torch.float32)",
    ),
    "static: integer output": (
        lambda: static(output_dtype=torch.uint8),
        TypeError,
        "linear_static_intx: output_dtype must be float32, bfloat16 or float16, got uint8",
    ),
    "static: an unknown activation": (
        lambda: static(activation="swish"),
        ValueError,
        f"linear_static_intx: activation must be one of {NAMES}, got 'swish'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_raise(name):
    call, error, message = REFUSALS[name]
    tensors = [WEIGHT, SCALE, ZERO, BIAS, X, PACKED, ONE, SEVEN]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    canonical = {"weight": WEIGHT, "weight_scale": SCALE, "bits": 4, "group_size": 32}
    assert_same_bits(dynamic(), functional.linear_dynamic_intx(X, **canonical))


ROWS = ATEN.pack_intx_weight(WEIGHT, SCALE, None, 4, 32)
SIZES = (N, 4, 32)
FALLBACK: Refusals = {
    "packed for the CPU": (
        lambda: ATEN.linear_dynamic_intx(X, PACKED, None, *SIZES),
        ValueError,
        "linear_dynamic_intx: "
        + PACKED_FOR.replace(str(SHAPE), str(list(ROWS.shape))).format(f"uint8 {SHAPE}"),
    ),
    "a range": (
        lambda: ATEN.linear_static_intx(
            X, ONE, SEVEN, ROWS, None, *SIZES, input_qmin=0, input_qmax=255
        ),
        ValueError,
        "linear_static_intx: input_qmin < input_qmax must lie within -128 .. 127, got 0 and 255",
    ),
    "a scale for each row": (
        lambda: ATEN.linear_static_intx(X, positive(6, 1), SEVEN, ROWS, None, *SIZES),
        ValueError,
        "linear_static_intx: input_scale must hold one value (float input is quantized per "
        f"tensor), got float32 [6, 1] for input float32 [6, {K}]",
    ),
    "activation_bits": (
        lambda: ATEN.linear_dynamic_intx(X, ROWS, None, *SIZES, activation_bits=9),
        ValueError,
        "linear_dynamic_intx: activation_bits must be from 2 to 8, got 9",
    ),
    "an unknown activation": (
        lambda: ATEN.linear_dynamic_intx(X, ROWS, None, *SIZES, activation="swish"),
        ValueError,
        f"linear_dynamic_intx: activation must be one of {NAMES}, got 'swish'",
    ),
    "integer output": (
        lambda: ATEN.linear_dynamic_intx(X, ROWS, None, *SIZES, output_dtype=torch.int8),
        TypeError,
        "linear_dynamic_intx: output_dtype must be float32, bfloat16 or float16, got int8",
    ),
    "a bias too short": (
        lambda: ATEN.linear_dynamic_intx(X, ROWS, BIAS[:-1], *SIZES),
        ValueError,
        f"linear_dynamic_intx: bias must be float32 [{N}] with one value per output channel, "
        f"got float32 [{N - 1}]",
    ),
    "integer input": (
        lambda: ATEN.linear_static_intx(integers(6, K), ONE, None, ROWS, None, *SIZES),
        TypeError,
        "linear_static_intx: input must be float32, bfloat16 or float16, got int8 "
        f"[6, {K}]; convert it with .to(torch.float32)",
    ),
}


@pytest.mark.parametrize("name", FALLBACK)
def test_the_fallback_uses_the_same_words(name):
    call, error, message = FALLBACK[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(("inputs", "bits"), [(65_793, 7), (65_793, 2), (33_025, 8)])
def test_as_many_inputs_as_are_allowed(inputs, bits):
    """The refusals above are of one more."""
    packed = deep(inputs, bits)
    y = ops.linear_dynamic_intx(
        torch.ones(1, inputs), packed, out_features=1, bits=bits, group_size=inputs
    )
    assert y.tolist() == [[0.0]]
