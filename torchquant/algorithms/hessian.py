"""The Hessian of a layer's output error, summed in an order that no number of processes changes.

The squared error of a matrix product on inputs x depends on a change D of the weight as
``sum |D x|^2 = trace(D A D^T)`` with ``A = sum x x^T``. GPTQ calls ``H = (2/n) A`` the Hessian.

Sums of floats depend on their order. Batch i therefore belongs to the *lane* ``i % LANES``. Each
lane is summed batch by batch, and the lanes are added in the order of their numbers: at the end, or
in a process alone that reads lane by lane, each lane as soon as a later one begins. Processes that
share the batches share whole lanes, so that they get the bits of a process alone with as many
threads as each of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchquant.algorithms.inputs import grouped_weight
from torchquant.convert.adjustment import float_weight
from torchquant.training.processes import gather, processes_of

__all__ = ["LANES", "Hessian", "lanes_of"]

LANES = 8
_STRIPE = 256  # rows of the sum that are computed together; parts below the diagonal are mirrored


def lanes_of(process: int, processes: int) -> list[int]:
    """The lanes whose batches a process reads.

    Example:
        >>> lanes_of(1, 3)
        [1, 4, 7]
    """
    return [lane for lane in range(LANES) if lane % processes == process]


class Hessian:
    """``(2/n) sum x x^T`` over the inputs x of a layer, one matrix per group of its channels.

    Args:
        terms: K, the number of terms of an output.
        groups: G, the groups of a convolution.
        device: where the sums are kept.
        by_lane: if True, the batches come lane by lane, in the order of the lanes. A process alone
            then keeps two matrices, and not one for each lane.

    Attributes:
        dropped: number of inputs that held NaN or infinities, which are left out.

    Example:
        >>> hessian = Hessian(2)
        >>> hessian.add(0, torch.tensor([[[1.0, 3.0], [0.0, 2.0]]]))
        >>> hessian.add(1, torch.tensor([[[float("nan")], [0.0]]]))
        >>> hessian.value(), hessian.rows, hessian.dropped
        (tensor([[[10.,  6.],
                 [ 6.,  4.]]]), 2, 1)
    """

    def __init__(
        self,
        terms: int,
        groups: int = 1,
        device: torch.device | str | None = None,
        by_lane: bool = False,
    ) -> None:
        self.shape = (groups, terms, terms)
        self.by_lane = by_lane and processes_of(None) == 1
        self.device = device
        self.dropped = 0
        self._lanes: dict[int, Tensor] = {}  # only the part from the diagonal upwards is right
        self._rows = [0] * LANES
        self._sum: Tensor | None = None  # of the lanes that are done
        self._total: Tensor | None = None

    @classmethod
    def of(cls, layer: Any, *, by_lane: bool = False) -> Hessian:
        """An empty Hessian for a float linear layer or convolution.

        Example:
            >>> Hessian.of(torch.nn.Conv2d(4, 6, 3, groups=2)).shape
            (2, 18, 18)
        """
        groups, _, terms = grouped_weight(layer, float_weight(layer)).shape
        return cls(terms, groups, layer.weight.device, by_lane)

    @staticmethod
    def matrices(*, by_lane: bool = False) -> int:
        """The greatest number of matrices that a process keeps while it sums.

        Example:
            >>> Hessian.matrices(), Hessian.matrices(by_lane=True)
            (9, 2)
        """
        processes = processes_of(None)
        return 2 if by_lane and processes == 1 else -(-LANES // processes) + 1

    @property
    def rows(self) -> int:
        """n, the number of inputs in the sum."""
        return sum(self._rows)

    @torch.no_grad()
    def add(self, batch: int, columns: Tensor) -> None:
        """Add the inputs of a batch. The batches of a lane must come in the order of their numbers.

        Args:
            batch: the number of the batch in the whole data, from 0. Several calls with one number
                are added in the order of the calls.
            columns: float ``[G, K, n]``, see :func:`torchquant.algorithms.inputs.columns`.

        Raises:
            ValueError: columns have a wrong shape, :meth:`reduce` was called before, or a lane
                comes again or too late although ``by_lane`` is True.
        """
        if columns.dim() != 3 or columns.shape[:2] != self.shape[:2]:
            raise ValueError(
                f"Hessian.add: columns must have shape [{self.shape[0]}, {self.shape[1]}, n], got "
                f"{list(columns.shape)}"
            )
        if self._total is not None:
            raise ValueError("Hessian.add: inputs must be added before reduce(), got more after it")
        columns = columns.float()
        # A sum is finite only if all its terms are; a finite one may overflow, so look closely.
        if not bool(columns.sum().isfinite()):
            finite = columns.isfinite().all(1).all(0)
            columns = columns[..., finite]
            self.dropped += finite.numel() - columns.shape[-1]
        lane = batch % LANES
        if not columns.shape[-1]:
            return
        if self.by_lane and any(self._rows[lane + 1 :]):
            raise ValueError(
                "Hessian.add: with by_lane=True, batches must come in the order of their lanes, "
                f"got batch {batch} of lane {lane} after a later lane; pass by_lane=False"
            )
        if self.by_lane and lane not in self._lanes:
            self._finish()
        self._rows[lane] += columns.shape[-1]
        total = self._lanes.get(lane)
        if total is None:
            total = self._lanes[lane] = torch.zeros(self.shape, device=self.device)
        inputs = columns.transpose(1, 2)
        for first in range(0, self.shape[1], _STRIPE):
            stripe = slice(first, first + _STRIPE)
            total[:, stripe, first:].baddbmm_(columns[:, stripe], inputs[:, :, first:])

    @torch.no_grad()
    def reduce(self, process_group: str | None = None) -> None:
        """Add the lanes of all processes; each process then has the same sum.

        Process r of P must have added the batches of :func:`lanes_of` ``(r, P)`` and no others.
        All processes must call this. Without torch.distributed it only adds the lanes of this
        process; :meth:`value` calls it then.

        Args:
            process_group: the name of the group; None is the default group.

        Raises:
            ValueError: a process has batches of a lane that belongs to another one.
        """
        if self._total is not None:
            return
        processes = processes_of(process_group)
        counts = torch.tensor([*self._rows, self.dropped], device=self.device)
        every = gather(counts, process_group)
        rows = every[:, :LANES]
        owners = torch.arange(LANES, device=rows.device) % processes
        numbers = torch.arange(processes, device=rows.device)
        if bool((rows * (numbers[:, None] != owners)).any()):
            raise ValueError(
                f"Hessian.reduce: process r of {processes} must add only batches of the lanes r, "
                f"r + {processes}, ... of {LANES}, got rows {rows.tolist()} by process and lane"
            )
        self._rows = rows.sum(0).tolist()
        self.dropped = int(every[:, LANES].sum())
        if self.by_lane:
            self._finish()
        total = self._sum
        total = torch.zeros(self.shape, device=self.device) if total is None else total
        for lane, count in enumerate(self._rows):
            if not count or self.by_lane:
                continue
            one = self._lanes.pop(lane, None)
            if processes > 1:
                one = torch.empty_like(total) if one is None else one
                _broadcast(one, lane % processes, process_group)
            assert one is not None
            total += one
        self._total, self._sum = total.triu_(), None
        self._total += total.triu(1).transpose(1, 2)

    def _finish(self) -> None:
        """Add the lane that is done to the sum."""
        for one in self._lanes.values():
            if self._sum is None:
                self._sum = torch.zeros(self.shape, device=self.device)
            self._sum += one
        self._lanes.clear()

    def value(self) -> Tensor:
        """The Hessian, float32 ``[G, K, K]``; zeros without inputs."""
        self.reduce()
        assert self._total is not None
        return self._total * (2 / max(1, self.rows))


def _broadcast(value: Tensor, owner: int, process_group: str | None) -> None:
    """Give all processes the tensor of one of them."""
    group: Any = None
    if process_group is not None:
        functions: Any = dist.distributed_c10d
        group = functions._resolve_process_group(process_group)
    dist.broadcast(value, group=group, group_src=owner)
