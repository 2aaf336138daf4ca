"""Fuzzer of the operators' checks: with any arguments, an operator computes or raises.

    python tests/fuzz/fuzz_ops.py [--seconds 20] [--cases 0] [--seed 0] [--namespace torchquant]

A call starts as one of tests/cases.py in a random size. Some of its arguments are then replaced, by
their type in the schema: tensors of every dtype, small and odd shapes, layouts, devices without
data; numbers at the ends of their types. Most arguments of a call still fit together, so that most
calls get through. A crash ends the process: the call that was running is then in ``--trace`` (a
file). An exception of another kind than the documented ones, or memory far beyond that of the
arguments, is a finding.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for cases and support

from cases import cases
from support import ACTIVATIONS, FLOATS, Shape

EXPECTED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
MEMORY = 256 * 2**20
SIZES = (1, 1, 2, 3, 15, 16, 17, 64, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32)
ODD_DTYPES = (*DTYPES, torch.float64, torch.int64, torch.bool, torch.complex64, torch.int16)
SMALL_INTEGERS = (0, 1, -1, 2, 16, 17, 127, -128, 255, 256)
INTEGERS = (*SMALL_INTEGERS, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
TEXTS = (*ACTIVATIONS, "", "é", "GELU", "a" * 999)


class Arguments:
    """Draws one call's arguments: those of a case in tests/cases.py, some of them changed."""

    def __init__(self, draw: random.Random, namespace: str, operator: str) -> None:
        self.draw, self.operator = draw, operator
        shape = Shape(*(draw.choice(SIZES) for _ in range(3)))
        case = draw.choice(cases(operator, shape, draw.choice(FLOATS)))
        # Packed weights have the layout of the namespace.
        self.fitting = case.arguments(getattr(torch.ops, namespace), gradients=self.one_in(2))
        self.oddness = draw.choice((0.0, 0.05, 0.2))  # share of arguments that do not fit

    def one_in(self, count: int) -> bool:
        return self.draw.randrange(count) == 0

    def is_odd(self) -> bool:
        return self.draw.random() < self.oddness

    def spiced(self, x: Tensor) -> Tensor:
        """The same form with other values: larger, all zero, or with some that are not finite."""
        values = x.detach() * self.draw.choice((1.0, 50.0, 1e30, 0.0))
        if self.one_in(4):
            values = values.clone(memory_format=torch.contiguous_format)
            values.view(-1)[:: 1 + self.draw.randrange(7)] = self.draw.choice((math.nan, math.inf))
        return values.requires_grad_(x.requires_grad)

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
        fitting = self.fitting.get(name)
        if self.is_odd() or not isinstance(fitting, Tensor):
            return self.odd()
        if fitting.is_floating_point() and "scale" not in name and self.one_in(2):
            fitting = self.spiced(fitting)
        return self.laid_out(fitting) if self.is_odd() else fitting

    def value(self, argument: Any) -> Any:
        """An argument of the schema."""
        draw, name, kind = self.draw, argument.name, str(argument.type)
        fitting = self.fitting.get(name, argument.default_value)
        if kind.startswith("Optional["):
            if (fitting is None and not self.is_odd()) or self.one_in(10):
                return None
            kind = kind[9:-1]
        if kind == "Tensor":
            return self.tensor(name)
        if "dtype" in name:
            usual = DTYPES[3:5] if self.operator == "quantize" else DTYPES[:3]
            return draw.choice(ODD_DTYPES if self.is_odd() else usual)
        if kind == "str" and fitting in ACTIVATIONS and not self.is_odd():
            return draw.choice(TEXTS[:2] if self.one_in(2) else ACTIVATIONS)
        if kind == "bool":
            return draw.choice((True, False))
        if not self.is_odd():
            return fitting
        if kind == "str":
            return draw.choice(TEXTS)
        if kind == "float":
            return draw.choice((-1.0, math.nan, math.inf, 1e300, 1e-5, 0.0))
        if kind.startswith("List["):
            one = TEXTS if kind == "List[str]" else INTEGERS
            return [draw.choice(one) for _ in range(draw.randrange(4))]
        return draw.choice(INTEGERS)


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
    values = {a.name: arguments.value(a) for a in operator._schema.arguments}
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
