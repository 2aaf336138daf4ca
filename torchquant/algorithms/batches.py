"""Running a model over batches: outputs, what layers see, and undoing a change of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.analysis.verify import tensors_in

Forward = Callable[[nn.Module, Any], Any]
# Takes the name of a module, its first argument and its output.
See = Callable[[str, Any, Any], None]


class Enough(Exception):
    """What a hook raises to end a forward whose remaining layers are not needed."""


@torch.no_grad()
def outputs_of(
    model: nn.Module,
    batch: Any,
    forward: Forward | None = None,
    hooks: Mapping[str, See] | None = None,
) -> list[Tensor]:
    """The tensors that a model in evaluation mode computes from a batch; modes are restored.

    Args:
        model: the model.
        batch: a tensor, a tuple or list of arguments, or a mapping of arguments by name; anything
            with ``forward``.
        forward: takes the model and the batch, and calls the model.
        hooks: functions that are called after each call of a module, by the name of the module. If
            one raises :class:`Enough`, the result is empty.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> seen = {"0": lambda name, input, output: print(name, output.tolist())}
        >>> outputs_of(net, torch.tensor([[-1.0, 2.0]]), hooks=seen)
        0 [[0.0, 2.0]]
        [tensor([[0., 2.]])]
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for name, see in (hooks or {}).items():
            handle = model.get_submodule(name).register_forward_hook(
                lambda _, args, kwargs, output, name=name, see=see: see(
                    name, args[0] if args else next(iter(kwargs.values())), output
                ),
                with_kwargs=True,
                prepend=True,
            )
            stack.callback(handle.remove)
        try:
            model.eval()
            return [*tensors_in(_call(model, batch, forward))]
        except Enough:
            return []
        finally:
            for module, mode in modes:
                module.training = mode


class Undo:
    """The values of the parameters of some modules, to be restored.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before, undo = layer.weight.item(), Undo([layer])
        >>> layer.weight.data.zero_()
        tensor([[0.]])
        >>> undo.restore()
        >>> layer.weight.item() == before
        True
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.kept = [
            (parameter, parameter.detach().clone())
            for module in modules
            for parameter in module.parameters(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their values of before."""
        for parameter, value in self.kept:
            parameter.copy_(value)


def _call(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
