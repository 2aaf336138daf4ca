"""Fuzzer of the operators' checks: whatever arguments come, an operator computes or raises.

    python tests/fuzz/fuzz_ops.py [--seconds 20] [--cases 0] [--seed 0] [--namespace torchquant]

Arguments are drawn from each operator's schema, so that a new operator is covered the day it is
registered: tensors of every dtype, small and odd shapes, layouts, devices without data; numbers at
the ends of their types. Most arguments of a call fit together, so that most calls get through. A
crash ends the process: the call that was running is then in ``--trace`` (a file).
Another exception than the documented kinds, or memory far beyond the arguments', is a finding.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchquant.ops  # noqa: F401  (registers the operators)

EXPECTED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
MEMORY = 256 * 2**20
SIZES = (1, 1, 2, 3, 15, 16, 17, 64, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32)
ODD_DTYPES = (*DTYPES, torch.float64, torch.int64, torch.bool, torch.complex64, torch.int16)
SMALL_INTEGERS = (0, 1, -1, 2, 16, 17, 127, -128, 255, 256)
INTEGERS = (*SMALL_INTEGERS, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
TEXTS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "", "é", "GELU", "a" * 999)


class Arguments:
    """Draws one call's arguments; sizes and dtypes are the same wherever they have to fit."""

    def __init__(self, draw: random.Random, namespace: str, operator: str) -> None:
        self.draw, self.operator = draw, operator
        self.pack_weight = getattr(torch.ops, namespace).pack_weight  # each has its own layout
        self.rows, self.inputs = draw.choice(SIZES), draw.choice(SIZES)
        layers = 1 + draw.randrange(3) if operator == "linear_dynamic_split" else 1
        self.layers = [draw.choice(SIZES) for _ in range(layers)]
        self.outputs = sum(self.layers)
        shapes = ((self.rows, self.inputs), (self.inputs,), (2, self.rows, self.inputs))
        self.shape = draw.choice(shapes)
        integers = operator in ("int8_mm", "dequantize")
        floats = not integers and operator != "linear_static"
        self.dtype = draw.choice(DTYPES[:3] if floats else DTYPES[3 * integers : 5])
        self.oddness = draw.choice((0.0, 0.05, 0.2))  # share of arguments that do not fit

    def one_in(self, count: int) -> bool:
        return self.draw.randrange(count) == 0

    def is_odd(self) -> bool:
        return self.draw.random() < self.oddness

    def fitting(self, name: str) -> Tensor:
        """What a call that works would pass under this name."""
        outputs, inputs, draw = self.outputs, self.inputs, self.draw
        if "packed" in name:
            weights = [self.filled((n, inputs), torch.int8) for n in self.layers]
            return torch.cat([self.pack_weight(weight) for weight in weights])
        if name in ("query", "key", "value"):
            return self.filled((1, 2, self.rows, inputs), self.dtype)
        if name == "mask":
            return self.filled((self.rows, self.rows), torch.float32)
        if name == "scale" and self.operator == "quantize_pack":
            return torch.rand(outputs) + 0.01
        if name in ("scale", "input_scale", "output_scale"):
            return torch.rand(()) + 0.01
        if name in ("zero_point", "input_zero_point"):
            return self.filled((1,), torch.int32).clamp(0, 127)
        per_channel = self.operator in ("linear_dynamic_split", "qat_linear", "mm_fake_quantized")
        channels = (outputs,) if per_channel or self.one_in(2) else (1,)
        if name == "weight_zero_point":
            return self.filled(channels, torch.int32)
        if name == "weight_scale":
            return torch.rand(channels) + 0.01
        if self.operator.endswith("_norm") and name in ("weight", "bias"):
            return self.filled((inputs,), draw.choice(DTYPES[:3]))
        if name == "bias":
            integer = self.operator == "linear_static" and self.one_in(2)
            return self.filled((outputs,), torch.int32 if integer else torch.float32)
        if name == "weight":
            integers = self.operator == "pack_weight"
            return self.filled((outputs, inputs), torch.int8 if integers else torch.float32)
        if name == "grad" and self.operator == "mm_fake_quantized":
            return self.filled((self.rows, outputs), torch.float32)
        if name == "bits":
            count = torch.Size(self.shape).numel()
            return self.filled((-(-count // 8),), torch.uint8)
        return self.filled(self.shape, self.dtype)

    def filled(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape) * self.draw.choice((1.0, 50.0, 1e30, 0.0))
        if dtype.is_floating_point and self.one_in(4):
            values.view(-1)[:: 1 + self.draw.randrange(7)] = self.draw.choice((math.nan, math.inf))
        if not (dtype.is_floating_point or dtype.is_complex):
            values = values.clamp(-128, 127).nan_to_num()
        return values.to(dtype)

    def odd(self) -> Tensor:
        draw = self.draw
        shape = tuple(draw.choice((0, *SIZES)) for _ in range(draw.randrange(5)))
        return self.laid_out(self.filled(shape, draw.choice(ODD_DTYPES)))

    def laid_out(self, x: Tensor) -> Tensor:
        """The same tensor seen in another way, or a tensor that has no values to read."""
        way = self.draw.randrange(12)
        if way == 0 and x.dim() > 1:
            return x.transpose(0, -1)
        if way == 1 and x.dim() > 0:
            return x[..., ::2]
        if way == 2 and x.numel() > 0 and x.dim() > 0:
            return x[:1].expand(self.draw.choice((1, 3, 5)), *x.shape[1:])
        if way == 3:
            return x.to("meta")
        if way == 4 and x.dim() == 2:
            return x.to_sparse()
        if way == 5 and x.is_floating_point():
            return x.clone().requires_grad_()
        if way == 6 and x.numel() > 1:
            return x.flatten()[1:]
        if way == 7 and x.is_complex():
            return x.conj()
        # torch has announced the removal of quantized tensors.
        if way == 8 and x.dtype == torch.float32 and hasattr(torch, "quint8"):
            return torch.quantize_per_tensor(x.nan_to_num(0, 1, -1), 0.1, 0, torch.quint8)
        return x

    def tensor(self, name: str) -> Tensor:
        if self.is_odd():
            return self.odd()
        fitting = self.fitting(name)
        return self.laid_out(fitting) if self.is_odd() else fitting

    def integer(self, name: str) -> int:
        if self.is_odd():
            return self.draw.choice(INTEGERS)
        near = {"out_features": self.outputs, "in_features": self.inputs, "axis": 0}
        near["activation_bits"] = self.draw.randrange(2, 9)
        limits = {"qmin": -128, "qmax": 127, "zero_point": 0}
        limit = next((value for end, value in limits.items() if name.endswith(end)), 1)
        return near.get(name, limit)

    def value(self, kind: str, name: str) -> Any:
        """An argument of this type of the schema."""
        draw = self.draw
        if kind.startswith("Optional["):
            often = 2 if kind == "Optional[Tensor]" else 6
            return self.value(kind[9:-1], name) if self.one_in(often) else None
        if kind == "List[int]" and not self.is_odd():
            return list(self.layers)
        if kind == "List[str]" and not self.is_odd():
            return [draw.choice(TEXTS[:7]) for _ in self.layers] if self.one_in(2) else []
        if kind.startswith("List["):
            return [self.value(kind[5:-1], name) for _ in range(draw.randrange(4))]
        if kind == "Tensor":
            return self.tensor(name)
        if kind == "bool":
            return draw.choice((True, False))
        if kind == "str":
            usual = TEXTS[:2] if self.one_in(2) else TEXTS[:7]
            return draw.choice(TEXTS if self.is_odd() else usual)
        if kind == "float":
            return draw.choice((-1.0, math.nan, math.inf, 1e300) if self.is_odd() else (1e-5, 0.0))
        if "dtype" in name:
            usual = DTYPES[3:5] if self.operator == "quantize" else DTYPES[:3]
            return draw.choice(ODD_DTYPES if self.is_odd() else usual)
        return self.integer(name)


def operators(namespace: str) -> list[Any]:
    """All that are registered, in alphabetical order."""
    names = {name.partition(".")[0].partition("::") for name in _all_names()}
    ours = sorted(name for space, _, name in names if space == namespace)
    return [getattr(getattr(torch.ops, namespace), name).default for name in ours]


def _all_names() -> list[str]:
    return torch._C._dispatch_get_all_op_names()  # type: ignore[no-any-return]


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout is torch.strided else None
        return f"{value.device.type} {value.dtype} {list(value.shape)} {value.layout} {stride}"
    return repr(value)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(operator: Any, draw: random.Random, trace: Path) -> str:
    arguments = Arguments(draw, operator.namespace, operator._opname)
    values = {a.name: arguments.value(str(a.type), a.name) for a in operator._schema.arguments}
    described = "\n".join(f"  {name}: {describe(value)}" for name, value in values.items())
    trace.write_text(f"{operator}\n{described}\n")
    before = peak()
    try:
        result = operator(**values)
    except EXPECTED as error:
        text = str(error)
        if "INTERNAL ASSERT" in text:
            raise AssertionError(f"{operator}: {text}\n{described}") from error
        return "refused"
    if peak() - before > MEMORY:
        raise AssertionError(f"{operator}: {peak() - before} bytes of memory\n{described}")
    results = result if isinstance(result, tuple | list) else (result,)
    for tensor in results:  # every byte is there to be read
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            tensor.detach().clone().reshape(-1).view(torch.uint8).sum()
    return "computed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cases", type=int, default=0, help="0: as many as the time allows")
    parser.add_argument("--seed", type=int, default=0)
    spaces = ("torchquant", "torchquant_aten")
    parser.add_argument("--namespace", choices=spaces, default=spaces[0])
    scratch = Path(tempfile.gettempdir())
    parser.add_argument("--trace", type=Path, default=scratch / "torchquant-fuzz-ops.txt")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    draw, ends = random.Random(options.seed), collections.Counter[str]()
    until, cases = time.monotonic() + options.seconds, 0
    found = operators(options.namespace)
    while time.monotonic() < until and cases != (options.cases or -1):
        operator = found[cases % len(found)]
        ends[f"{operator._opname} {run(operator, draw, options.trace)}"] += 1
        cases += 1
    counts = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"fuzz_ops: {cases} calls of {len(found)} operators: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
