"""Runs the steps of a chain by one call into C++, on integers from step to step.

The meaning of each step is in :mod:`torchquant.chains.steps`. A program has no Python between its
steps; the shapes and the memory of the values between them are planned once for each input shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchquant._extension import load
from torchquant.chains.describe import described, inputs_of, output_of
from torchquant.chains.steps import (
    AdaptiveMaxPool,
    Channels,
    Conv,
    Crop,
    Flatten,
    Linear,
    Map,
    MaxPool,
    Norm,
    Pad,
    PixelShuffle,
    Qparams,
    Step,
    Upsample,
    Value,
)
from torchquant.configs import Static

# Their output has the integers of their input.
PASSING = (MaxPool, AdaptiveMaxPool, Channels, Crop, Pad, PixelShuffle, Upsample, Flatten)


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
        >>> from torchquant.chains.steps import Input, Map, Output, Qparams, Value
        >>> q = Qparams(scale=0.5, zero_point=0)
        >>> steps = [Input(Value(0, q), 0), Map(Value(0, q), Value(1, None), "relu"),
        ...          Output(Value(1, None), 0)]
        >>> Program(steps).run([Tensor([[-1.0, 1.2]])])
        [tensor([[0., 1.]])]
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._program = _build(self.steps)

    @staticmethod
    def supports(step: Step) -> bool:
        """True if a program can run the step.

        Example:
            >>> from torchquant.chains.steps import MaxPool, Value
            >>> floats = Value(0, None), Value(1, None)
            >>> Program.supports(MaxPool(*floats, kernel=(2, 2), stride=(2, 2), padding=(0, 0)))
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
    elif isinstance(step, PASSING):
        if isinstance(step, (MaxPool, AdaptiveMaxPool)) and step.input.qparams is None:
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
        return None
    if layer.padding_mode != "zeros":
        return f"the padding must be zeros, not {layer.padding_mode}"
    return None


def _build(steps: Sequence[Step]) -> Any:
    values: dict[int, Value] = {}
    texts = []
    for index, step in enumerate(steps):
        reason = refusal(step)
        if reason is not None:
            raise ValueError(f"Program: step {index} is not supported: {reason}")
    for step in _split_norms(steps):
        for value in (*inputs_of(step), getattr(step, "residual", None), output_of(step)):
            if value is not None and values.setdefault(value.index, value) != value:
                raise ValueError(
                    f"Program: value {value.index} must have the same qparams in all steps, got "
                    f"{values[value.index].qparams} and {value.qparams}"
                )
        texts.append(described(step))
    count = max(values, default=-1) + 1
    qparams = [values[index].qparams if index in values else None for index in range(count)]
    return load().Program([_tuple(q) for q in qparams], texts)


def _split_norms(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, in which a norm reads and writes float values."""
    free = 1 + max(
        (value.index for step in steps for value in (*inputs_of(step), output_of(step)) if value),
        default=-1,
    )
    for step in steps:
        if not isinstance(step, Norm):
            yield step
            continue
        if step.input.qparams is not None:
            yield Map(step.input, Value(free, None))
            step, free = replace(step, input=Value(free, None)), free + 1
        if step.output.qparams is not None:
            yield replace(step, output=Value(free, None))
            yield Map(Value(free, None), step.output)
            free += 1
        else:
            yield step


def _tuple(qparams: Qparams | None) -> tuple[float, int, int, int] | None:
    if qparams is None:
        return None
    return qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax


__all__ = ["Program", "refusal"]
