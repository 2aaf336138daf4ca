"""Processes that calibrate together agree on the regions of their model.

The observers of all processes are merged in collectives, in which all processes have to take part
in the same order. What is int8 follows from the sizes of a first batch, which can differ between
processes, and a process may have seen no batch that reached a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.region import RegionForward
from torchquant.training.processes import processes_of


@dataclass(frozen=True)
class _Seen:
    """What one process knows of a region."""

    name: str
    calls: tuple[str, ...]
    layers: tuple[str, ...]
    failure: str
    facts: tuple[list[Any], list[int]] | None  # of its first batch


def agree(layers: Sequence[str], regions: Sequence[RegionForward]) -> None:
    """Let all processes have the same plan of each region: that of the first which saw a batch.

    A region whose calls failed in one process fails in all of them. Nothing happens without
    torch.distributed.

    Args:
        layers: the names of the prepared layers of this process.
        regions: the regions of this process that observe.

    Raises:
        ValueError: in all processes, if their layers or their regions are not the same.

    Example:
        >>> agree(["0"], [])  # one process: nothing to agree on
    """
    processes = processes_of(None)
    if processes == 1:
        return
    every: list[Any] = [None] * processes
    dist.all_gather_object(every, (tuple(layers), [_seen(region) for region in regions]))
    for process, (names, seen) in enumerate(every):
        if names != every[0][0]:
            _refuse("layers", process, every[0][0], names)
        kinds = [[(one.name, one.calls, one.layers) for one in of] for of in (every[0][1], seen)]
        if kinds[0] != kinds[1]:
            found = [[one.name or "the model" for one in of] for of in (every[0][1], seen)]
            _refuse("regions", process, *found)
    for place, region in enumerate(regions):
        seen = [of[place] for _, of in every]
        failure = next((one.failure for one in seen if one.failure), "")
        facts = next((one.facts for one in seen if one.facts is not None), None)
        if failure:
            region.failure = failure
        elif facts is not None and facts != _seen(region).facts:
            region.facts = FirstBatch.known(region.root, region.trace, *facts)
            region.set_plan(region.facts.plan(region.activations))


def _seen(region: RegionForward) -> _Seen:
    facts = region.facts
    return _Seen(
        region.name,
        tuple(call.target for call in region.trace.calls),
        tuple(region.activations),
        region.failure,
        None if facts is None else (facts.shapes, facts.flops),
    )


def _refuse(what: str, process: int, first: Sequence[str], other: Sequence[str]) -> None:
    only = ", ".join(sorted({*first} ^ {*other})) or "with other calls"
    raise ValueError(
        f"convert_: model must have the same prepared {what} in all processes, got {len(first)} in "
        f"process 0 and {len(other)} in process {process} ({only} in one of them); call prepare_ "
        "with the same arguments in all processes"
    )


__all__ = ["agree"]
