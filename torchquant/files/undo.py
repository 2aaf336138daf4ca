"""Undo what a failed change has done to a model's modules and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undoing(model: nn.Module) -> Iterator[None]:
    """Put every parameter, buffer and submodule back in its place where the block raises."""
    places = [
        (place, dict(place))
        for module in model.modules()
        for place in (module._parameters, module._buffers, module._modules)
    ]
    try:
        yield
    except BaseException:
        for place, content in places:
            place.clear()
            place.update(content)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # keeps a list beside, which assigning renews
                for name, parameter in list(module._parameters.items()):
                    setattr(module, name, parameter)
        raise
