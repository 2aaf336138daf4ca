"""Undo a failed change of the modules and tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undoing(model: nn.Module) -> Iterator[None]:
    """Restore all parameters, buffers and submodules if the block raises."""
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
            if isinstance(module, nn.RNNBase):  # assigning updates its list of weights
                for name, parameter in list(module._parameters.items()):
                    setattr(module, name, parameter)
        raise
