"""Where the weights of a checkpoint belong in a model; checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.convert.plan import Step
from torchquant.files.fit import current_tensors
from torchquant.graph.modules import memory_key
from torchquant.integrations.checkpoints.nearest import row_chunks
from torchquant.integrations.checkpoints.stored import (
    MISFIT,
    Contents,
    FloatTensor,
    StoredWeight,
    Unreadable,
)
from torchquant.nn.intx_weight import values_of
from torchquant.nn.kinds import weight_shape


@dataclass(frozen=True)
class Place:
    """A layer that gets integers.

    Attributes:
        step: the layer in the model.
        stored: its weight.
        tied_to: the name of the layer whose weight it shares; None for a weight of its own.
    """

    step: Step
    stored: StoredWeight
    tied_to: str | None = None


@dataclass
class Plan:
    """What is loaded where.

    Attributes:
        places: the layers that get integers.
        floats: the other tensors by their key in the state dict.
        reasons: why a weight with integers in the file becomes float, by its key.
        ties: the tensors of the model by their key in the state dict; tied keys have one value.
        ignored: tensors of the file without a place, each with the reason.
    """

    places: list[Place] = field(default_factory=list)
    floats: dict[str, FloatTensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ties: dict[str, Hashable] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def plan(model: nn.Module, contents: Contents, steps: list[Step]) -> Plan:
    """Find the place of every tensor of a checkpoint.

    Args:
        model: the model, which stays unchanged.
        contents: the checkpoint.
        steps: the layers of the model.

    Raises:
        Unreadable: the checkpoint does not fit the model.
    """
    found = Plan(floats=dict(contents.floats), ignored=dict(contents.ignored))
    by_name = {name: step for step in steps for name in step.names}
    current = current_tensors(model)
    found.ties = _ties(model, current)
    for name, stored in contents.weights.items():
        _place(found, name, stored, by_name.get(name), current)
    _add_tied(found, steps)
    _drop_unknown(found, model, current)
    _check(found, current)
    return found


def _place(
    found: Plan,
    name: str,
    stored: StoredWeight,
    step: Step | None,
    current: Mapping[str, Tensor | None],
) -> None:
    key = f"{name}.weight"
    here = current.get(key)
    if step is not None and step.already:
        raise Unreadable(
            f"the model's layers must be float layers, but {name} is quantized or prepared already",
            "load it into the float model",
        )
    refusal = (
        "no layer that torchquant quantizes" if step is None else step.kind.refusal(step.module)
    )
    if step is None or refusal is not None:
        if here is None:
            raise Unreadable(
                f"the model has no layer {name}, for which the file has a weight", MISFIT
            )
        found.floats[key] = FloatTensor(stored.shape, lambda: dequantized(stored), stored.form)
        found.reasons[key] = str(refusal)
        return
    shape = weight_shape(step.module)
    if shape != stored.shape:
        raise Unreadable(
            f"{name} is {list(stored.shape)} in the file, {list(shape)} in the model", MISFIT
        )
    if any(place.step is step for place in found.places):
        raise Unreadable(
            f"{name} is a layer of its own in the file, a shared one in the model", MISFIT
        )
    found.places.append(Place(step, stored))


def dequantized(stored: StoredWeight) -> Tensor:
    """The float32 values of a stored weight."""
    integers = stored.integers()
    if integers is None:
        return torch.cat([stored.rows(*rows) for rows in row_chunks(stored.shape)])
    return values_of(integers.qweight, integers.scale, integers.zero_point, integers.weights)


def _add_tied(found: Plan, steps: list[Step]) -> None:
    """Layers that share a float weight in the model, and of which the file has one."""
    first = {_weight_key(found, place.step): place for place in found.places}
    taken = {id(place.step) for place in found.places}
    for step in steps:
        key, source = f"{step.name}.weight", first.get(_weight_key(found, step))
        absent = not any(f"{name}.weight" in found.floats for name in step.names)
        if id(step) in taken or source is None or not absent:
            continue
        if step.already or step.kind.refusal(step.module) is not None:
            found.floats[key] = FloatTensor(
                source.stored.shape, _dequantize(source.stored), source.stored.form
            )
            found.reasons[key] = step.kind.refusal(step.module) or "quantized already"
            continue
        found.places.append(Place(step, source.stored, source.step.name))


def _dequantize(stored: StoredWeight) -> Any:
    return lambda: dequantized(stored)


def _ties(model: nn.Module, current: Mapping[str, Tensor | None]) -> dict[str, Hashable]:
    """A value for each key, the same one for keys of one tensor.

    On the meta device a model may have lost its ties (``accelerate.init_empty_weights``);
    transformers' models name them.
    """
    ties = {key: memory_key(here) for key, here in current.items() if here is not None}
    named = getattr(model, "all_tied_weights_keys", None)
    for key, source in named.items() if isinstance(named, Mapping) else ():
        here, other = current.get(key), current.get(source)
        if here is not None and other is not None and here.is_meta and here.shape == other.shape:
            ties[key] = ties[source]
    return ties


def _weight_key(found: Plan, step: Step) -> Hashable:
    return found.ties.get(f"{step.name}.weight", id(step))


def _drop_unknown(found: Plan, model: nn.Module, current: Mapping[str, Tensor | None]) -> None:
    """Set aside tensors that the model does without; raise for others that it does not have."""
    computed = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
    }
    ends = {".".join(name.split(".")[-2:]) for name in computed}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = []
    for key in [key for key in found.floats if key not in current]:
        layer, _, part = key.rpartition(".")
        if key in computed or ".".join(key.split(".")[-2:]) in ends:
            reason = "the model computes this buffer"
        elif any(re.search(pattern, key) for pattern in patterns):
            reason = "the model's class says that it does without"
        elif part == "bias" and f"{layer}.weight" in current and _is_zero(found.floats[key]):
            reason = "the layer has no bias, and this one is 0"
        else:
            unknown.append(key)
            continue
        del found.floats[key]
        found.ignored[key] = reason
    if unknown:
        raise Unreadable(f"the model has no place for {_listed(unknown)}", MISFIT)


def _is_zero(tensor: FloatTensor) -> bool:
    return not bool(tensor.read().any())


def _check(found: Plan, current: Mapping[str, Tensor | None]) -> None:
    """Raise unless every tensor of the model has a value of its shape, and ties are kept."""
    covered = {f"{name}.weight" for place in found.places for name in place.step.names}
    given: dict[Hashable, str] = {}
    problems = []
    for key, tensor in found.floats.items():
        here = current[key]
        if here is None:
            continue
        if tuple(here.shape) != tensor.shape:
            problems.append(
                f"{key} is {list(tensor.shape)} in the file, {list(here.shape)} in the model"
            )
        if tensor.is_floating != here.is_floating_point():
            kinds = {True: "float", False: "integers"}
            problems.append(
                f"{key} is {kinds[tensor.is_floating]} in the file, "
                f"{kinds[here.is_floating_point()]} in the model"
            )
        first = given.setdefault(found.ties[key], key)
        if first != key and not problems:
            one, other = found.floats[first].read(), tensor.read()
            if not torch.equal(one, other.to(one.dtype)):
                problems.append(
                    f"{first} and {key} are two tensors in the file, one tensor in the model; "
                    "build a model that does not tie them (tie_word_embeddings=False)"
                )
    missing = [
        key
        for key, here in current.items()
        if here is not None and key not in covered and found.ties[key] not in given
    ]
    if missing:
        problems.append(f"the file has nothing for {_listed(missing)} of the model")
    if problems:
        raise Unreadable("; ".join(problems), MISFIT)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 6} others" if len(names) > 8 else ""
    return f"{', '.join(names[:6] if rest else names)}{rest}"
