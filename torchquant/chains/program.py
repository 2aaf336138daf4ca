"""Runs the steps of a chain by one call into C++, on integers from step to step.

The meaning of each step is in :mod:`torchquant.chains.steps`. A program has no Python between its
steps; the shapes and the memory of the values between them are planned once for each input shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchquant import functional
from torchquant._extension import load
from torchquant.chains.steps import (
    AdaptiveAvgPool,
    Add,
    AvgPool,
    Concat,
    Conv,
    Flatten,
    Input,
    Linear,
    Map,
    MaxPool,
    Mul,
    Output,
    Qparams,
    Step,
    Upsample,
    Value,
)
from torchquant.configs import Static
from torchquant.nn.conv_geometry import before_and_after

Description = dict[str, Any]  # of a step, for C++


class Program:
    """Steps that run as one call on float32 tensors of the CPU.

    A program holds the tensors of its layers: packed weights, scales, biases. Changes of them in
    place take effect in the next call; a layer that gets other tensors needs a new program, and so
    does a float bias that is not float32. Copies and pickles hold the steps and build a program of
    their own.

    Args:
        steps: in an order in which each value is written before it is read.

    Raises:
        ValueError: a step is not supported, or the steps do not fit each other.

    Example:
        >>> q = Qparams(scale=0.5, zero_point=0)
        >>> steps = [Input(Value(0, q), 0), Map(Value(0, q), Value(1, None), "relu"),
        ...          Output(Value(1, None), 0)]
        >>> Program(steps).run([torch.tensor([[-1.0, 1.2]])])
        [tensor([[0., 1.]])]
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._program = _build(self.steps)

    @staticmethod
    def supports(step: Step) -> bool:
        """True if a program can run the step.

        Example:
            >>> both = Value(0, None), Value(1, None)
            >>> Program.supports(Add(*both, Value(2, None)))
            False
        """
        return refusal(step) is None

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """The results of the program.

        Args:
            inputs: float32 tensors on the CPU: ``[n, c, h, w]`` of any strides, ``[n, c, l]`` or
                ``[n, c]``.

        Returns:
            float32 tensors; those with four dimensions are channels_last if the first input is.
            None if an input holds NaN or infinities, which integers cannot represent.

        Raises:
            ValueError: the number or a shape of the inputs does not fit the steps.
        """
        if self._program is None:  # a copy
            self._program = _build(self.steps)
        results: list[Tensor] | None = self._program.run(list(inputs))
        return results

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps, "_program": None}


def refusal(step: Step) -> str | None:
    """The reason why a program cannot run the step, or None.

    Example:
        >>> refusal(Flatten(Value(0, None), Value(1, Qparams(1.0, 0))))
        'Flatten: input and output must have the same qparams'
    """
    reason: str | None = None
    if isinstance(step, (Conv, Linear)):
        reason = _layer_refusal(step)
    elif isinstance(step, (Add, Mul)):
        if step.left.qparams is None or step.right.qparams is None:
            reason = "left and right must be int8"
    elif isinstance(step, (AvgPool, AdaptiveAvgPool)):
        if step.input.qparams is None:
            reason = "input must be int8"
    elif isinstance(step, Concat):
        if step.output.qparams is None:
            reason = "output must be int8"
    elif isinstance(step, (MaxPool, Upsample, Flatten)):
        if isinstance(step, MaxPool) and step.input.qparams is None:
            reason = "input must be int8"
        elif step.input.qparams != step.output.qparams:
            reason = "input and output must have the same qparams"
    return None if reason is None else f"{type(step).__name__}: {reason}"


def _layer_refusal(step: Conv | Linear) -> str | None:
    layer: Any = step.layer
    if step.input.qparams is None:
        return "input must be int8"
    if not isinstance(layer.config.activations, Static):
        return "the layer must have static activations"
    if not layer.packed.is_cpu:
        return f"the layer must be on the CPU, not on {layer.packed.device}"
    if layer.activation != "none" and (step.activation != "none" or step.residual is not None):
        return f"the layer applies {layer.activation} itself, before what the step adds"
    if isinstance(step, Linear):
        return None if step.residual is None else "a linear layer cannot add a residual"
    if layer.padding_mode != "zeros":
        return f"the padding must be zeros, not {layer.padding_mode}"
    return None


def _build(steps: Sequence[Step]) -> Any:
    values: dict[int, Value] = {}
    described = []
    for index, step in enumerate(steps):
        reason = refusal(step)
        if reason is not None:
            raise ValueError(f"Program: step {index} is not supported: {reason}")
    for step in _split_maps(steps):
        for value in (*_inputs(step), getattr(step, "residual", None), _output(step)):
            if value is not None and values.setdefault(value.index, value) != value:
                raise ValueError(
                    f"Program: value {value.index} must have the same qparams in all steps, got "
                    f"{values[value.index].qparams} and {value.qparams}"
                )
        described.append(_described(step))
    count = max(values, default=-1) + 1
    qparams = [values[index].qparams if index in values else None for index in range(count)]
    return load().Program([_tuple(q) for q in qparams], described)


def _split_maps(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, in which a function of a float value is apart from the rounding that follows."""
    free = 1 + max(
        (value.index for step in steps for value in (*_inputs(step), _output(step)) if value),
        default=-1,
    )
    for step in steps:
        if (
            isinstance(step, Map)
            and step.input.qparams is None
            and step.output.qparams is not None
            and step.activation != "none"
        ):
            between = Value(free, None)
            free += 1
            yield Map(step.input, between, step.activation)
            yield Map(between, step.output)
        else:
            yield step


def _tuple(qparams: Qparams | None) -> tuple[float, int, int, int] | None:
    if qparams is None:
        return None
    return qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax


def _inputs(step: Step) -> tuple[Value, ...]:
    if isinstance(step, Input):
        return ()
    if isinstance(step, (Add, Mul)):
        return step.left, step.right
    return step.inputs if isinstance(step, Concat) else (step.input,)


def _output(step: Step) -> Value | None:
    return None if isinstance(step, Output) else step.output


def _described(step: Step) -> Description:
    """The step as C++ reads it (csrc/program_binding.cpp)."""
    output = _output(step)
    common = {
        "inputs": [value.index for value in _inputs(step)],
        "output": -1 if output is None else output.index,
    }
    return {**common, **_PARTS[type(step)](step)}


def _input(step: Input) -> Description:
    return {"kind": "input", "place": step.argument}


def _result(step: Output) -> Description:
    return {"kind": "output", "place": step.result}


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
        "residual": -1 if step.residual is None else step.residual.index,
    }


def _linear(step: Linear) -> Description:
    layer: Any = step.layer
    outputs, inputs = layer.weight_shape
    return {"kind": "linear", **_weight(step, inputs, outputs)}


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


def _adaptive_avg_pool(step: AdaptiveAvgPool) -> Description:
    return {"kind": "adaptive_avg_pool", "size": [size or 0 for size in step.size]}


def _concat(step: Concat) -> Description:
    tables = []
    for value in step.inputs:
        table = _table(value, step.output, "none")
        same = value.qparams == step.output.qparams
        tables.append(torch.empty(0, dtype=torch.int8) if same or table is None else table)
    return {"kind": "concat", "tables": tables}


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
    AvgPool: _avg_pool,
    AdaptiveAvgPool: _adaptive_avg_pool,
    Concat: _concat,
    Upsample: _upsample,
    Flatten: _flatten,
}

__all__ = ["Program", "refusal"]
