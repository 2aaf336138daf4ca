"""What AWQ sees of a model: the inputs of layers, and calls of the modules that hold them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.algorithms.batches import Forward, outputs_of
from torchquant.algorithms.consecutive import dimensions
from torchquant.algorithms.inputs import columns
from torchquant.analysis.verify import tensors_in

__all__ = ["Calls", "LayerInputs", "copied", "watch"]

_PLACES = 128  # random places of each sample that count as inputs of a convolution
_ROWS = 512  # inputs of a layer that are kept, and about as many in the calls of a module


class LayerInputs:
    """The mean magnitude of each input channel of a layer, and a sample of its inputs.

    An input of a convolution is what its kernel covers at one place. 128 random places of each
    sample count, so that the memory does not grow with the size of images.

    Args:
        layer: a float linear layer or convolution.
        batches: the number of batches, which share the sample.

    Attributes:
        count: number of inputs.

    Example:
        >>> inputs = LayerInputs(nn.Linear(2, 3), 1)
        >>> inputs.see(torch.tensor([[1.0, -2.0], [3.0, float("nan")], [5.0, 0.0]]))
        >>> inputs.importance, inputs.rows.shape, inputs.count
        (tensor([3., 1.]), torch.Size([2, 2]), 2)
    """

    def __init__(self, layer: nn.Module, batches: int) -> None:
        self.layer = layer
        self.count = 0
        self._most = max(1, -(-_ROWS // batches))
        self._sum: Tensor | None = None
        self._rows: list[Tensor] = []

    @torch.no_grad()
    def see(self, input: Tensor) -> None:
        """Take the input of one call; inputs with NaN or infinities are left out."""
        if getattr(self.layer, "groups", 1) != 1:  # it has no common input channels
            return
        rows = self._rows_of(input)
        if not bool(rows.sum().isfinite()):
            rows = rows[rows.isfinite().all(1)]
        if not len(rows):
            return
        total = rows.abs().sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(rows)
        self._rows.append(rows[:: max(1, len(rows) // self._most)][: self._most].clone())

    def _rows_of(self, input: Tensor) -> Tensor:
        """All inputs of a linear layer; of a convolution a part, because they overlap."""
        spatial = dimensions(self.layer)
        if not spatial:
            return columns(self.layer, input)[0].t()
        samples = input.split(1) if input.dim() == spatial + 2 else [input]
        parts = [
            columns(self.layer, sample, _PLACES, self.count + number)[0].t()
            for number, sample in enumerate(samples)
        ]
        return torch.cat(parts)

    @property
    def importance(self) -> Tensor:
        """float32 ``[K]``."""
        assert self._sum is not None
        return (self._sum / self.count).float()

    @property
    def rows(self) -> Tensor:
        """float32 ``[n, K]``; empty if there are none."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, 0)


class Calls:
    """Calls of a module in a forward, with their results, to be repeated with other weights.

    The arguments and results of a call are kept whole, until the calls have 512 inputs.

    Args:
        module: the module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> calls = Calls(layer)
        >>> calls.take((torch.ones(1, 2),), {}, layer(torch.ones(1, 2)))
        >>> calls.error()
        0.0
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._calls: list[tuple[Any, Any, list[Tensor]]] = []
        self._rows = 0

    @property
    def full(self) -> bool:
        """True if there are enough inputs."""
        return self._rows >= _ROWS

    def take(self, args: Any, kwargs: Any, result: Any) -> None:
        """Keep a call. The arguments must be those of before it, see :func:`copied`."""
        first = next(iter(tensors_in((args, kwargs))), None)
        self._rows += 0 if first is None or not first.dim() else first[..., 0].numel()
        self._calls.append((args, kwargs, _floats(result)))

    @torch.no_grad()
    def error(self) -> float:
        """The mean squared difference of the results from those of the forward, NaN without any."""
        total, count = 0.0, 0
        for given, options, expected in self._calls:
            args, kwargs = copied((given, options))
            found = _floats(self.module(*args, **kwargs))
            for one, other in zip(found, expected, strict=True):
                total += float((one.float() - other.float()).square().sum(dtype=torch.float64))
                count += one.numel()
        return total / count if count else float("nan")

    def repeats(self) -> bool:
        """True if the calls give the results of the forward again, but for rounding."""
        squares = [other.float().square().sum() for *_, found in self._calls for other in found]
        numbers = sum(other.numel() for *_, found in self._calls for other in found)
        try:
            return bool(self.error() <= 1e-6 * float(sum(squares)) / max(1, numbers))
        except Exception:  # a module that cannot be called again, whatever the reason
            return False


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Arguments in new containers and objects, whose tensors and modules are the same.

    A forward may change an object such as a cache of keys and values, and must not change ours.

    Example:
        >>> tensor = torch.ones(2)
        >>> first = {"cache": [tensor]}
        >>> other = copied(first)
        >>> other["cache"].append(3)
        >>> len(first["cache"]), other["cache"][0] is tensor
        (1, True)
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    kept = (Tensor, nn.Module, type, str, bytes, bool, int, float)
    if value is None or isinstance(value, kept) or callable(value):
        return value
    if type(value) is tuple:
        return tuple(copied(item, memo) for item in value)
    try:
        made = memo[id(value)] = copy.copy(value)
    except Exception:  # an object that cannot be copied is passed as it is
        return value
    if type(value) is list:
        made[:] = [copied(item, memo) for item in value]
    elif isinstance(value, dict):
        made.update({key: copied(item, memo) for key, item in value.items()})
    for name, item in getattr(made, "__dict__", {}).items():
        made.__dict__[name] = copied(item, memo)
    return made


def watch(
    who: str,
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None,
    layers: Mapping[str, LayerInputs],
    modules: Iterable[Calls],
) -> None:
    """Show the inputs of layers and the calls of modules, over all batches.

    Args:
        who: the verb, with which messages start.
        model: the float model.
        batches: as for :func:`torchquant.calibrate`.
        forward: takes the model and a batch, and calls the model.
        layers: what sees the inputs of layers, by their names.
        modules: what takes the calls of modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> inputs, calls = LayerInputs(model[0], 1), Calls(model[0])
        >>> watch("verb", model, [torch.ones(3, 2)], None, {"0": inputs}, [calls])
        >>> inputs.count, calls.repeats()
        (3, True)
    """

    def see(inputs: LayerInputs, name: str, input: Any, output: Any) -> None:
        if isinstance(input, Tensor):
            inputs.see(input)

    hooks = {name: partial(see, inputs) for name, inputs in layers.items()}
    with ExitStack() as stack:
        for calls in modules:
            _take_calls(calls, stack)
        for batch in batches:
            outputs_of(who, model, batch, forward, hooks)


def _take_calls(calls: Calls, stack: ExitStack) -> None:
    """Let calls of a module be taken until there are enough."""
    before: list[Any] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        before.append(None if calls.full else copied((args, kwargs)))

    def leave(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        kept = before.pop()
        if kept is not None:
            given, options = kept
            calls.take(given, options, result)

    handles: list[Callable[[], None]] = [
        calls.module.register_forward_pre_hook(enter, with_kwargs=True).remove,
        calls.module.register_forward_hook(leave, with_kwargs=True).remove,
    ]
    for remove in handles:
        stack.callback(remove)


def _floats(result: Any) -> list[Tensor]:
    """The first float tensor of a result, which is the module's output."""
    return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()][:1]
