"""The steps of a chain by the functional specification, and steps to test."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import generator
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
    Qparams,
    Step,
    Upsample,
    Value,
)
from torchquant.configs import Int8StaticActivationInt8WeightConfig
from torchquant.nn import QuantizedConv1d, QuantizedConv2d, QuantizedLinear
from torchquant.nn.conv_geometry import before_and_after


def expected(steps: Sequence[Step], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the steps compute, value after value; all of them as torch has them."""
    values: dict[int, Tensor] = {}
    results: dict[int, Tensor] = {}
    for step in steps:
        if isinstance(step, Input):
            values[step.output.index] = rounded(inputs[step.argument], step.output)
        elif isinstance(step, Output):
            results[step.result] = real(values[step.input.index], step.input)
        else:
            values[step.output.index] = _STEPS[type(step)](step, values)
    return [results[i] for i in range(len(results))]


def rounded(x: Tensor, value: Value) -> Tensor:
    q = value.qparams
    if q is None:
        return x
    return functional.quantize(x, q.scale, q.zero_point, qmin=q.qmin, qmax=q.qmax, dtype=torch.int8)


def real(q: Tensor, value: Value) -> Tensor:
    p = value.qparams
    return q if p is None else functional.dequantize(q, p.scale, p.zero_point)


def output(value: Value) -> dict[str, Any]:
    q = value.qparams
    if q is None:
        return {}
    return {
        "output_scale": q.scale,
        "output_zero_point": q.zero_point,
        "output_qmin": q.qmin,
        "output_qmax": q.qmax,
    }


def _conv(step: Conv, values: dict[int, Tensor]) -> Tensor:
    layer, q = step.layer, step.input.qparams
    residual: dict[str, Any] = {}
    if step.residual is not None:
        residual["residual"] = values[step.residual.index]
        if step.residual.qparams is not None:
            residual["residual_scale"] = step.residual.qparams.scale
            residual["residual_zero_point"] = step.residual.qparams.zero_point
    return functional.conv_static(
        values[step.input.index],
        q.scale,
        q.zero_point,
        layer.qweight,
        layer.qweight_scale,
        None if layer.bias is None else layer.bias.detach(),
        stride=layer.stride,
        padding=before_and_after(layer),
        dilation=layer.dilation,
        groups=layer.groups,
        activation=step.activation,
        **residual,
        output_dtype=torch.float32 if step.output.qparams is None else torch.int8,
        **output(step.output),
    )


def _linear(step: Linear, values: dict[int, Tensor]) -> Tensor:
    """On images the channels of each pixel are a row; a residual is added to the float result."""
    layer, q, x = step.layer, step.input.qparams, values[step.input.index]
    last = x.movedim(1, -1)
    plain = step.residual is None
    to = step.output if plain else replace(step.output, qparams=None)
    y = functional.linear_static(
        last.reshape(-1, last.shape[-1]),
        q.scale,
        q.zero_point,
        layer.qweight,
        layer.qweight_scale,
        layer.qweight_zero_point,
        None if layer.bias is None else layer.bias.detach(),
        activation=step.activation if plain else "none",
        output_dtype=torch.float32 if to.qparams is None else torch.int8,
        **output(to),
    )
    y = y.view(*last.shape[:-1], -1).movedim(-1, 1)
    return y if plain else _finished(step, y, values)


def _finished(step: Linear | Affine, y: Tensor, values: dict[int, Tensor]) -> Tensor:
    if step.residual is not None:
        y = y + real(values[step.residual.index], step.residual)
    return rounded(functional.ACTIVATIONS[step.activation](y), step.output)


def _affine(step: Affine, values: dict[int, Tensor]) -> Tensor:
    x = real(values[step.input.index], step.input)
    return _finished(step, functional.channel_affine(x, step.gain, step.shift), values)


def _norm(step: Norm, values: dict[int, Tensor]) -> Tensor:
    x = real(values[step.input.index], step.input).movedim(1, -1)
    y = functional.layer_norm(x.contiguous(), step.weight, step.bias, step.eps)
    return rounded(y.movedim(-1, 1).contiguous(), step.output)


