"""The steps of a chain as dictionaries that C++ reads (csrc/program_binding.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchquant import functional
from torchquant.chains.steps import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    Add,
    Affine,
    AvgPool,
    Channels,
    Concat,
    Conv,
    Crop,
    Flatten,
    Input,
    Linear,
    Map,
    MaxPool,
    Mul,
    Norm,
    Output,
    Pad,
    PixelShuffle,
    Step,
    Upsample,
    Value,
)
from torchquant.nn.conv_geometry import before_and_after

Description = dict[str, Any]


def inputs_of(step: Step) -> tuple[Value, ...]:
    """The values that a step reads, without its residual."""
    if isinstance(step, Input):
        return ()
    if isinstance(step, (Add, Mul)):
        return step.left, step.right
    return step.inputs if isinstance(step, Concat) else (step.input,)


def output_of(step: Step) -> Value | None:
    """The value that a step writes, or None."""
    return None if isinstance(step, Output) else step.output


def described(step: Step) -> Description:
    """The step as C++ reads it (csrc/program_binding.cpp)."""
    output = output_of(step)
    common = {
        "inputs": [value.index for value in inputs_of(step)],
        "output": -1 if output is None else output.index,
    }
    return {**common, **_PARTS[type(step)](step)}


def _input(step: Input) -> Description:
    return {"kind": "input", "place": step.argument}


def _result(step: Output) -> Description:
    return {"kind": "output", "place": step.result, "last": step.last}


def _conv(step: Conv) -> Description:
    layer: Any = step.layer
    flat = len(layer.kernel_size) == 1  # a sequence is an image of one row
    before, after = before_and_after(layer)[0::2], before_and_after(layer)[1::2]
    return {
        "kind": "conv",
        **_weight(step, layer.in_channels, layer.out_channels),
        "groups": layer.groups,
        "kernel": [1] * flat + list(layer.kernel_size),
        "stride": [1] * flat + list(layer.stride),
        "dilation": [1] * flat + list(layer.dilation),
        "before": [0] * flat + before,
        "after": [0] * flat + after,
        "residual": _residual(step),
    }


def _residual(step: Conv | Linear | Affine) -> int:
    return -1 if step.residual is None else step.residual.index


def _linear(step: Linear) -> Description:
    layer: Any = step.layer
    outputs, inputs = layer.weight_shape
    return {"kind": "linear", **_weight(step, inputs, outputs), "residual": _residual(step)}


def _weight(step: Conv | Linear, inputs: int, outputs: int) -> Description:
    layer: Any = step.layer
    scale, zero_point = float(layer.input_scale), int(layer.input_zero_point)
    given = step.input.qparams
    assert given is not None
    if (given.scale, given.zero_point) != (scale, zero_point):
        raise ValueError(
            f"Program: the input of a layer must have the layer's scale {scale} and zero point "
            f"{zero_point}, got {given.scale} and {given.zero_point}"
        )
    bias, weight_scale = layer.bias, layer.qweight_scale
    return {
        "in_channels": inputs,
        "out_channels": outputs,
        "packed": layer.packed,
        "weight_scale": weight_scale.expand(outputs),
        "weight_zero_point": layer.qweight_zero_point,
        "bias": None if bias is None else bias.detach().to(torch.float32),
        "activation": step.activation if layer.activation == "none" else layer.activation,
    }


def _two(step: Add | Mul) -> Description:
    return {"kind": "add" if isinstance(step, Add) else "mul", "activation": step.activation}


def _map(step: Map) -> Description:
    tables = [_table(step.input, step.output, step.activation)]
    given = [] if tables[0] is None else tables
    return {"kind": "map", "activation": step.activation, "tables": given}


def _table(input: Value, output: Value, activation: str) -> Tensor | None:
    """All 256 results of a function of an int8 value; None for a float value."""
    q, to = input.qparams, output.qparams
    if q is None:
        return None
    rest = {}
    if to is not None:
        rest = {
            "output_scale": to.scale,
            "output_zero_point": to.zero_point,
            "output_qmin": to.qmin,
            "output_qmax": to.qmax,
        }
    return functional.int8_table(q.scale, q.zero_point, activation=activation, **rest)  # type: ignore[arg-type]


def _affine(step: Affine) -> Description:
    return {
        "kind": "affine",
        "channels": step.channels,
        "gain": step.gain,
        "shift": step.shift,
        "activation": step.activation,
        "residual": _residual(step),
    }


def _norm(step: Norm) -> Description:
    return {
        "kind": "norm",
        "channels": step.channels,
        "gain": step.weight,
        "shift": step.bias,
        "eps": step.eps,
    }


def _max_pool(step: MaxPool) -> Description:
    return {"kind": "max_pool", **_windows(step), "dilation": list(step.dilation)}


def _avg_pool(step: AvgPool) -> Description:
    return {
        "kind": "avg_pool",
        **_windows(step),
        "count_include_pad": step.count_include_pad,
        "divisor": step.divisor or 0,
    }


def _windows(step: MaxPool | AvgPool) -> Description:
    padding = list(step.padding)
    return {
        "kernel": list(step.kernel),
        "stride": list(step.stride),
        "before": padding,
        "after": padding,
        "ceil_mode": step.ceil_mode,
    }


def _adaptive(step: AdaptiveAvgPool | AdaptiveMaxPool) -> Description:
    kind = "adaptive_avg_pool" if isinstance(step, AdaptiveAvgPool) else "adaptive_max_pool"
    return {"kind": kind, "size": [size or 0 for size in step.size]}


def _concat(step: Concat) -> Description:
    tables = []
    for value in step.inputs:
        table = _table(value, step.output, "none")
        same = value.qparams == step.output.qparams
        copied = same or table is None or step.output.qparams is None
        tables.append(torch.empty(0, dtype=torch.int8) if copied else table)
    return {"kind": "concat", "tables": tables}


def _channels(step: Channels) -> Description:
    return {"kind": "channels", "index": list(step.index)}


def _crop(step: Crop) -> Description:
    return {"kind": "crop", "begin": list(step.begin), "end": list(step.end)}


def _pad(step: Pad) -> Description:
    return {"kind": "pad", "before": list(step.before), "after": list(step.after)}


def _pixel_shuffle(step: PixelShuffle) -> Description:
    return {"kind": "pixel_shuffle", "factor": [step.factor] * 2, "inverse": step.inverse}


def _upsample(step: Upsample) -> Description:
    return {
        "kind": "upsample",
        "size": list(step.size or (0, 0)),
        "factor": list(step.factor or (1, 1)),
    }


def _flatten(step: Flatten) -> Description:
    return {"kind": "flatten"}


_PARTS: dict[type, Callable[[Any], Description]] = {
    Input: _input,
    Output: _result,
    Conv: _conv,
    Linear: _linear,
    Add: _two,
    Mul: _two,
    Map: _map,
    MaxPool: _max_pool,
    Affine: _affine,
    Norm: _norm,
    AvgPool: _avg_pool,
    AdaptiveMaxPool: _adaptive,
    AdaptiveAvgPool: _adaptive,
    Concat: _concat,
    Channels: _channels,
    Crop: _crop,
    Pad: _pad,
    PixelShuffle: _pixel_shuffle,
    Upsample: _upsample,
    Flatten: _flatten,
}
