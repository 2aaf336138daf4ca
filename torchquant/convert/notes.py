"""The notes of a report: what the user should read besides the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from torchquant.convert.account import Account, library_notes
from torchquant.convert.plan import Step
from torchquant.convert.selection import Selection
from torchquant.graph.held import held_modules
from torchquant.nn.kinds import kind_of, kinds


def asked_problems(
    model: nn.Module, steps: Sequence[Step], account: Account, chosen: Selection[Any]
) -> list[str]:
    """What the arguments of a verb ask for and no layer of the model has.

    Modules of other kinds that the filter asks for are marked in the account.

    Args:
        model: the model.
        steps: the plan of the verb.
        account: the account of the model.
        chosen: what the arguments of the verb ask for.
    """
    others = [(other.module, other.names) for other in account.others]
    for other, asked in zip(account.others, chosen.filter.asks_for(model, others), strict=True):
        other.asked = asked
    names = [step.names for step in steps] + [other.names for other in account.others]
    problems = [*chosen.problems(names, account.containers)]
    done = (chosen.filter.accepts(step.module, step.names) for step in steps if step.already)
    found = any(step.asked for step in steps) or any(done)
    if (
        chosen.filter.given
        and not problems
        and not found
        and not any(other.asked for other in account.others)
    ):
        problems.append("filter_fn selects no layer")
    return problems


def sentences(problems: Iterable[str]) -> Iterator[str]:
    """Problems as sentences.

    Example:
        >>> [*sentences(["filter_fn selects no layer"])]
        ['Filter_fn selects no layer.']
    """
    return (f"{problem[0].upper()}{problem[1:]}." for problem in problems)


def untied_note(names: Iterable[str]) -> str:
    """The note on layers that have an integer copy of a weight that stays in use in float.

    Example:
        >>> untied_note(["head"])
        'Has its own integer copy of a shared weight, which training does not change: head.'
    """
    return (
        "Has its own integer copy of a shared weight, which training does not change: "
        f"{', '.join(names)}."
    )


def no_layers(done: str) -> str:
    """The note for a model without layers of any kind; ``done`` is the verb to name.

    Example:
        >>> no_layers("quantize")
        'The model has no linear, conv1d or conv2d layers; there was nothing to quantize.'
    """
    *names, last = (kind.name for kind in kinds() if not kind.only_weights)
    return f"The model has no {', '.join(names)} or {last} layers; there was nothing to {done}."


def kept_notes(steps: Iterable[Step]) -> Iterator[str]:
    """A note on the references to old layers that could not be replaced."""
    kept = [f"{place} ({step.name})" for step in steps for place in step.kept]
    if kept:
        yield (
            "Still computes with the old layer, because a Python object that is no module holds "
            f"it: {', '.join(kept)}."
        )


def plan_notes(
    model: nn.Module, steps: Sequence[Step], account: Account, done: str
) -> Iterator[str]:
    """Notes on a model whose layers were replaced according to a plan.

    Args:
        model: the model.
        steps: the steps, after they were carried out.
        account: the account of the model.
        done: the verb to name, for example "quantize".
    """
    libraries = library_notes(account.others)
    yield from libraries
    if not steps and not libraries:
        yield no_layers(done)
    yield from kept_notes(steps)
    registered = {id(module) for module in model.modules()}
    hidden = [
        held.name
        for key, places in held_modules(model).items()
        for held in places
        if key not in registered
        and held.container is not None
        and any(kind_of(module) is not None for module in held.module.modules())
    ]
    if hidden:
        yield (
            "Not registered as modules of the model, so left in float and not counted: "
            f"{', '.join(hidden)}; use nn.ModuleList or nn.ModuleDict."
        )
