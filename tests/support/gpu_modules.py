"""Layers and configurations for tests of modules on a GPU."""

from typing import Any

import pytest
import torch
from torch import nn

CUDA = torch.device("cuda", 0)


def devices_of(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@pytest.fixture
def no_waiting() -> Any:
    """A context in which every operation that makes the host wait for the device raises."""

    class Context:
        def __enter__(self) -> None:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *exception: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return Context()
