"""How channels of values move through a model: every torch function of a forward is watched.

:class:`DataFlow` is active while a model runs. It sees each call of a torch function, with real
tensors, and keeps a fact about some of them: a number for each element (:class:`Labels`), or the
parameter whose values a tensor shows (:class:`Reference`). Functions that only move elements, such
as a transpose, move the labels in the same way, because the function itself is called with the
labels. What other functions mean for the labels is decided by a subclass.

Nothing depends on the classes of the modules, so any architecture can be watched. What a forward
computes outside of torch functions is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from torchquant.algorithms.labels import (
    UNLABELLED,
    After,
    Fact,
    Labels,
    Reference,
    Zero,
    along,
    first_line,
)
from torchquant.analysis.verify import tensors_in


def words(text: str) -> frozenset[str]:
    """The words of a text.

    Example:
        >>> sorted(words("add mul"))
        ['add', 'mul']
    """
    return frozenset(text.split())


# They keep every element, perhaps in another data type.
SAME = words(
    "to type type_as float double half bfloat16 cpu cuda contiguous clone detach data alias "
    "dropout alpha_dropout feature_dropout dropout1d dropout2d positive identity lift_fresh"
)
# They move, repeat or leave out elements.
MOVES = words(
    "view reshape transpose swapaxes swapdims permute movedim moveaxis t T mT flatten unflatten "
    "ravel squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk "
    "split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit unbind select "
    "narrow getitem index_select gather take_along_dim flip roll unfold view_as reshape_as"
)
JOINS = words("cat concat concatenate stack hstack vstack dstack column_stack row_stack")
# Their results are zeros.
ZEROS = words("zeros zeros_like new_zeros")
# They read no value.
SHAPES = words(
    "shape dtype device size dim ndim ndimension nelement numel stride is_contiguous layout "
    "is_floating_point is_complex requires_grad is_meta is_cuda is_cpu is_quantized is_sparse "
    "is_mkldnn is_mps is_xla is_xpu is_nested is_inference is_leaf grad grad_fn version base "
    "names len get_device element_size itemsize nbytes storage_offset is_shared is_conj is_neg "
    "is_view retains_grad hash repr format dir ones_like empty_like full_like "
    "rand_like randn_like new_ones new_empty new_full new_tensor is_tensor result_type "
    "broadcast_shapes can_cast class has_compatible_shallow_copy_type"
)


@dataclass(frozen=True)
class Call:
    """A call of a torch function.

    Attributes:
        name: the name of the function, or of the attribute for ``tensor.T``, without underscores at
            its ends: ``add`` stands for ``add_`` and ``__add__``.
        function, args, kwargs, result: the call itself.
        facts: the facts about tensors among the arguments before the call, by their ids.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    facts: Mapping[int, Fact]

    def fact(self, value: Any) -> Fact | None:
        """The fact about an argument."""
        return self.facts.get(id(value)) if isinstance(value, Tensor) else None

    def arguments(self, *names: str) -> list[Any]:
        """The arguments of the given names, in the order of the positions; None for others."""
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        return [given.get(name) for name in names]

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [*tensors_in((self.args, self.kwargs))]


