"""The report on a region: how much of it is int8, and where its chains break."""

from __future__ import annotations

from collections.abc import Iterator

from torchquant.chains.operations import Activate, Layer, Other, Same
from torchquant.chains.plan import Plan
from torchquant.chains.region import RegionForward
from torchquant.graph.trace import Trace
from torchquant.report.regions import BreakReport, RegionReport


def report_of(region: RegionForward) -> RegionReport:
    """What is known about a region at this moment.

    Args:
        region: a region that observes or is quantized.
    """
    name, kind = region.name, type(region.root).__name__
    if region.failure:
        return RegionReport(name, kind, "float", region.failure)
    plan, facts = region.plan, region.facts
    if plan is None or facts is None:
        return RegionReport(name, kind, "found", "", len(region.activations))
    layers = [
        index for index, operation in enumerate(plan.operations) if isinstance(operation, Layer)
    ]
    dropped = [
        index for index, call in enumerate(region.trace.calls) if call.target in plan.dropped
    ]
    return RegionReport(
        name,
        kind,
        "int8" if region.quantized else region.known_as,
        "",
        len(plan.layers),
        len(plan.edge_of),
        tuple(_breaks(region.trace, plan, facts.flops)),
        sum(facts.flops),
        sum(facts.flops[index] for index in (*layers, *dropped)),
    )


def _breaks(trace: Trace, plan: Plan, flops: list[int]) -> Iterator[BreakReport]:
    stepped = {call for group in plan.groups.values() for call in group.calls}
    for index in sorted(plan.live):
        operation = plan.operations[index]
        if index in plan.ended:
            reason = f"the output of {plan.ended[index]} is configured as float"
            yield BreakReport(_place(trace, index), reason, 0)
        if index in stepped or isinstance(operation, Same):
            continue
        if isinstance(operation, Other):
            if operation.quiet:
                continue
            reason = operation.reason
        elif index in plan.in_float:
            reason = f"{_word(operation)}: {plan.in_float[index]}"
        else:
            reason = f"{_word(operation)} between float values"
        yield BreakReport(_place(trace, index), reason, flops[index])


def _word(operation: object) -> str:
    if isinstance(operation, Activate):
        return operation.function
    return "linear" if isinstance(operation, Layer) else type(operation).__name__


def _place(trace: Trace, index: int) -> str:
    """The innermost module in whose forward a call is, and what it calls."""
    inside = [scope for scope in trace.scopes if scope.start <= index < scope.end]
    owner = max(inside, key=lambda scope: scope.start, default=None)
    call = trace.calls[index]
    target = call.target.rpartition(":")[2]
    if owner is None or call.kind == "module":
        return target
    return f"{owner.path}: {target}"
