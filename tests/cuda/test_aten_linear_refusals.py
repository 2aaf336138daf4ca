"""The linear operators of csrc/aten: schemas, devices without values, refused arguments."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    floats,
    integers,
    positive,
)
from support.aten import (
    ATEN,
    KERNELS,
    packed,
    zeros_of,
)
from torch import Tensor

N, K = 20, 70

WEIGHT = packed(integers(N, K, seed=1))

BOTH = packed(*WEIGHT.weights, WEIGHT.weights[0][:16])

SCALE, ZERO, BIAS = positive(N, seed=2), zeros_of(N, 3), floats(N, seed=4)

SCALES = torch.cat([SCALE, SCALE[:16]])

X, Q = floats(6, K, seed=6), integers(6, K, seed=7)

ONE, POINT = torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32)

TO_INT8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.5])}

META_ROWS = ATEN.pack_weight(WEIGHT.weights[0].to("meta"))


def test_reads_no_values():
    """Tensors without values give shapes: nothing waits for a device."""
    scale, zero, bias = (t.to("meta") for t in (SCALE, ZERO, BIAS))
    x, q, one = X.to("meta"), Q.to("meta"), ONE.to("meta")
    y = ATEN.linear_dynamic(x, META_ROWS, scale, zero, bias, N, False, "gelu")
    assert y.is_meta and y.shape == (6, N)
    assert ATEN.int8_mm(q, META_ROWS, N).dtype == torch.int32
    y = ATEN.linear_static(
        x, one, POINT.to("meta"), META_ROWS, scale, zero, bias, N, "tanh", torch.int8, one
    )
    assert y.shape == (6, N) and y.dtype == torch.int8
    twice = torch.cat([META_ROWS, META_ROWS])
    both = ATEN.linear_dynamic_split(
        x, twice, scale.repeat(2), None, bias.repeat(2), [N, N], True, []
    )
    assert [y.shape for y in both] == [(6, N)] * 2
    rows, *_ = ATEN.quantize_pack(scale.view(1, N), None, -127, 127, True)
    assert ATEN.unpack_weight(rows, 1, N).shape == (1, N)


REFUSALS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "pack: type": ("pack_weight", (X,), {}),
    "pack: dimensions": ("pack_weight", (Q[0],), {}),
    "pack: empty": ("pack_weight", (Q[:, :0],), {}),
    "unpack: in_features": ("unpack_weight", (WEIGHT, N, 0), {}),
    "unpack: out_features": ("unpack_weight", (WEIGHT, 0, K), {}),
    "unpack: type": ("unpack_weight", (X, N, K), {}),
    "quantize_pack: type": ("quantize_pack", (Q, None, -127, 127, True), {}),
    "quantize_pack: range": ("quantize_pack", (X, None, -129, 127, True), {}),
    "quantize_pack: dimensions": ("quantize_pack", (X[0], None, -127, 127, True), {}),
    "quantize_pack: empty": ("quantize_pack", (X[:0], None, -127, 127, True), {}),
    "quantize_pack: scales": ("quantize_pack", (X, SCALE, -127, 127, True), {}),
    "int8_mm: type": ("int8_mm", (X, WEIGHT, N), {}),
    "int8_mm: no dimension": ("int8_mm", (Q[0, 0], WEIGHT, N), {}),
    "dynamic: type": ("linear_dynamic", (Q, WEIGHT, SCALE, None, None, N), {}),
    "dynamic: scale": ("linear_dynamic", (X, WEIGHT, SCALE[:3], None, None, N), {}),
    "dynamic: scale's type": ("linear_dynamic", (X, WEIGHT, SCALE.half(), None, None, N), {}),
    "dynamic: zero points": ("linear_dynamic", (X, WEIGHT, SCALE, ZERO[:3], None, N), {}),
    "dynamic: bias": ("linear_dynamic", (X, WEIGHT, SCALE, None, BIAS[:1], N), {}),
    "dynamic: bias type": ("linear_dynamic", (X, WEIGHT, SCALE, None, ZERO, N), {}),
    "dynamic: activation": ("linear_dynamic", (X, WEIGHT, SCALE, None, None, N, True, "elu"), {}),
    "dynamic: output": (
        "linear_dynamic",
        (X, WEIGHT, SCALE, None, None, N),
        {"output_dtype": torch.int8},
    ),
    "dynamic: bits": (
        "linear_dynamic",
        (X, WEIGHT, SCALE, None, None, N),
        {"activation_bits": 9},
    ),
    "split: type": ("linear_dynamic_split", (Q, BOTH, SCALES, None, None, [N, 16], True, []), {}),
    "split: no layer": ("linear_dynamic_split", (X, BOTH, SCALES, None, None, [], True, []), {}),
    "split: features": ("linear_dynamic_split", (X, BOTH, SCALES, None, None, [0], True, []), {}),
    "split: scales": ("linear_dynamic_split", (X, BOTH, SCALE, None, None, [N, 16], True, []), {}),
    "split: activations": (
        "linear_dynamic_split",
        (X, BOTH, SCALES, None, None, [N, 16], True, ["gelu"]),
        {},
    ),
    "static: type": ("linear_static", (ZERO, ONE, None, WEIGHT, SCALE, None, None, N), {}),
    "static: scales of float": (
        "linear_static",
        (X, positive(6, 1), None, WEIGHT, SCALE, None, None, N),
        {},
    ),
    "static: scales of rows": (
        "linear_static",
        (Q, positive(5, 1), None, WEIGHT, SCALE, None, None, N),
        {},
    ),
    "static: zero point's type": (
        "linear_static",
        (Q, ONE, ONE, WEIGHT, SCALE, None, None, N),
        {},
    ),
    "static: bias": ("linear_static", (Q, ONE, None, WEIGHT, SCALE, None, BIAS.double(), N), {}),
    "static: integer output alone": (
        "linear_static",
        (Q, ONE, None, WEIGHT, SCALE, None, None, N),
        {"output_dtype": torch.int8},
    ),
    "static: output type": (
        "linear_static",
        (Q, ONE, None, WEIGHT, SCALE, None, None, N),
        {"output_dtype": torch.float64},
    ),
    "static: output scales": (
        "linear_static",
        (Q, ONE, None, WEIGHT, SCALE, None, None, N),
        {"output_dtype": torch.int8, "output_scale": SCALE},
    ),
    "static: output range": (
        "linear_static",
        (Q, ONE, None, WEIGHT, SCALE, None, None, N),
        {**TO_INT8, "output_qmax": 200},
    ),
}


@pytest.mark.parametrize(("name", "args", "kwargs"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_what_the_kernels_refuse(name, args, kwargs):
    def call(namespace: Any) -> None:
        resolved = [a.by(namespace, "cpu") if isinstance(a, type(WEIGHT)) else a for a in args]
        getattr(namespace, name)(*resolved, **kwargs)

    with pytest.raises((TypeError, ValueError)) as expected:
        call(KERNELS)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        call(ATEN)


def test_refuses_too_many_inputs_for_int32():
    wide = torch.zeros(1, 65_794, dtype=torch.int8)
    message = "int8_mm: in_features must be at most 65793 for sums that fit int32, got 65794"
    with pytest.raises(ValueError, match=re.escape(message)):
        ATEN.int8_mm(wide, ATEN.pack_weight(wide), 1)


def test_refuses_an_input_range():
    message = (
        "linear_static: input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        rows = ATEN.pack_weight(WEIGHT.weights[0])
        ATEN.linear_static(X, ONE, None, rows, SCALE, None, None, N, input_qmin=5, input_qmax=5)


ROWS_LAYOUT = ATEN.pack_weight(WEIGHT.weights[0])

LAYOUT_REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "tiles": (
        lambda: ATEN.linear_dynamic(X, WEIGHT.by(KERNELS, "cpu"), SCALE, None, None, N),
        "linear_dynamic: packed must be the int8 [33, 128] result of pack_weight on cpu for "
        "out_features = 20 and in_features = 70, got int8 [2, 2176]",
    ),
    "another weight": (
        lambda: ATEN.int8_mm(Q, ATEN.pack_weight(integers(40, K)), N),
        "int8_mm: packed must be the int8 [33, 128] result of pack_weight on cpu",
    ),
    "another input": (
        lambda: ATEN.int8_mm(Q[:, :60], ROWS_LAYOUT, N),
        "int8_mm: packed must be the int8 [34, 64] result of pack_weight on cpu",
    ),
    "rows apart": (
        lambda: ATEN.unpack_weight(torch.cat([ROWS_LAYOUT] * 2, 1)[:, :128], N, K),
        "unpack_weight: packed must be the int8 [33, 128] result of pack_weight on cpu",
    ),
    "members": (
        lambda: ATEN.linear_dynamic_split(X, ROWS_LAYOUT, SCALES, None, None, [N, 16], True, []),
        "linear_dynamic_split: packed must hold 50 rows for out_features [20, 16], "
        "got int8 [33, 128]; concatenate what torchquant.ops.pack_weight returned",
    ),
}


@pytest.mark.parametrize(("call", "message"), LAYOUT_REFUSALS.values(), ids=LAYOUT_REFUSALS.keys())
def test_refuses_another_layout(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


DYNAMIC = (X, ROWS_LAYOUT, SCALE, ZERO, BIAS, N)

STATIC = (Q, ONE, POINT, ROWS_LAYOUT, SCALE, ZERO, BIAS, N)


@pytest.mark.parametrize(
    ("name", "args", "place", "argument"),
    [
        ("linear_dynamic", DYNAMIC, 1, "packed"),
        ("linear_dynamic", DYNAMIC, 2, "weight_scale"),
        ("linear_dynamic", DYNAMIC, 3, "weight_zero_point"),
        ("linear_dynamic", DYNAMIC, 4, "bias"),
        ("linear_static", STATIC, 1, "input_scale"),
        ("linear_static", STATIC, 2, "input_zero_point"),
        ("linear_static", STATIC, 3, "packed"),
        ("linear_static", STATIC, 4, "weight_scale"),
        ("linear_static", STATIC, 6, "bias"),
        ("int8_mm", (Q, ROWS_LAYOUT, N), 1, "packed"),
        ("quantize_pack", (X, SCALE[:6], -127, 127, True), 1, "scale"),
    ],
)
def test_refuses_tensors_elsewhere(name, args, place, argument):
    for here, there in (("cpu", "meta"), ("meta", "cpu")):
        moved_args = [
            a.to(there if i == place else here) if isinstance(a, Tensor) else a
            for i, a in enumerate(args)
        ]
        first = "weight" if name == "quantize_pack" else "input"
        wanted = f"{name}: {argument} must be on the {first}'s device {here}, got {there}; move it"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            getattr(ATEN, name)(*moved_args)


def test_refuses_an_output_scale_elsewhere():
    with pytest.raises(
        ValueError, match="linear_static: output_scale must be on the input's device"
    ):
        ATEN.linear_static(*STATIC, "none", torch.int8, ONE.to("meta"))
