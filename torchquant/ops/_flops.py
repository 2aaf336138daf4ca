"""What the operators count in ``torch.utils.flop_counter.FlopCounterMode``.

As torch does, a product of M x K by K x N counts 2 M K N, whatever the type of its elements, and a
convolution counts the products of each output pixel; quantization, bias and activation count
nothing. In backward the operators run others of this table and torch's own products, which are
counted by themselves.

Importing torch's counter takes about 0.1 s, because it imports Triton. It is therefore not imported
here; the formulas are registered when another module imports it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from torchquant._extension import load

load()  # defines the operators

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _linear(input: Shape, features: int | Sequence[int]) -> int:
    outputs = features if isinstance(features, int) else sum(features)
    return 2 * math.prod(input) * outputs


def _int8_mm(input: Shape, packed: Shape, out_features: int) -> int:
    return _linear(input, out_features)


def _linear_on_packed(
    input: Shape,
    packed: Shape,
    weight_scale: Shape,
    weight_zero_point: Shape | None,
    bias: Shape | None,
    out_features: int | Sequence[int],
    *rest: Any,
    **options: Any,
) -> int:
    return _linear(input, out_features)


def _linear_static(
    input: Shape,
    input_scale: Shape,
    input_zero_point: Shape | None,
    packed: Shape,
    weight_scale: Shape,
    weight_zero_point: Shape | None,
    bias: Shape | None,
    out_features: int,
    *rest: Any,
    **options: Any,
) -> int:
    return _linear(input, out_features)


def _linear_intx(
    input: Shape, packed: Shape, bias: Shape | None, out_features: int, *rest: Any, **options: Any
) -> int:
    return _linear(input, out_features)


def _linear_static_intx(
    input: Shape,
    input_scale: Shape,
    input_zero_point: Shape | None,
    packed: Shape,
    bias: Shape | None,
    out_features: int,
    *rest: Any,
    **options: Any,
) -> int:
    return _linear(input, out_features)


def _conv(input: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape) -> int:
    pixels = 1
    for i, (size, kernel) in enumerate(zip(input[2:], weight[2:], strict=True)):
        room = size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel - 1) - 1
        pixels *= room // stride[i] + 1
    return 2 * input[0] * pixels * math.prod(weight)


def _conv_static(
    input: Shape,
    input_scale: Shape,
    input_zero_point: Shape | None,
    packed: Shape,
    weight_scale: Shape,
    bias: Shape | None,
    weight_shape: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    *rest: Any,
    **options: Any,
) -> int:
    return _conv(input, weight_shape, stride, padding, dilation)


def _conv_dynamic(
    input: Shape,
    packed: Shape,
    weight_scale: Shape,
    bias: Shape | None,
    weight_shape: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    *rest: Any,
    **options: Any,
) -> int:
    return _conv(input, weight_shape, stride, padding, dilation)


def _qat_linear(input: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    return _linear(input, weight[0])


def _mm_fake_quantized(grad: Shape, weight: Shape, *rest: Any, **options: Any) -> int:
    return _linear(grad, weight[1])


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


FORMULAS: dict[str, Callable[..., int]] = {
    "int8_mm": _int8_mm,
    "linear_dynamic": _linear_on_packed,
    "linear_dynamic_split": _linear_on_packed,
    "linear_static": _linear_static,
    "linear_dynamic_intx": _linear_intx,
    "linear_intx": _linear_intx,
    "linear_static_intx": _linear_static_intx,
    "conv_static": _conv_static,
    "conv_dynamic": _conv_dynamic,
    "qat_linear": _qat_linear,
    "qat_linear_intx": _qat_linear,
    "mm_fake_quantized": _mm_fake_quantized,
    "attention": _attention,
}


def register(counter: ModuleType) -> None:
    """Register the formulas with torch's counter; without effect the second time."""
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.torchquant, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(_shapes_only(formula))


def _shapes_only(formula: Callable[..., int]) -> Callable[..., int]:
    """torch passes the shape of the result too, which no formula needs."""

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return count


class _WhenImported(MetaPathFinder):
    """Finds torch's counter as Python does, and registers the formulas once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _WhenImported)]
        register(module)


def register_when_imported() -> None:
    """Register the formulas now if torch's counter is imported already, otherwise when it is."""
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        register(counter)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


register_when_imported()
