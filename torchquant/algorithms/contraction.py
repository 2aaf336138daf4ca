"""Matrix products of torch in one notation: which dimensions of two tensors are summed over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from torchquant.algorithms.dataflow import Call

Letters: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors: ``einsum(first, second -> result) + bias``.

    Attributes:
        first, second: the tensors.
        first_letters, second_letters, letters: a letter for each of the dimensions of the two
            tensors and of the result. A letter that both tensors have and the result does not have
            is summed over.
        bias: what is added; None if there is none.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(5, 2), torch.ones(3, 2)
        >>> call = Call("linear", torch.nn.functional.linear, (x, weight), {}, x @ weight.t(), {})
        >>> found = contraction(call)
        >>> found.first_letters, found.second_letters, found.letters, found.summed()
        (('0', 'k'), ('n', 'k'), ('0', 'n'), ['k'])
    """

    first: Tensor
    second: Tensor
    first_letters: Letters
    second_letters: Letters
    letters: Letters
    bias: Any = None

    def turned(self) -> Contraction:
        """The same product with the two tensors exchanged."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_letters=self.second_letters,
            second_letters=self.first_letters,
        )

    def summed(self) -> list[str]:
        """The letters of the dimensions that are summed over."""
        shared = [letter for letter in self.first_letters if letter in self.second_letters]
        return [letter for letter in shared if letter not in self.letters]


def contraction(call: Call) -> Contraction | None:
    """The product that a torch function computes; None for other functions."""
    name = call.name
    if name == "linear":
        return _linear(*call.arguments("input", "weight", "bias"))
    if name in ("matmul", "mm", "bmm"):
        first, second = (*call.args, *call.kwargs.values())[:2]
        return _product(first, second)
    if name == "rmatmul":
        return _product(call.args[1], call.args[0])
    if name in ("addmm", "baddbmm"):
        return _added(call)
    if name == "einsum":
        return _einsum(call)
    if name == "grouped_mm":
        return _grouped(call)
    return None


def _batch(count: int) -> Letters:
    """Letters of leading dimensions; those of two tensors are aligned at their ends."""
    return tuple(str(index) for index in reversed(range(count)))


def _linear(input: Any, weight: Any, bias: Any) -> Contraction | None:
    if weight.dim() != 2 or input.dim() < 1:
        return None
    batch = _batch(input.dim() - 1)
    return Contraction(input, weight, (*batch, "k"), ("n", "k"), (*batch, "n"), bias)


def _product(first: Any, second: Any, bias: Any = None) -> Contraction | None:
    if min(first.dim(), second.dim()) < 2:
        return None
    a, b = _batch(first.dim() - 2), _batch(second.dim() - 2)
    longer = a if len(a) > len(b) else b
    return Contraction(first, second, (*a, "n", "k"), (*b, "k", "m"), (*longer, "n", "m"), bias)


def _added(call: Call) -> Contraction | None:
    """``addmm`` and ``baddbmm``, unless they scale the product or what they add."""
    names = {"addmm": ("input", "mat1", "mat2"), "baddbmm": ("input", "batch1", "batch2")}
    bias, first, second = call.arguments(*names[call.name])
    beta = call.kwargs.get("beta", 1)
    if call.kwargs.get("alpha", 1) != 1 or beta not in (0, 1) or len(call.args) > 3:
        return None
    return _product(first, second, bias if beta else None)


def _einsum(call: Call) -> Contraction | None:
    equation, *rest = call.args
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    written = inputs.split(",")
    if len(written) != 2:
        return None
    letters = [_written(text, tensor.dim()) for text, tensor in zip(written, operands, strict=True)]
    result = _written(output, call.result.dim())
    if any(found is None or len(set(found)) < len(found) for found in (*letters, result)):
        return None
    first, second = operands
    return Contraction(first, second, letters[0] or (), letters[1] or (), result or ())


def _written(text: str, dimensions: int) -> Letters | None:
    before, dots, after = text.partition("...")
    count = dimensions - len(before) - len(after)
    if count < 0 or (count and not dots):
        return None
    return (*before, *_batch(count), *after)


def _grouped(call: Call) -> Contraction | None:
    """Rows that are sorted by their expert, and one matrix for each expert."""
    first, second = call.args[:2]
    if first.dim() != 2 or second.dim() != 3:
        return None
    bias = (*call.arguments("first", "second", "offs", "bias"),)[3]
    return Contraction(first, second, ("t", "k"), ("e", "k", "m"), ("t", "m"), bias)
