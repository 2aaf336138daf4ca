"""Running a model over batches: outputs, what layers see, and undoing a change of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.analysis.verify import tensors_in
from torchquant.convert.batches import call

Forward = Callable[[nn.Module, Any], Any]
# Takes the name of a module, its first argument and its output.
See = Callable[[str, Any, Any], None]


class Enough(Exception):
    """What a hook raises to end a forward whose remaining layers are not needed."""


@torch.no_grad()
def outputs_of(
    who: str,
    model: nn.Module,
    batch: Any,
    forward: Forward | None = None,
    hooks: Mapping[str, See] | None = None,
) -> list[Tensor]:
    """The tensors that a model in evaluation mode computes from a batch; modes are restored.

    Args:
        who: the verb, with which messages start.
        model: the model.
        batch: as for :func:`torchquant.calibrate`; anything with ``forward``.
        forward: takes the model and the batch, and calls the model.
        hooks: functions that are called after each call of a module, by the name of the module. If
            one raises :class:`Enough`, the result is empty.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> seen = {"0": lambda name, input, output: print(name, output.tolist())}
        >>> outputs_of("verb", net, torch.tensor([[-1.0, 2.0]]), hooks=seen)
        0 [[0.0, 2.0]]
        [tensor([[0., 2.]])]
    """
    with evaluating(model), ExitStack() as stack:
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
            result = call(who, model, batch) if forward is None else forward(model, batch)
            return [*tensors_in(result)]
        except Enough:
            return []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model be in evaluation mode for a while; each module has its own mode afterwards.

    Example:
        >>> net = nn.Sequential(nn.Dropout())
        >>> with evaluating(net):
        ...     print(net[0].training)
        False
        >>> net[0].training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
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


def taken(who: str, loader: Iterable[Any], limit: int | None = None) -> list[Any]:
    """The batches of a loader, at most ``limit``.

    Raises:
        ValueError: there is none, or limit is not a positive integer.

    Example:
        >>> taken("verb", range(10), 3)
        [0, 1, 2]
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"{who}: limit must be None or a positive number of batches, got {limit!r}"
        )
    batches = list(islice(loader, limit))
    if not batches:
        raise ValueError(
            f"{who}: loader must have batches, got none; an iterator can be used only once, so "
            "pass a list or a DataLoader"
        )
    return batches
