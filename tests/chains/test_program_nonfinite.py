"""A program says whether an input holds NaN or infinities, wherever they are."""

import pytest
import torch
from support import check_everywhere, threads
from support.programs import NARROW, Q
from torch import Tensor

from torchquant.chains.program import Program
from torchquant.chains.steps import Input, Output, Qparams, Value

GREATEST = torch.finfo(torch.float32).max


def places(x: Tensor) -> list[tuple[int, ...]]:
    """The first elements, the last ones, and some between them."""
    count = x.numel()
    chosen = {*range(min(5, count)), *range(max(0, count - 20), count), *range(0, count, 61)}
    return [tuple(int(i) for i in torch.unravel_index(torch.tensor(at), x.shape)) for at in chosen]


def program_of(*inputs: tuple[Qparams | None, int]) -> Program:
    """Writes each input, which rounds an argument or reads it as floats, to a result."""
    values = [Value(index, q) for index, (q, _) in enumerate(inputs)]
    reads = [Input(value, argument) for value, (_, argument) in zip(values, inputs, strict=True)]
    return Program([*reads, *(Output(value, value.index) for value in values)])


@pytest.mark.parametrize("q", [Q, None], ids=["int8", "float"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 6, 3, 3), (3, 37), (2, 5, 9)], ids=str)
def test_each_place(q: Qparams | None, shape: tuple[int, ...]) -> None:
    program = program_of((q, 0))
    orders = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]

    def refused() -> tuple[Tensor, ...]:
        found = []
        for order in orders:
            x = torch.full(shape, -GREATEST).contiguous(memory_format=order)
            found.append(program.run([x]) is None)
            for i, place in enumerate(places(x)):
                x[place] = (float("nan"), float("inf"), -float("inf"))[i % 3]
                found.append(program.run([x]) is None)
                x[place] = 1e-45
        return (torch.tensor(found),)

    x = torch.empty(shape)
    each = [False, *(True for _ in places(x))]
    check_everywhere(refused, (torch.tensor(each * len(orders)),), (1, 2))


def test_each_argument() -> None:
    """Also where an argument is both rounded and read as floats, and in large images."""
    program = program_of((Q, 0), (None, 1), (NARROW, 2), (None, 2))
    good = torch.zeros(2, 4, 64, 65)
    for count in (1, 2):
        with threads(count):
            assert program.run([good, good, good]) is not None
            for argument in range(3):
                for at in ((0, 0, 0, 0), (1, 3, 63, 64), (1, 0, 40, 1)):
                    bad = good.clone()
                    bad[at] = float("nan")
                    given = [good, good, good]
                    given[argument] = bad
                    assert program.run(given) is None, (argument, at)