def _two(step: Add | Mul, values: dict[int, Tensor]) -> Tensor:
    if step.left.qparams is None or step.right.qparams is None:
        a, b = (real(values[side.index], side) for side in (step.left, step.right))
        y = functional.ACTIVATIONS[step.activation](a + b if isinstance(step, Add) else a * b)
        return rounded(y, step.output)
    function = functional.int8_add if isinstance(step, Add) else functional.int8_mul
    left, right = step.left.qparams, step.right.qparams
    return function(
        values[step.left.index],
        left.scale,
        left.zero_point,
        values[step.right.index],
        right.scale,
        right.zero_point,
        activation=step.activation,
        **output(step.output),
    )


def _map(step: Map, values: dict[int, Tensor]) -> Tensor:
    x = real(values[step.input.index], step.input)
    return rounded(functional.ACTIVATIONS[step.activation](x), step.output)


def _concat(step: Concat, values: dict[int, Tensor]) -> Tensor:
    parts = [rounded(real(values[part.index], part), step.output) for part in step.inputs]
    return torch.cat(parts, 1)


def _images(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.unsqueeze(2)


def _like(x: Tensor, images: Tensor) -> Tensor:
    return images if x.dim() == 4 else images.squeeze(2)


def _max_pool(step: MaxPool, values: dict[int, Tensor]) -> Tensor:
    x = values[step.input.index]
    windows = step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode
    return _like(x, functional.int8_max_pool(_images(x), *windows))


def _avg_pool(step: AvgPool, values: dict[int, Tensor]) -> Tensor:
    x, q = values[step.input.index], step.input.qparams
    windows = step.kernel, step.stride, step.padding, step.ceil_mode, step.count_include_pad
    if q is None:
        y = functional.float_avg_pool(_images(x), *windows, step.divisor)
        return rounded(_like(x, y), step.output)
    scale = q.scale, q.zero_point
    return _like(
        x,
        functional.int8_avg_pool(_images(x), *scale, *windows, step.divisor, **output(step.output)),
    )


def _adaptive(step: AdaptiveAvgPool, values: dict[int, Tensor]) -> Tensor:
    x, q = values[step.input.index], step.input.qparams
    if q is None:
        y = functional.float_adaptive_avg_pool(_images(x), step.size)
        return rounded(_like(x, y), step.output)
    y = functional.int8_adaptive_avg_pool(
        _images(x), q.scale, q.zero_point, step.size, **output(step.output)
    )
    return _like(x, y)


def _adaptive_max(step: AdaptiveMaxPool, values: dict[int, Tensor]) -> Tensor:
    x = values[step.input.index]
    return _like(x, F.adaptive_max_pool2d(_images(x).double(), step.size).to(x.dtype))


def _channels(step: Channels, values: dict[int, Tensor]) -> Tensor:
    return values[step.input.index][:, list(step.index)]


def _crop(step: Crop, values: dict[int, Tensor]) -> Tensor:
    x = values[step.input.index]
    rows, columns = (slice(a, b) for a, b in zip(step.begin, step.end, strict=True))
    return _like(x, _images(x)[:, :, rows, columns])


def _pad(step: Pad, values: dict[int, Tensor]) -> Tensor:
    x, q = values[step.input.index], step.input.qparams
    (top, left), (bottom, right) = step.before, step.after
    return _like(x, F.pad(_images(x), (left, right, top, bottom), value=q.zero_point if q else 0))


def _pixel_shuffle(step: PixelShuffle, values: dict[int, Tensor]) -> Tensor:
    move = F.pixel_unshuffle if step.inverse else F.pixel_shuffle
    return move(values[step.input.index], step.factor)


def _upsample(step: Upsample, values: dict[int, Tensor]) -> Tensor:
    x = values[step.input.index]
    factor = None if step.factor is None else tuple(map(float, step.factor))
    return F.interpolate(_images(x).double(), step.size, factor).to(x.dtype)


def _flatten(step: Flatten, values: dict[int, Tensor]) -> Tensor:
    return values[step.input.index].flatten(1)


_STEPS: dict[type, Any] = {
    Conv: _conv,
    Linear: _linear,
    Add: _two,
    Mul: _two,
    Map: _map,
    Affine: _affine,
    Norm: _norm,
    AdaptiveMaxPool: _adaptive_max,
    Channels: _channels,
    Crop: _crop,
    Pad: _pad,
    PixelShuffle: _pixel_shuffle,
    MaxPool: _max_pool,
    AvgPool: _avg_pool,
    AdaptiveAvgPool: _adaptive,
    Concat: _concat,
    Upsample: _upsample,
    Flatten: _flatten,
}

# ---------------------------------------------------------------- programs to test

# Scales are float32 numbers.
Q = Qparams(float.fromhex("0x1.99999ap-5"), 3)
WIDE = Qparams(float.fromhex("0x1.c28f5cp-4"), -7, -127, 127)
NARROW = Qparams(float.fromhex("0x1.47ae14p-6"), 0, -8, 7)


def layer_of(
    module: nn.Module, q: Qparams = Q, seed: int = 0, activation: str = "none", config: Any = None
) -> Any:
    """The quantized form of a float layer, which reads integers of these parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator(seed))
            parameter.copy_(values * 0.5)
            seed += 1
    kinds = {nn.Conv1d: QuantizedConv1d, nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}
    config = Int8StaticActivationInt8WeightConfig() if config is None else config
    return kinds[type(module)].from_float(
        module,
        config,
        activation,
        input_scale=torch.tensor([q.scale]),
        input_zero_point=torch.tensor([q.zero_point], dtype=torch.int32),
    )


@dataclass
class Chain:
    """Writes steps; each method returns the value that it made."""

    steps: list[Step] = field(default_factory=list)
    count: int = 0
    arguments: int = 0
    results: int = 0

    def value(self, q: Qparams | None) -> Value:
        self.count += 1
        return Value(self.count - 1, q)

    def input(self, q: Qparams | None = Q) -> Value:
        made = self.value(q)
        self.steps.append(Input(made, self.arguments))
        self.arguments += 1
        return made

    def add(self, kind: type, *inputs: Any, to: Qparams | None, **rest: Any) -> Value:
        made = self.value(to)
        self.steps.append(kind(*inputs, made, **rest))
        return made

    def conv(self, x: Value, module: nn.Module, to: Qparams | None, **rest: Any) -> Value:
        layer = layer_of(module, x.qparams, seed=self.count)
        return self.add(Conv, x, to=to, layer=layer, **rest)

    def linear(self, x: Value, out: int, inputs: int, to: Qparams | None, **rest: Any) -> Value:
        layer = layer_of(nn.Linear(inputs, out), x.qparams, seed=self.count)
        return self.add(Linear, x, to=to, layer=layer, **rest)

    def output(self, x: Value) -> None:
        self.steps.append(Output(x, self.results))
        self.results += 1


def block(channels: int = 8) -> Chain:
    """Two inverted residuals, a squeeze, a pool, a layer: all kinds of places in memory."""
    chain = Chain()
    x = chain.conv(chain.input(), nn.Conv2d(3, channels, 3, 2, 1), WIDE, activation="relu6")
    for _ in range(2):
        wide = chain.conv(x, nn.Conv2d(channels, 3 * channels, 1), Q, activation="hardswish")
        depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels)
        deep = chain.conv(wide, depthwise, Q, activation="relu")
        squeezed = chain.add(AdaptiveAvgPool, deep, to=Q, size=(1, 1))
        narrow = chain.conv(squeezed, nn.Conv2d(3 * channels, 4, 1), Q, activation="relu")
        gate = chain.conv(narrow, nn.Conv2d(4, 3 * channels, 1), NARROW, activation="hardsigmoid")
        scaled = chain.add(Mul, deep, gate, to=Q)
        x = chain.conv(scaled, nn.Conv2d(3 * channels, channels, 1), WIDE, residual=x)
    chain.output(x)
    pooled = chain.add(AdaptiveAvgPool, x, to=Q, size=(1, 1))
    flat = chain.add(Flatten, pooled, to=Q)
    chain.output(chain.linear(flat, 10, channels, None))
    return chain
