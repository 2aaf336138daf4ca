"""find_recipe: whether one operator computes the same as a norm, and for which calls.

A name says little about what a norm computes, and so does its source. Therefore copies of the norm
with random parameters run beside the operator, for every dtype, number of dimensions and mode, and
only the calls with the same results are taken. The norm itself never runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.purity import may_run
from torchquant.nn.norm_comparison import candidates, ours, parameters_of, same, theirs
from torchquant.nn.norm_recipe import AutocastKey, CallKey, NormRecipe, call_key
from torchquant.nn.norm_replacement import class_of, replaced_class
from torchquant.nn.norm_specimen import (
    Call,
    RefusedError,
    Specimen,
    call_of,
    kept_random_state,
    watch_random_numbers,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RANKS = (1, 2, 3, 4, 5)
_OTHER_SIZE = 33  # a second length for norms of any length
_LONGEST_SQUARE = 512  # up to this length, other dimensions of the same length are tried

# Sizes of the rows of a probe: ordinary, large with a mean, small, such that eps matters, and both
# ends.
_SCALES = (1.0, 100.0, 0.01, 1e-3, 3e-4, 1e-6, 1e4, 0.0)
_MEAN = 50.0  # of the large row

_GRADIENT_ERROR = 2e-5  # relative to the largest


def find_recipe(
    norm: nn.Module, known: dict[Any, NormRecipe | str] | None = None
) -> NormRecipe | str:
    """How one operator computes a norm, or the reason why none does.

    Args:
        norm: any module. It is neither changed nor run; copies with random parameters are.
        known: results for other norms of one model, to which the result is added; norms that differ
            only in the values of their parameters share one.

    Example:
        >>> recipe = find_recipe(nn.RMSNorm(8, eps=1e-6))
        >>> recipe.family, recipe.weight, recipe.eps
        ('rms', 'weight', 1e-06)
        >>> find_recipe(nn.GroupNorm(2, 8))
        'it normalizes groups of channels, not the last dimension'
    """
    known = {} if known is None else known
    reason = _reason_by_kind(norm)
    if reason is not None:
        return reason
    if not may_run(norm):
        return "its forward may do more than compute, so it was not run"
    try:
        call = call_of(class_of(norm))
        specimen = Specimen(norm, class_of(norm))
        key = specimen.key()
        if key not in known:
            known[key] = _probe(norm, specimen, call)
        return known[key]
    except (Exception, SystemExit) as error:
        return _reason(error)


def _probe(norm: nn.Module, specimen: Specimen, call: Call) -> NormRecipe | str:
    with kept_random_state(specimen.device), warnings.catch_warnings(), _plain_modes():
        warnings.simplefilter("ignore")
        try:
            return _Probe(norm, specimen).run(call)
        except (Exception, SystemExit) as error:
            return _reason(error)


def _reason(error: BaseException | None) -> str:
    """A reason out of what a norm raised."""
    if isinstance(error, RefusedError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[0]
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return f"a probe of it failed ({type(error).__name__}{': ' if text else ''}{text})"


def _reason_by_kind(norm: nn.Module) -> str | None:
    """The reason why a norm of one of torch's other kinds cannot be replaced."""
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return "it normalizes each channel over all positions, not the last dimension"
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        return "it normalizes over the batch, not the last dimension"
    if isinstance(norm, nn.GroupNorm):
        return "it normalizes groups of channels, not the last dimension"
    if isinstance(norm, (nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        return "it normalizes over neighbouring channels, not the last dimension"
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, (tuple, list)) and len(shape) != 1:
        return f"it normalizes several dimensions, {list(shape)}, not one"
    return None


@contextmanager
def _plain_modes() -> Iterator[None]:
    """Gradients are recorded; inference mode and autocast are off; new tensors are on the CPU."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


class _Probe:
    """Comparisons of one norm with the operators."""

    def __init__(self, norm: nn.Module, specimen: Specimen) -> None:
        self.norm = norm
        self.specimen = specimen
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.rank = 2  # dimensions of an input that the norm accepts
        self.channels_first = False
        self.different: set[tuple[int, bool]] = set()  # (dimensions, training)

    def run(self, call: Call) -> NormRecipe:
        """The recipe, with the calls for which it holds."""
        recipe = self._rounding(self._formula())
        calls = self._calls(recipe)
        input = self._input(self.rank, torch.float32)
        own = call_key(input, *parameters_of(recipe, self._own()), False)[1:3]
        if not any(key[1:3] == own for key in calls):
            raise RefusedError(self._other_function())
        autocast_calls = self._autocast_calls(recipe, calls)
        contiguous = not self._keeps_strides(recipe)
        self._check_class()
        if changed := self.specimen.changed():
            raise RefusedError(f"its forward changes the module ({changed})")
        return dataclasses.replace(
            recipe,
            size=None if self.specimen.any_size else self.specimen.size,
            argument=call.argument,
            residual=recipe.family == "layer"
            and not recipe.channels_first
            and call.closed
            and "residual" not in call.optional,
            contiguous=contiguous,
            calls=frozenset(calls),
            autocast_calls=frozenset(autocast_calls),
            remark=self._remark(calls, call),
        )

    def _own(self, training: bool = False) -> nn.Module:
        return self.specimen.copy(self.specimen.own_dtypes, training=training)

    def _check_class(self) -> None:
        """Refuse a norm whose forward does not work in a subclass of its class."""
        copy = self._own()
        dtype = next(iter(self.specimen.own_dtypes.values()), torch.float32)
        input = self._input(self.rank, dtype)
        try:
            expected = theirs(copy, input)
            copy.__class__ = replaced_class(type(copy))
            equal = torch.equal(expected, theirs(copy, input))
        except (Exception, SystemExit) as error:
            raise RefusedError(f"its class cannot be derived from: {_reason(error)}") from error
        if not equal:
            raise RefusedError("its class cannot be derived from: it computes other values then")

    def _inputs(self, rank: int, dtype: torch.dtype) -> list[Tensor]:
        """Inputs with rows of all sizes."""
        return [*self._input(2, dtype)] if rank == 1 else [self._input(rank, dtype)]

    def _input(self, rank: int, dtype: torch.dtype, size: int | None = None) -> Tensor:
        """Rows of different sizes; with one dimension, an ordinary row."""
        size = self.specimen.size if size is None else size
        rows = self._random((len(_SCALES), size))
        rows *= torch.tensor(_SCALES, dtype=torch.float32, device="cpu")[:, None]
        rows[1] += _MEAN
        shapes = {1: (size,), 3: (2, 4, size), 4: (1, 2, 4, size), 5: (1, 2, 1, 4, size)}
        rows = rows[0] if rank == 1 else rows.reshape(shapes.get(rank, rows.shape))
        if self.channels_first and rank == 4:
            rows = rows.permute(0, 3, 1, 2).contiguous()
        return rows.to(self.specimen.device, dtype)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        """Normal values in float32 on the CPU, whatever torch's defaults are."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _squares(self, rank: int) -> list[Tensor]:
        """Inputs in which another dimension has the length of the last, or the length differs."""
        size, inputs = self.specimen.size, []
        if rank > 1 and size <= _LONGEST_SQUARE:
            shape = (1, size, *[1] * (rank - 3), size) if rank > 2 else (size, size)
            inputs.append(self._random(shape).to(self.specimen.device))
        if self.specimen.any_size:
            inputs.append(self._input(rank, torch.float32, _OTHER_SIZE))
        return inputs

    def _formula(self) -> NormRecipe:
        """The formula that gives the norm's values in float32."""
        failure: BaseException | None = None
        for rank, channels_first in ((2, False), (3, False), (4, False), (1, False), (4, True)):
            if isinstance(failure, RefusedError) and not channels_first:
                continue  # it computes something else over the last dimension
            self.rank, self.channels_first = rank, channels_first
            copy, input = self.specimen.copy(torch.float32), self._input(rank, torch.float32)
            try:
                result = theirs(copy, input)
            except (Exception, SystemExit) as error:
                failure = failure or error
                continue
            for recipe in candidates(copy):
                way = dataclasses.replace(recipe, channels_first=channels_first)
                if same(result, ours(way, copy, input)):
                    return way
            failure = RefusedError(self._other_function())
        raise RefusedError(_reason(failure))

    def _other_function(self) -> str:
        wanted = "a LayerNorm or an RMSNorm"
        if isinstance(self.norm, nn.LayerNorm):
            wanted = "a LayerNorm"
        elif isinstance(self.norm, nn.RMSNorm):
            wanted = "an RMSNorm"
        return f"its forward gives other values than {wanted} over the last dimension"

    def _rounding(self, recipe: NormRecipe) -> NormRecipe:
        """The recipe with the roundings that are nearest to the norm's in bfloat16."""
        copy, input = self.specimen.copy(torch.bfloat16), self._input(self.rank, torch.bfloat16)
        try:
            result = theirs(copy, input).double()
        except (Exception, SystemExit):
            return recipe
        ways = [
            dataclasses.replace(recipe, cast_before_weight=cast, one_plus_wide=wide)
            for cast in ((False, True) if recipe.family == "rms" else (False,))
            for wide in ((True, False) if recipe.one_plus else (False,))
        ]
        distances = [
            float((result - ours(way, copy, input).values.double()).abs().sum().cpu())
            for way in ways
        ]
        return ways[distances.index(min(distances))]

    def _calls(self, recipe: NormRecipe) -> set[CallKey]:
        """All calls for which the operator and the norm agree."""
        found: set[CallKey] = set()
        for training in (False, True):
            drawn = watch_random_numbers()
            in_this_mode = self._calls_in_mode(recipe, training)
            rank = min(
                (key[3] for key in in_this_mode), key=lambda rank: abs(rank - self.rank), default=0
            )
            if rank and not drawn() and self._same_gradients(recipe, rank, training):
                found |= in_this_mode
            else:
                self.different |= {(rank, training) for rank in _RANKS}
        return found

    def _calls_in_mode(self, recipe: NormRecipe, training: bool) -> set[CallKey]:
        found: set[CallKey] = set()
        plain = self.specimen.copy(torch.float32, training=training)
        ranks = [
            rank
            for rank in _RANKS
            if all(self._takes(recipe, plain, input) for input in self._squares(rank))
        ]
        dtypes: list[Any] = [*_FLOATS, self.specimen.own_dtypes]
        for of_parameters, of_input in itertools.product(dtypes, _FLOATS):
            copy = self.specimen.copy(of_parameters, training=training)
            for rank in ranks:
                inputs = self._inputs(rank, of_input)
                if all(self._takes(recipe, copy, input) for input in inputs):
                    found.add(call_key(inputs[0], *parameters_of(recipe, copy), training))
        return found

    def _takes(self, recipe: NormRecipe, copy: nn.Module, input: Tensor) -> bool:
        """True if the operator gives what the norm gives."""
        try:
            equal = same(theirs(copy, input), ours(recipe, copy, input))
        except (Exception, SystemExit):
            return False
        in_float32 = {p.dtype for p in copy.parameters()} | {input.dtype} == {torch.float32}
        if not equal and in_float32:
            self.different.add((input.dim(), copy.training))
        return equal

    def _autocast_calls(self, recipe: NormRecipe, calls: set[CallKey]) -> set[AutocastKey]:
        found: set[AutocastKey] = set()
        device = self.specimen.device.type
        modes = itertools.product((torch.bfloat16, torch.float16), (False, True), _FLOATS)
        for autocast_dtype, training, of_input in modes:
            try:
                autocast = torch.autocast(device, autocast_dtype)
            except RuntimeError:  # the device lacks this dtype
                continue
            for of_parameters in (torch.float32, self.specimen.own_dtypes):
                copy = self.specimen.copy(of_parameters, training=training)
                input = self._input(self.rank, of_input)
                key = call_key(input, *parameters_of(recipe, copy), training)
                with autocast:
                    if key in calls and self._takes(recipe, copy, input):
                        found.add((device, autocast_dtype, *key[:3], training))
        return found

    def _same_gradients(self, recipe: NormRecipe, rank: int, training: bool) -> bool:
        """True if input and parameters get the same gradients in float32, on the CPU."""
        cpu = torch.device("cpu")
        copy = self.specimen.copy(torch.float32, training=training, device=cpu)
        # Not the rows on which eps acts: their gradients are huge.
        input = self._random(self._input(rank, torch.float32).shape)
        gradient = self._random(input.shape)
        gradients = []
        for mine in (False, True):
            x = input.clone().requires_grad_()
            wanted = [x, *(p for p in copy._parameters.values() if p is not None)]
            try:
                y = recipe.compute(copy._parameters, x) if mine else copy.forward(x)
                gradients.append(torch.autograd.grad(y, wanted, gradient))
            except (Exception, SystemExit):
                return False
            if not same(y.detach(), ours(recipe, copy, input)):
                return False
        return all(
            float((wanted - got).abs().max()) <= _GRADIENT_ERROR * float(got.abs().max())
            for wanted, got in zip(*gradients, strict=True)
        )

    def _keeps_strides(self, recipe: NormRecipe) -> bool:
        """True if the norm's output has the operator's strides for input of any strides."""
        copy, size = self._own(), self.specimen.size
        dtype = next(iter(self.specimen.own_dtypes.values()), torch.float32)
        layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
            ((3, 2, size), (1, 0, 2)),
            ((2, size, 3), (0, 2, 1)),
            ((2, size, 3, 5), (0, 2, 3, 1)),
        )
        if recipe.channels_first:
            layouts = (((2, 3, 5, size), (0, 3, 1, 2)), ((3, size, 2, 5), (2, 1, 0, 3)))
        for shape, order in layouts:
            input = self._random(shape).to(self.specimen.device, dtype)
            input = input.permute(order)
            if not same(theirs(copy, input), ours(recipe, copy, input)):
                return False
        return True

    def _remark(self, calls: set[CallKey], call: Call) -> str:
        """Which calls run the forward of the norm's own class."""
        remarks = []
        modes = {key[4] for key in calls}
        if len(modes) == 1:
            remarks.append("in training mode" if False in modes else "in eval mode")
        ranks = sorted({rank for rank, training in self.different if training in modes})
        remarks += [f"of {rank}-dimensional input" for rank in ranks]
        if call.optional:
            remarks.append(f"with {' or '.join(call.optional)}")
        return f"calls {' and '.join(remarks)} run its own forward" if remarks else ""