class DataFlow(TorchFunctionMode):
    """Watches the torch functions of a forward and keeps facts about tensors.

    Args:
        parameters: the parameters to follow, by their names.

    Attributes:
        uses: for each parameter that the forward used, why its elements cannot be followed; None
            where they can.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> with DataFlow(dict(layer.named_parameters())) as flow:
        ...     turned = layer.weight.t()
        ...     _ = layer.bias.exp()
        >>> flow.fact(turned)
        Reference(name='weight', axes=(1, 0), offset=0.0)
        >>> flow.uses
        {'weight': None, 'bias': 'exp reads it'}
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: dict[str, str | None] = {}
        self.parameters = dict(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._facts: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in SHAPES:
            return func(*args, **kwargs)
        facts = {}
        for tensor in tensors_in((args, kwargs)):
            fact = self.fact(tensor)
            if fact is not None:
                facts[id(tensor)] = fact
        ended = self._ended(args, kwargs)
        result = func(*args, **kwargs)
        if name in ZEROS:
            for tensor in tensors_in(result):
                self.keep(tensor, Zero())
        elif facts:
            self._step(Call(name, func, args, kwargs, result, facts))
        if ended is not None:
            self._pass_end(result, ended)
        return result

    # ------------------------------------------------------------ facts

    def fact(self, tensor: Tensor) -> Fact | None:
        """The fact about a tensor, or None."""
        name = self._names.get(id(tensor))
        if name is not None and self.parameters[name] is tensor:
            self.uses.setdefault(name, None)
            return Reference(name, tuple(range(tensor.dim()))) if tensor.numel() > 1 else None
        kept = self._facts.get(tensor)
        if kept is None:
            return None
        fact, version = kept
        if isinstance(fact, After):
            return None
        if version == _version(tensor):
            return fact  # type: ignore[no-any-return]
        if isinstance(fact, Labels):
            self.block(fact, "it is changed in place")
        elif isinstance(fact, Reference):
            self.lose(fact, "a view of it is changed in place")
        return None

    def ended(self, tensor: Any) -> str | None:
        """The function with which the labels of a tensor ended; None if none did."""
        fact = self._facts.get(tensor, (None,))[0] if isinstance(tensor, Tensor) else None
        return fact.function if isinstance(fact, After) else None

    def ends(self, result: Any, function: str | None) -> None:
        """The labels of the arguments end with a function; None: there were none."""
        if function is not None:
            for tensor in tensors_in(result):
                self.keep(tensor, After(function))

    def keep(self, tensor: Tensor, fact: Fact | After | None) -> None:
        """Keep a fact about a tensor; None keeps none."""
        if fact is None:
            self._facts.pop(tensor, None)
        else:
            self._facts[tensor] = fact, _version(tensor)

    def label(self, tensor: Tensor, values: Tensor) -> None:
        """Keep labels that broadcast to the shape of a tensor."""
        self.keep(tensor, Labels(values.expand(tensor.shape)))

    # ------------------------------------------------------------ for subclasses

    def block(self, labels: Labels, reason: str) -> None:
        """A function reads labelled elements in a way that labels cannot follow."""

    def lose(self, reference: Reference, reason: str) -> None:
        """A function reads a parameter in a way that labels cannot follow."""
        if self.uses.get(reference.name) is None:
            self.uses[reference.name] = reason

    def step(self, call: Call) -> bool:
        """What a function does that does not only move elements; False for an unknown one."""
        return False

    # ------------------------------------------------------------ steps

    def _step(self, call: Call) -> None:
        known = call.kwargs.get("out") is None
        if known and call.name in SAME:
            self._same(call)
        elif known and call.name in MOVES:
            known = self._move(call)
        elif known:
            known = self.step(call)
            if not known and call.name in JOINS:
                known = self.join(call)
        if not known:
            self.unknown(call)

    def _ended(self, args: Any, kwargs: Any) -> str | None:
        """The function with which the labels of an argument ended."""
        ends = (self.ended(tensor) for tensor in tensors_in((args, kwargs)))
        return next((function for function in ends if function is not None), None)

    def _pass_end(self, result: Any, function: str) -> None:
        """Results without a fact come after the function, too."""
        for tensor in tensors_in(result):
            if tensor.is_floating_point() and self._facts.get(tensor) is None:
                self.keep(tensor, After(function))

    def unknown(self, call: Call) -> None:
        """Block all labels and lose all parameters that a call reads."""
        if any(isinstance(fact, Labels) for fact in call.facts.values()):
            self.ends(call.result, call.name)
        for fact in call.facts.values():
            if isinstance(fact, Labels):
                self.block(fact, f"{call.name} reads it")
            elif isinstance(fact, Reference):
                self.lose(fact, f"{call.name} reads it")

    def _same(self, call: Call) -> None:
        fact = call.fact(call.args[0]) if call.args else None
        for tensor in tensors_in(call.result):
            self.keep(tensor, fact)

    def _move(self, call: Call) -> bool:
        source = call.args[0] if call.args else None
        fact = call.fact(source)
        others = [item for key, item in call.facts.items() if key != id(source)]
        if any(isinstance(other, Labels) for other in others):
            return False
        if isinstance(fact, Labels):
            return self._moved(call, {id(source): fact.values})
        if isinstance(fact, Reference) and isinstance(source, Tensor):
            return self._moved_reference(call, source, fact)
        if isinstance(fact, Zero):
            for tensor in tensors_in(call.result):
                self.keep(tensor, fact)
        return fact is None or isinstance(fact, Zero)

    def join(self, call: Call) -> bool:
        """Tensors of which some have labels are joined; the elements of others get none."""
        if any(isinstance(fact, Reference) for fact in call.facts.values()):
            return False
        if not any(isinstance(fact, Labels) for fact in call.facts.values()):
            return True
        sources = {}
        for tensor in call.tensors():
            fact = call.fact(tensor)
            missing = torch.tensor(UNLABELLED, dtype=torch.int32, device=tensor.device)
            values = fact.values if isinstance(fact, Labels) else missing.expand(tensor.shape)
            sources[id(tensor)] = values
        return self._moved(call, sources)

    def _moved(self, call: Call, sources: Mapping[int, Tensor]) -> bool:
        """Call the function with labels in place of the tensors; keep the labels of its results."""
        moved = _applied(call, sources)
        results = [*tensors_in(call.result)]
        if moved is None or [r.shape for r in results] != [m.shape for m in moved]:
            return False
        for tensor, values in zip(results, moved, strict=True):
            self.keep(tensor, Labels(values))
        return True

    def _moved_reference(self, call: Call, source: Tensor, reference: Reference) -> bool:
        """Find out where the dimensions of a parameter are after a move."""
        results = [*tensors_in(call.result)]
        axes: list[list[int | None]] = [[None] * tensor.dim() for tensor in results]
        for dimension, axis in enumerate(reference.axes):
            size = source.shape[dimension]
            if axis is None or size == 1:
                continue
            positions = torch.arange(size, dtype=torch.int32, device=source.device)
            shape = [1] * source.dim()
            shape[dimension] = size
            moved = _applied(call, {id(source): positions.view(shape).expand(source.shape)})
            if moved is None or len(moved) != len(results):
                return False
            for found, values in zip(axes, moved, strict=True):
                place = along(values)
                if place is not None and torch.equal(first_line(values, place), positions):
                    found[place] = axis  # otherwise rows are chosen, such as those of an expert
        for tensor, found in zip(results, axes, strict=True):
            self.keep(tensor, replace(reference, axes=tuple(found)))
        return True


def _applied(call: Call, sources: Mapping[int, Tensor]) -> list[Tensor] | None:
    """The results of a function for other tensors in place of some arguments."""
    for dense in (False, True):  # expanded tensors cannot be viewed in every shape
        chosen = {key: values.contiguous() if dense else values for key, values in sources.items()}
        try:
            result = call.function(*_replaced(call.args, chosen), **_replaced(call.kwargs, chosen))
        except (RuntimeError, TypeError):
            continue
        return [*tensors_in(result)]
    return None


def _replaced(value: Any, chosen: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return chosen.get(id(value), value)
    if isinstance(value, torch.Size):
        return value
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, chosen) for item in value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, chosen) for key, item in value.items()}
    return value


def _name(function: Any) -> str:
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        owner = function.__self__
        name = getattr(owner, "__name__", None) or owner.fget.__name__
    return name.strip("_") or type(function).__name__


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def operands(call: Call) -> tuple[Any, Any] | None:
    """The two operands of a function of two values; None for another number.

    Example:
        >>> operands(Call("add", torch.add, (1, 2), {}, 3, {}))
        (1, 2)
    """
    values = (*call.args, *(call.kwargs[key] for key in ("input", "other") if key in call.kwargs))
    return (values[0], values[1]) if len(values) == 2 else None
