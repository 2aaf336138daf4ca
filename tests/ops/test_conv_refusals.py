"""Wrong arguments of the convolution operators raise, on the CPU and in ATen's composition."""

import re
from typing import Any

import pytest
import torch
from support import floats, integers, positive
from support.aten import ATEN, KERNELS

X, W, SCALE, BIAS = integers(2, 4, 5, 6), integers(6, 4, 2, 3, seed=1), positive(6), floats(6)
FLOAT = floats(2, 4, 5, 6)
STEP, ZERO = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
SHAPE = [6, 4, 2, 3]
SIZES = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
INT8 = {"output_dtype": torch.int8, "output_scale": torch.tensor([0.1])}
OUTPUT = (2, 6, 4, 4)
AT_LEAST = "; padding has two ints for each spatial dimension, stride and dilation have one"

# Changes of a call that works -> the error and its whole text.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "uint8 input": (
        {"input": X.view(torch.uint8)},
        TypeError,
        "input must be int8, float32, bfloat16 or float16, got uint8 [2, 4, 5, 6]",
    ),
    "dimensions": (
        {"input": X[0]},
        ValueError,
        "input must have shape [N, C, H, W], got int8 [4, 5, 6]",
    ),
    "channels": (
        {"input": X[:, :3]},
        ValueError,
        "input must have 4 channels for weight_shape [6, 4, 2, 3] and groups = 1, got int8 "
        "[2, 3, 5, 6]",
    ),
    "kernel": (
        {"dilation": [9, 1]},
        ValueError,
        "input must be at least as large as the kernel, got int8 [2, 4, 5, 6] with padding "
        "[0, 0, 0, 0] for weight_shape [6, 4, 2, 3] with dilation [9, 1]",
    ),
    "stride": (
        {"stride": [1, 0]},
        ValueError,
        f"stride must be 2 ints of at least 1, got [1, 0]{AT_LEAST}",
    ),
    "padding": (
        {"padding": [1, 1]},
        ValueError,
        f"padding must be 4 ints of at least 0, got [1, 1]{AT_LEAST}",
    ),
    "weight shape": (
        {"weight_shape": [6, 4]},
        ValueError,
        "weight_shape must be [O, C / groups, kh, kw] or [O, C / groups, k], got [6, 4]",
    ),
    "no inputs": (
        {"weight_shape": [6, 0, 2, 3]},
        ValueError,
        "weight_shape must have no dimension of size 0, got [6, 0, 2, 3]",
    ),
    "too many inputs": (
        {"weight_shape": [6, 4096, 64, 64]},
        ValueError,
        "weight_shape must have at most 8388608 inputs for an output, got [6, 4096, 64, 64]",
    ),
    "groups": (
        {"groups": 4},
        ValueError,
        "groups must divide the 6 outputs of weight_shape [6, 4, 2, 3], got 4",
    ),
    "input scale": (
        {"input_scale": torch.ones(3)},
        ValueError,
        "input_scale must hold one value, or one per sample of input [N], got float32 [3] for "
        "input int8 [2, 4, 5, 6]",
    ),
    "input scale of floats": (
        {"input": FLOAT, "input_scale": torch.ones(2)},
        ValueError,
        "input_scale must hold one value (float input is quantized per tensor), got float32 [2] "
        "for input float32 [2, 4, 5, 6]",
    ),
    "input range": (
        {"input": FLOAT, "input_qmin": 5, "input_qmax": 4},
        ValueError,
        "input_qmin < input_qmax must lie within -128 .. 127, got 5 and 4",
    ),
    "weight scale": (
        {"weight_scale": SCALE[:5]},
        ValueError,
        "weight_scale must be float32 [6] or [1] with one value per output channel, got float32 "
        "[5]",
    ),
    "bias": (
        {"bias": BIAS[:5]},
        ValueError,
        "bias must be float32 [6] with one value per output channel, got float32 [5]",
    ),
    "residual": (
        {"residual": X},
        ValueError,
        "residual must have the result's shape [2, 6, 4, 4], got int8 [2, 4, 5, 6]",
    ),
    "residual type": (
        {"residual": torch.zeros(OUTPUT, dtype=torch.float64)},
        TypeError,
        "residual must be float32 or int8, got float64 [2, 6, 4, 4]",
    ),
    "residual without scale": (
        {"residual": torch.zeros(OUTPUT, dtype=torch.int8)},
        ValueError,
        "residual_scale must be given exactly where residual is int8, got int8 [2, 6, 4, 4] "
        "without residual_scale",
    ),
    "residual scale": (
        {"residual_scale": STEP},
        ValueError,
        "residual_scale must come with a residual, got residual_scale alone",
    ),
    "residual zero point": (
        {
            "residual": torch.zeros(OUTPUT, dtype=torch.int8),
            "residual_scale": STEP,
            "residual_zero_point": 200,
        },
        ValueError,
        "residual_zero_point must be from -128 to 127, got 200",
    ),
    "output": (
        {"output_dtype": torch.int8},
        TypeError,
        "output_dtype must be float32, bfloat16 or float16, or int8 exactly where output_scale is "
        "given, got int8 without output_scale",
    ),
    "output range": (
        {**INT8, "output_qmin": 0, "output_zero_point": -1},
        ValueError,
        "output_qmin <= output_zero_point <= output_qmax must lie within -128 .. 127, got 0, "
        "-1, 127",
    ),
    "activation": (
        {"activation": "no"},
        ValueError,
        None,
    ),
}


