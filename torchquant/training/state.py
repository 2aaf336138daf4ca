"""State that a training step reads and writes: it stays float32, and a batch changes it once.

Observers, :class:`~torchquant.ObservedQuantizer` and the learned quantizers keep scales, steps and
ranges. These stay float32 whatever dtype the model is converted to, and the second forward of
activation checkpointing does not update them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.ops._arguments import wait_for_copy


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, the argument of ``nn.Module._apply``, without its change of dtype."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return keep


class Float32State(nn.Module):
    """A module whose float32 parameters and buffers stay float32.

    ``.to(torch.bfloat16)``, ``.half()`` and ``.double()`` do not change their dtype; a state dict
    in another dtype is converted back when it is loaded.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(keeping_dtype(fn), recurse)
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
        """Called after parameters or buffers were replaced; refreshes copies of their values."""


def adopt_shapes(module: nn.Module, state: Mapping[str, Any], prefix: str, *names: str) -> None:
    """Give buffers that have no shape yet (``[0]``) the shape that they have in a state dict."""
    for name in names:
        own, value = module._buffers[name], state.get(prefix + name)
        if own is not None and isinstance(value, Tensor) and list(own.shape) == [0]:
            module._buffers[name] = own.new_empty(value.shape)


def inside_backward() -> bool:
    """True inside a backward pass, that is, in the second forward of activation checkpointing.

    The first forward has seen the same data, so nothing may be counted or averaged again.
    """
    return torch._C._current_graph_task_id() != -1
