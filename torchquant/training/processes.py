"""Processes that train together: their group, their number, and their values in one tensor."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from torchquant.functional._checks import describe

ALONE = ""  # instead of the name of a group: only this process


def process_group_name(who: str, group: Any) -> str | None:
    """The name of a process group, which can be copied and saved; None stays None."""
    if group is None or isinstance(group, str):
        return group
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"{who}: process_group must be None (the default group) or a torch.distributed "
            f"ProcessGroup, got {describe(group)}"
        )
    return name


def processes_of(group_name: str | None) -> int:
    """Number of processes in a group; 1 without torch.distributed."""
    if group_name == ALONE or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(_process_group(group_name))


def gather(values: Tensor, group_name: str | None) -> Tensor:
    """``values`` ``[n]`` of every process as ``[processes, n]``, in one collective."""
    processes = processes_of(group_name)
    if processes == 1:
        return values[None]
    group = _process_group(group_name)
    result = values.new_empty(processes * values.numel())
    dist.all_gather_into_tensor(result, values.contiguous(), group=group)
    return result.view(processes, -1)


def _process_group(name: str | None) -> Any:
    if name is None:
        return None
    functions: Any = dist.distributed_c10d  # its private function has no type
    return functions._resolve_process_group(name)
