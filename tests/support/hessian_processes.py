"""Hessians in two processes; a new process imports this file by name."""

from typing import Any

from torch import Tensor

from torchquant.algorithms.hessian import LANES, Hessian, lanes_of


def hessian_of(batches: list[Tensor], lanes: list[int]) -> Hessian:
    """The Hessian of inputs ``[K, n]``, over the batches of some lanes."""
    hessian = Hessian(batches[0].shape[0])
    for number, batch in enumerate(batches):
        if number % LANES in lanes:
            hessian.add(number, batch.unsqueeze(0))
    return hessian


def hessian_in_process(rank: int, batches: list[Tensor]) -> Any:
    hessian = hessian_of(batches, lanes_of(rank, 2))
    hessian.reduce()
    wrong = Hessian(batches[0].shape[0])
    wrong.add(0, batches[0].unsqueeze(0))  # lane 0 belongs to process 0
    message = ""
    try:
        wrong.reduce()
    except ValueError as error:
        message = str(error)
    return hessian.value(), hessian.rows, hessian.dropped, message
