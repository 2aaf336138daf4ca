"""What the stateful modules of training share: float32 state, the backward pass, processes.

Observers, :class:`~torchquant.ObservedQuantizer` and the learned quantizers keep scales, steps and
ranges that a training step reads and writes. Three rules hold for all of them and stand here: the
state stays float32 whatever the model is converted to, nothing is updated by the second forward of
activation checkpointing, and what depends on data is the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchquant.functional._checks import FLOAT_DTYPES, describe, require_dtype
from torchquant.ops._arguments import wait_for_copy
from torchquant.scheme import Granularity, PerAxis, PerGroup, PerTensor, PerToken


class Float32State(nn.Module):
    """A module whose float32 parameters and buffers stay float32.

    ``.to(torch.bfloat16)``, ``.half()`` and ``.double()`` move them but leave the dtype; a state
    dict that somebody converted is converted back when it is loaded.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = dict(self._buffers)
        super()._apply(keep_dtype, recurse)
        for name, buffer in before.items():
            if buffer is not None and (moved := self._buffers[name]) is not None:
                wait_for_copy(buffer, moved)
        self._state_replaced()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = dict(state_dict)
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and own is not None and own.dtype != value.dtype:
                state[prefix + name] = value.detach().to(own.dtype)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._state_replaced()

    def _state_replaced(self) -> None:
        """Forget what was remembered about the values of buffers."""


def adopt_shapes(module: nn.Module, state: Mapping[str, Any], prefix: str, *names: str) -> None:
    """Give buffers that have no shape yet (``[0]``) the one they have in a state dict."""
    for name in names:
        own, value = module._buffers[name], state.get(prefix + name)
        if own is not None and isinstance(value, Tensor) and list(own.shape) == [0]:
            module._buffers[name] = own.new_empty(value.shape)


def inside_backward() -> bool:
    """Whether a backward pass is calling: the second forward of activation checkpointing.

    Its first forward has run with the same data already, so whatever counts or averages must not
    look again.
    """
    return torch._C._current_graph_task_id() != -1


def process_group_name(who: str, group: Any) -> str | None:
    """A process group by its name, which can be copied and saved; None stays None."""
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
    """How many processes share the state; 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
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
    functions: Any = dist.distributed_c10d  # a name that type checkers do not see
    return functions._resolve_process_group(name)


def check_granularity(who: str, granularity: Granularity) -> Granularity:
    """The granularity itself, if it is one whose scales outlive a batch."""
    if isinstance(granularity, PerToken):
        raise ValueError(
            f"{who}: granularity must be PerTensor(), PerAxis(axis) or PerGroup(group_size), got "
            "PerToken(); tokens differ from batch to batch, so their ranges are computed inside "
            "the operators (dynamic quantization) and never observed"
        )
    if not isinstance(granularity, (PerTensor, PerAxis, PerGroup)):
        raise TypeError(
            f"{who}: granularity must be PerTensor(), PerAxis(axis) or PerGroup(group_size), got "
            f"{describe(granularity)}"
        )
    return granularity


def check_input(who: str, input: Tensor, state: Tensor) -> None:
    """Raise unless ``input`` is a float tensor on the module's device."""
    require_dtype(who, "input", input, FLOAT_DTYPES)
    if input.device != state.device:
        raise ValueError(
            f"{who}: input must be on the module's device {state.device}, got {input.device}; "
            "move one of them with .to(device)"
        )
