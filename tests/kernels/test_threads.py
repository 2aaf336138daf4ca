"""The same bits from every thread of a process, at once or in turn, and nothing hangs."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support import Shape, assert_same_bits, floats, generator, integers, positive, threads
from torch import Tensor

from torchquant import cpu, ops
from torchquant.scheme import PerAxis


class Call(NamedTuple):
    """Something to compute, and what must come out: computed on one thread by the scalar path."""

    run: Callable[[], Tensor]
    expected: Tensor


def dynamic_call(shape: Shape, dtype: torch.dtype, activation: str, seed: int) -> Call:
    x = floats(shape.rows, shape.inputs, seed=seed, dtype=dtype)
    packed = ops.pack_weight(integers(shape.outputs, shape.inputs, seed=seed))
    scale, bias = positive(shape.outputs, seed=seed), floats(shape.outputs, seed=seed)
    zero = integers(shape.outputs, seed=seed).int() if seed % 3 == 0 else None

    def run() -> Tensor:
        return ops.linear_dynamic(
            x,
            packed,
            scale,
            zero,
            bias,
            out_features=shape.outputs,
            symmetric=seed % 2 == 0,
            activation=activation,
        )

    return expecting(run)


def integer_call(shape: Shape, seed: int) -> Call:
    x, weight = integers(shape.rows, shape.inputs, seed=seed), integers(shape.outputs, shape.inputs)
    packed = ops.pack_weight(weight)
    return expecting(lambda: ops.int8_mm(x, packed, shape.outputs))


def element_call(shape: Shape, seed: int) -> Call:
    x, scale = floats(shape.rows, shape.inputs, seed=seed), positive(shape.inputs, seed=seed)

    def run() -> Tensor:
        q = ops.quantize(x, scale, granularity=PerAxis(1))
        return ops.dequantize(q, scale, granularity=PerAxis(1))

    return expecting(run)


def expecting(run: Callable[[], Tensor]) -> Call:
    with threads(1), cpu.use_isa("scalar"):
        return Call(run, run())


def calls() -> list[Call]:
    """Small and large, so that threads meet in every way of sharing the work."""
    shapes = (
        Shape(1, 17, 33),
        Shape(1, 3000, 256),  # one row, the columns shared
        Shape(5, 1000, 300),
        Shape(40, 512, 384),
        Shape(300, 128, 96),  # rows shared
        Shape(1025, 64, 64),
        Shape(130, 600, 700),
    )
    made = []
    for seed, shape in enumerate(shapes):
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        made.append(dynamic_call(shape, dtype, ("none", "gelu", "silu")[seed % 3], seed))
        made.append(integer_call(shape, seed))
    made.append(element_call(Shape(300, 257, 900), 1))
    return made


CALLS = calls()


def check_in_turn(start: int = 0, step: int = 1) -> None:
    for i in range(len(CALLS)):
        call = CALLS[(start + i * step) % len(CALLS)]
        assert_same_bits(call.run(), call.expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_number_of_threads(count: int) -> None:
    with threads(count):
        check_in_turn()


def test_number_of_threads_changes_between_calls() -> None:
    for i in range(3 * len(CALLS)):
        with threads(1 + i % 4):
            call = CALLS[i % len(CALLS)]
            assert_same_bits(call.run(), call.expected)


def soak(seconds: float, workers: int) -> int:
    """Many threads call at once, each with its own number of threads; some end and are replaced."""
    until, finished, errors = time.monotonic() + seconds, [0] * workers, []

    def work(number: int) -> None:
        picks = torch.randint(len(CALLS), (1 << 12,), generator=generator(number)).tolist()
        try:
            torch.set_num_threads(1 + number % 3)
            while time.monotonic() < until and not errors:
                call = CALLS[picks[finished[number] % len(picks)]]
                assert_same_bits(call.run(), call.expected)
                finished[number] += 1
                if finished[number] % 50 == 0:
                    young = threading.Thread(target=check_in_turn, args=(number, 3))
                    young.start()
                    young.join()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]
    assert all(finished)
    return sum(finished)


def test_many_threads_at_once() -> None:
    print(f"{soak(5.0, 6)} calls")


@pytest.mark.slow
def test_many_threads_at_once_for_long() -> None:
    print(f"{soak(180.0, 12)} calls")


def test_errors_in_many_threads() -> None:
    """A refused call leaves nothing behind that the next one stumbles over."""
    packed, wrong = ops.pack_weight(integers(40, 30)), integers(3, 31)

    def work() -> None:
        for _ in range(20):
            with pytest.raises(ValueError, match="int8_mm: packed was made for"):
                ops.int8_mm(wrong, packed, 40)
            check = CALLS[1]
            assert_same_bits(check.run(), check.expected)

    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not errors
