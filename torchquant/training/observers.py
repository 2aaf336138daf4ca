"""Observers: modules that record the range of the tensors that pass through them.

``forward(x)`` returns x itself; ``calculate_qparams()`` turns the range recorded so far into scale
and zero point. The range is kept in buffers, so it is saved, loaded and moved with the model, and
it is updated on the tensor's device without synchronisation.

Values that are not finite are left out of a range: one infinity would make every later scale
useless. They are counted instead. An observer warns about its first ones, and
:func:`report_nonfinite` lists the counts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from torchquant.functional._checks import describe
from torchquant.scheme import (
    PER_TENSOR,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)
from torchquant.training.layer_part import LayerPart
from torchquant.training.processes import process_group_name, processes_of
from torchquant.training.ranges import range_to_qparams, update_range, update_range_operator
from torchquant.training.reduction import common_shape, states_of_processes
from torchquant.training.state import adopt_shapes, inside_backward

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INF = float("inf")


class ObserverOptions(TypedDict, total=False):
    """The keyword arguments that all observers have; :class:`Observer` says what they mean."""

    bits: int
    signed: bool
    symmetric: bool
    granularity: Granularity
    narrow_range: bool | None
    shape: tuple[int, ...] | None
    process_group: Any
    device: torch.device | str | None


class Observer(LayerPart):
    """Base class of the observers: the range of all batches, and scale and zero point from it.

    State: ``min_val``, ``max_val`` float32 of the scale's shape (+inf and -inf before any data),
    ``num_batches`` int64 ``[1]``, ``nonfinite`` int64 ``[1]``: the number of values that were NaN
    or infinite. The range stays float32 under ``.to(torch.bfloat16)``.

    If torch.distributed is initialised, minimum, maximum and counts are reduced over the processes
    in one collective before anything is averaged, so that every process has the range of the whole
    batch; all processes must then call the observer equally often. The second forward of activation
    checkpointing runs inside a backward pass and is not observed. On a GPU a forward never
    synchronises; warnings about non-finite values are issued by ``train()`` and ``eval()``.

    Args:
        bits, signed, narrow_range: the integer range, see :func:`torchquant.quant_range`.
            ``narrow_range=None`` is True for 8 bits signed symmetric, otherwise False.
        symmetric: whether the zero point is 0. If not, the range is widened to contain 0.
        granularity: which elements share a scale. PerToken is refused: these ranges are computed
            inside the operators.
        shape: shape of the scales, if it is to be set before the first batch. Only PerAxis and
            PerGroup need it; without it their state has shape ``[0]`` until the first batch.
        process_group: processes to reduce over; None is the default group.
        device: device of the state.

    Raises:
        TypeError: granularity is not a granularity, or process_group is not a torch.distributed
            ProcessGroup.
        ValueError: bits is not an integer from 2 to 8, narrow_range is True for an unsigned range,
            or granularity is PerToken.

    Example:
        >>> observer = MinMaxObserver()
        >>> x = observer(torch.tensor([-1.0, 3.0]))
        >>> observer.calculate_qparams()
        (tensor([0.0157]), tensor([-64], dtype=torch.int32))
    """

    min_val: Tensor
    max_val: Tensor
    num_batches: Tensor
    nonfinite: Tensor
    # Weight of the newest batch in a moving average; None if the range only grows.
    averaging_constant: float | None = None
    # The buffers whose shape follows from that of the scales.
    shaped: ClassVar[tuple[str, ...]] = ("min_val", "max_val")

    def __init__(
        self,
        *,
        bits: int = 8,
        signed: bool = True,
        symmetric: bool = False,
        granularity: Granularity = PER_TENSOR,
        narrow_range: bool | None = None,
        shape: tuple[int, ...] | None = None,
        process_group: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if narrow_range is None:
            narrow_range = bits == 8 and signed and symmetric
        self.qmin, self.qmax = quant_range(bits, signed=signed, narrow_range=narrow_range)
        self.symmetric = bool(symmetric)
        self.granularity = _check_granularity(who, granularity)
        self.group_name = process_group_name(who, process_group)
        self._warned = False
        if isinstance(granularity, PerTensor):
            shape = (1,)
        shape = (0,) if shape is None else tuple(shape)
        # Dtypes are explicit: models are also built under another default dtype.
        for name, value in (("min_val", _INF), ("max_val", -_INF)):
            full = torch.full(shape, value, dtype=torch.float32, device=device)
            self.register_buffer(name, full)
        for name in ("num_batches", "nonfinite"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Record the range of a float32, bfloat16 or float16 tensor and return the same object.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: input is on another device, or its scales have another shape than those of
                earlier batches.
        """
        self.check_input(input, self.num_batches)
        self._take_shape(input)
        axis, group_size = self.granularity.axis_and_group_size(input.shape)
        state = (self.min_val, self.max_val, self.num_batches, self.nonfinite)
        if torch.compiler.is_compiling():
            update_range_operator(
                input.detach(), *state, axis, group_size, self.averaging_constant, self.group_name
            )
            return input
        if input.is_meta or inside_backward():
            return input
        update_range(input, *state, axis, group_size, self.averaging_constant, self.group_name)
        # Reading a CPU tensor needs no synchronisation. Other devices warn when the mode changes.
        if not self._warned and self.nonfinite.is_cpu and self.nonfinite.numpy()[0]:
            self._warn_nonfinite()
        return input

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale float32 and zero point int32 of the range of all batches so far.

        Groups without data get scale 1 and the allowed zero point nearest to 0. If there was no
        data at all, a warning is issued.
        """
        if not bool((self.num_batches > 0).item()):
            warnings.warn(
                f"{self.title()}: calculate_qparams was called before any data was observed and "
                "returns scale 1; run batches through the observer first",
                RuntimeWarning,
                stacklevel=2,
            )
        least, greatest = self.calculate_range()
        return range_to_qparams(least, greatest, self.qmin, self.qmax, self.symmetric)

    def calculate_range(self) -> tuple[Tensor, Tensor]:
        """The range that :meth:`calculate_qparams` uses: least and greatest value, float32.

        Scales without data have the least value +inf and the greatest value -inf.
        """
        return self.min_val, self.max_val

    def merge(self, other: Observer) -> None:
        """Add what another observer has seen, as if its batches had come to this one.

        The result is exact, and the same for every order. Only a moving average depends on the
        order; two averages become their mean, weighted by their numbers of batches.

        Args:
            other: an observer of the same class with the same arguments; it stays unchanged.

        Raises:
            TypeError: other is of another class.
            ValueError: other has other arguments, or ranges of another shape.

        Example:
            >>> first, second = MinMaxObserver(), MinMaxObserver()
            >>> _ = first(torch.tensor([-1.0, 2.0])), second(torch.tensor([0.5, 3.0]))
            >>> first.merge(second)
            >>> first.min_val, first.max_val
            (tensor([-1.]), tensor([3.]))
        """
        who = f"{type(self).__name__}.merge"
        if type(other) is not type(self):
            raise TypeError(
                f"{who}: other must be a {type(self).__name__}, got {type(other).__name__}"
            )
        if other.extra_repr() != self.extra_repr():
            raise ValueError(
                f"{who}: other must have the same arguments ({self.extra_repr()}), got "
                f"{other.extra_repr()}"
            )
        unshaped = [list(part.min_val.shape) == [0] for part in (self, other)]
        if unshaped[0]:
            self._set_shape(tuple(other.min_val.shape))
        elif not unshaped[1] and self.min_val.shape != other.min_val.shape:
            raise ValueError(
                f"{who}: other must have ranges of shape {list(self.min_val.shape)}, got "
                f"{list(other.min_val.shape)}"
            )
        with torch.no_grad():
            if not unshaped[1]:
                self._merge_ranges(other)
            self.num_batches += other.num_batches
            self.nonfinite += other.nonfinite

    def reduced(self, process_group: Any = None) -> Any:
        """A copy that has seen the batches of all processes; without torch.distributed a copy.

        All processes must call this method. The result is the same in all of them, and, except for
        moving averages, the result of one process that sees all batches.

        Args:
            process_group: processes to reduce over; None is the default group.

        Raises:
            ValueError: the processes hold observers with other arguments, or with ranges of other
                shapes.
        """
        who = f"{type(self).__name__}.reduced"
        name = process_group_name(who, process_group)
        result = copy.deepcopy(self)
        if processes_of(name) == 1:
            return result
        described = f"{self.title()} ({self.extra_repr()})"
        shape = common_shape(self.min_val, described, who, name)
        if self.min_val.shape != shape:
            result._set_shape(shape)
        one, own = copy.deepcopy(result), dict(result.named_buffers())
        states = states_of_processes(own, name)
        result.reset()
        for state in states:
            one._buffers.update(state)
            result.merge(one)
        return result

    def reset(self) -> None:
        """Forget all batches."""
        with torch.no_grad():
            self.min_val.fill_(_INF)
            self.max_val.fill_(-_INF)
            self.num_batches.zero_()
            self.nonfinite.zero_()
        self._warned = False

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self._warn_nonfinite()
        return super().train(mode)

    def extra_repr(self) -> str:
        return (
            f"range [{self.qmin}, {self.qmax}], symmetric={self.symmetric}, "
            f"granularity={self.granularity}"
        )

    def _take_shape(self, input: Tensor) -> None:
        shape = self.granularity.scale_shape(input.shape)
        if tuple(self.min_val.shape) == shape:
            return
        if list(self.min_val.shape) != [0]:
            raise ValueError(
                f"{type(self).__name__}: input must have ranges of shape "
                f"{list(self.min_val.shape)} as before, got {list(input.shape)}, whose ranges for "
                f"{self.granularity} have shape {list(shape)}; use one observer for each tensor"
            )
        self._set_shape(shape)

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        """Create the state of scales of the given shape, without data."""
        # Tensors made in inference mode could not be updated outside it.
        with torch.inference_mode(False):
            options: Any = {"dtype": torch.float32, "device": self.num_batches.device}
            self.min_val = torch.full(shape, _INF, **options)
            self.max_val = torch.full(shape, -_INF, **options)

    def _merge_ranges(self, other: Any) -> None:
        self.min_val.copy_(torch.minimum(self.min_val, other.min_val))
        self.max_val.copy_(torch.maximum(self.max_val, other.max_val))

    def _warn_nonfinite(self) -> None:
        if self._warned or self.nonfinite.is_meta:
            return
        count = int(self.nonfinite.item())
        if count:
            self._warned = True
            warnings.warn(
                f"{self.title()}: {count} values were NaN or infinite and are left out of the "
                "range; torchquant.report_nonfinite(model) lists the counts of all layers",
                RuntimeWarning,
                stacklevel=3,
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        adopt_shapes(self, state_dict, prefix, *self.shaped)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


class MinMaxObserver(Observer):
    """The least and the greatest finite value of all batches.

    Arguments, state and errors are those of :class:`Observer`.

    Example:
        >>> from torchquant import PerAxis
        >>> observer = MinMaxObserver(bits=4, symmetric=True, granularity=PerAxis(0))
        >>> weight = observer(torch.tensor([[0.7, -0.1], [0.2, -1.4]]))
        >>> observer.calculate_qparams()
        (tensor([0.1000, 0.2000]), tensor([0, 0], dtype=torch.int32))
    """


class MovingAverageMinMaxObserver(Observer):
    """Exponential moving averages of each batch's least and greatest finite value.

    ``min = min + c * (batch_min - min)``, computed in float64 and rounded once. The first batch
    sets the range; a batch without finite values is skipped.

    Args:
        averaging_constant: c, above 0 and at most 1.
        bits, signed, symmetric, granularity, narrow_range, shape, process_group, device: see
            :class:`Observer`.

    Raises:
        TypeError, ValueError: see :class:`Observer`; ValueError also if averaging_constant is not a
            number above 0 and at most 1.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 3.1.

    Example:
        >>> observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
        >>> for batch in (torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 3.0])):
        ...     batch = observer(batch)
        >>> observer.min_val, observer.max_val
        (tensor([-0.5000]), tensor([2.]))
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        **options: Unpack[ObserverOptions],
    ) -> None:
        super().__init__(**options)
        number = isinstance(averaging_constant, (int, float))
        if not number or isinstance(averaging_constant, bool) or not 0 < averaging_constant <= 1:
            raise ValueError(
                "MovingAverageMinMaxObserver: averaging_constant must be a number above 0 and at "
                f"most 1, got {averaging_constant!r}; 0.01 averages over about 100 batches"
            )
        self.averaging_constant = float(averaging_constant)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, averaging_constant={self.averaging_constant}"

    def _merge_ranges(self, other: Any) -> None:
        mine, its = self.num_batches.double(), other.num_batches.double()
        share = its / (mine + its).clamp(min=1.0)
        for own, new in ((self.min_val, other.min_val), (self.max_val, other.max_val)):
            mean = (own.double() + share * (new.double() - own.double())).float()
            own.copy_(torch.where(new.isinf(), own, torch.where(own.isinf(), new, mean)))


def report_nonfinite(model: nn.Module) -> dict[str, int]:
    """Numbers of NaN and infinite values that the observers of a model counted, by layer.

    Args:
        model: any module.

    Returns:
        layer name -> count, for counts above 0. The name is the layer's path if ``prepare_`` or
        ``prepare_qat_`` made the observer, otherwise the observer's own path in the model.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> import warnings
        >>> model = nn.Sequential(MinMaxObserver())
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     x = model(torch.tensor([1.0, float("nan")]))
        >>> report_nonfinite(model), len(caught)
        ({'0': 1}, 1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report_nonfinite: model must be an nn.Module, got {type(model).__name__}")
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        hooks = (getattr(hook, "observer", None) for hook in module._forward_pre_hooks.values())
        for observer in (module, *hooks):
            if isinstance(observer, Observer) and not observer.nonfinite.is_meta:
                count = int(observer.nonfinite.item())
                if count:
                    name = observer.layer_name or path
                    counts[name] = counts.get(name, 0) + count
    return counts


def _check_granularity(who: str, granularity: Granularity) -> Granularity:
    """Return the granularity; raise if its scales would change from batch to batch."""
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


__all__ = [
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "report_nonfinite",
]