def call(namespace: Any, **changes: Any) -> torch.Tensor:
    arguments = {
        "input": X,
        "input_scale": STEP,
        "input_zero_point": ZERO,
        "packed": namespace.pack_conv_weight(W, 1),
        "weight_scale": SCALE,
        "bias": BIAS,
        "weight_shape": SHAPE,
        **SIZES,
    }
    return namespace.conv_static(**arguments | changes)


@pytest.mark.parametrize("namespace", [KERNELS, ATEN], ids=["kernels", "aten"])
@pytest.mark.parametrize(("changes", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(namespace: Any, changes: dict, error: type[Exception], text: str) -> None:
    tensors = [X, FLOAT, W, SCALE, BIAS, STEP, ZERO]
    before = [t.clone() for t in tensors]
    call(namespace)
    wanted = "activation must be one of none, relu" if text is None else text
    end = "" if text is None else "$"
    with pytest.raises(error, match=f"^conv_static: {re.escape(wanted)}{end}"):
        call(namespace, **changes)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"input_scale": torch.zeros(1), "input": FLOAT},
            "input_scale must be finite and at least",
        ),
        (
            {**INT8, "output_scale": torch.zeros(1)},
            "output_scale must be finite and at least 2^-126",
        ),
        ({"input_zero_point": ZERO + 200}, "input_zero_point must be from -128 to 127, got 203"),
        (
            {"input": FLOAT, "input_qmin": 4},
            "input_zero_point must be from 4 to 127, got 3",
        ),
    ],
)
def test_values_that_the_cpu_refuses(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^conv_static: {re.escape(text)}"):
        call(KERNELS, **changes)


def test_weights_packed_for_another_layer() -> None:
    other = KERNELS.pack_conv_weight(integers(6, 4, 3, 3), 1)
    message = (
        "conv_static: packed must be the int8 [1, 1152] result of pack_conv_weight for "
        "weight_shape and groups = 1, got int8 [1, 1152]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(KERNELS, packed=other)  # of the same padded size
    with pytest.raises(TypeError, match="packed must be the int8 result of pack_conv_weight, got"):
        call(KERNELS, packed=other.float())
    with pytest.raises(
        ValueError, match=r"unpack_conv_weight: packed must be the int8 \[1, 1152\]"
    ):
        KERNELS.unpack_conv_weight(KERNELS.pack_conv_weight(W, 2), SHAPE, 1)
    with pytest.raises(TypeError, match="pack_conv_weight: weight must be int8, got float32"):
        KERNELS.pack_conv_weight(W.float(), 1)


def test_dynamic_refusals() -> None:
    packed = KERNELS.pack_conv_weight(W, 1)
    side = {"packed": packed, "weight_scale": SCALE, "bias": None, "weight_shape": SHAPE, **SIZES}
    with pytest.raises(TypeError, match="conv_dynamic: input must be float32, bfloat16 or float16"):
        KERNELS.conv_dynamic(X, **side)
    with pytest.raises(ValueError, match="activation_bits must be from 2 to 8, got 9"):
        KERNELS.conv_dynamic(FLOAT, **side, activation_bits=9)
    with pytest.raises(
        TypeError, match="output_dtype must be float32, bfloat16 or float16, got int8"
    ):
        KERNELS.conv_dynamic(FLOAT, **side, output_dtype=torch.int8)
    with pytest.raises(ValueError, match="conv_dynamic: input must have 4 channels"):
        KERNELS.conv_dynamic(FLOAT[:, :1], **side)
