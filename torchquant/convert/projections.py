"""Finds quantized layers that are applied to the same tensor, and groups them.

This module proves, from traces of the forward that calls the layers, the assumptions of
:class:`torchquant.nn.projections.ProjectionGroup`: the layers are called in one order on every
path; no code between the first and the last call can change their input in place or change torch's
modes; and each layer is called from one place in the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

from torch import fx, nn

from torchquant.graph.dataflow import Dataflow
from torchquant.graph.modules import has_hooks, owners_by_module
from torchquant.graph.trace import Trace, is_shape
from torchquant.nn.base import QuantizedModule
from torchquant.nn.fused import FusedActivation
from torchquant.report import FusionReport

Owners = dict[int, list[tuple[nn.Module, str]]]
Members = tuple[QuantizedModule, ...]

# Names of methods and functions that only read a tensor or return a view of it.
_READING = frozenset(
    (
        *("getattr", "getitem", "size", "dim", "numel", "eq", "ne", "lt", "le", "gt", "ge"),
        *("add", "sub", "mul", "truediv", "floordiv", "neg", "pos", "matmul", "pow", "rsqrt"),
        *("view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten"),
        *("chunk", "split", "unbind", "squeeze", "unsqueeze", "expand", "repeat", "cat", "stack"),
        *("to", "float", "type_as", "clone", "detach", "t", "mean", "sum", "softmax"),
    )
)


def group_projections(
    flow: Dataflow, layers: Iterable[QuantizedModule], owners: Owners
) -> Iterator[FusionReport]:
    """Group the layers that can be computed together.

    Args:
        flow: traces of the model.
        layers: quantized layers.
        owners: for each module's id, the (parent, attribute) pairs that hold the module.

    Yields:
        One report per group, and one per candidate set that was rejected.
    """
    wanted = {id(layer) for layer in layers}
    taken: set[int] = set()
    for members in _candidates(flow, wanted):
        if any(id(member) in taken for member in members):
            continue
        taken.update(map(id, members))
        names = tuple(flow.name(member) for member in members)
        codes, problem = _proof(flow, members, owners)
        if problem is None:
            _form(codes, members)
        action, reason = ("fused", "one product") if problem is None else ("not fused", problem)
        yield FusionReport("projections", names, "", action, reason)  # type: ignore[arg-type]
    yield from _unknown(flow, wanted, taken)


def group_again(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Form the groups of a saved model again, as far as the forward of this model permits them."""
    modules = dict(model.named_modules())
    named = [[modules[name] for name in group if name in modules] for group in groups]
    found = [tuple(m for m in group if isinstance(m, QuantizedModule)) for group in named]
    flow = Dataflow(model, [member for members in found for member in members])
    owners = owners_by_module(model)
    for members in found:
        if len(members) > 1 and all(member._group is None for member in members):
            codes, problem = _proof(flow, members, owners)
            if problem is None:
                _form(codes, members)


def groups_of(model: nn.Module) -> list[list[str]]:
    """The names of the layers of each group, in the order of their calls."""
    groups: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and module._group is not None:
            groups.setdefault(id(module._group), {})[module._group_index] = name
    return [[names[index] for index in sorted(names)] for names in groups.values()]


def _form(codes: Sequence[CodeType], members: Members) -> None:
    group = members[0].group_type(codes)
    for index, member in enumerate(members):
        group.join(index, member)


def _candidates(flow: Dataflow, wanted: set[int]) -> list[Members]:
    """Layers that a trace calls on the same tensor, in the order of calls; largest sets first."""
    found: dict[tuple[int, ...], Members] = {}
    for traces in flow.traces.values():
        for trace in traces:
            by_input: dict[fx.Node, list[Any]] = {}
            for node, module in trace.modules.items():
                sole = len(node.args) == 1 and not node.kwargs
                source = node.args[0] if sole else None
                known = isinstance(module, QuantizedModule) and id(module) in wanted
                known = known and module.group_type is not None
                if known and isinstance(source, fx.Node):
                    by_input.setdefault(source, []).append(module)
            for members in by_input.values():
                if len(members) > 1:
                    found.setdefault(tuple(map(id, members)), tuple(members))
    return sorted(found.values(), key=len, reverse=True)


def _proof(flow: Dataflow, members: Members, owners: Owners) -> tuple[list[CodeType], str | None]:
    """The code that calls each member, and the reason why they cannot be grouped, or None."""
    codes: list[CodeType] = []
    ids = [id(member) for member in members]
    if len(set(ids)) < len(ids):
        return codes, "a layer is called twice on the tensor"
    types = {member.group_type for member in members}
    if len(types) != 1 or None in types:
        return codes, "layers of these kinds cannot be computed together"
    problem = members[0].group_type.obstacle(members)
    if problem is not None:
        return codes, problem
    if any(len(owners.get(key, ())) != 1 for key in ids):
        return codes, "a layer is registered in more than one place"
    if any(map(has_hooks, members)):
        return codes, "hooks on a layer could change the tensor"
    callers = {id(caller) for member in members for caller in flow.callers.get(id(member), [])}
    if len(callers) != 1:
        return codes, "they are called by different modules"
    for trace in flow.traces[callers.pop()]:
        problem = _order(trace, ids, codes)
        if problem is not None:
            return codes, problem
    return codes, None


def _order(trace: Trace, ids: list[int], codes: list[CodeType]) -> str | None:
    """The reason why a trace does not permit the group, or None; sets ``codes`` if it is empty."""
    calls = [node for node, module in trace.modules.items() if id(module) in ids]
    if not calls and (trace.failure is None or _raises_when_run(trace)):
        return None
    if [id(trace.modules[node]) for node in calls] != ids:
        kind = type(trace.root).__name__
        return (
            "they are not called exactly once, in the same order, on every path"
            if trace.failure is None
            else f"{kind}.forward could not be traced ({trace.failure})"
        )
    seen = [trace.code[node] for node in calls]
    codes[:] = codes or seen
    if codes != seen:
        return "they are called from several places"
    if len({trace.modes[node] for node in calls}) > 1:
        return "torch's modes change between them"
    nodes = list(trace.graph.nodes)
    between = nodes[nodes.index(calls[0]) : nodes.index(calls[-1])]
    fresh: set[fx.Node] = set()  # made after the first call, from the layers' outputs alone
    for node in between:
        if node in calls or is_shape(node) or _from(node, fresh):
            fresh.add(node)
        elif not _only_reads(trace, node):
            return f"{_describe(trace, node)} between them could change the tensor"
    return None


def _raises_when_run(trace: Trace) -> bool:
    """True if the forward unpacks an argument that is None: it also fails with real tensors."""
    return "NoneType" in (trace.failure or "")


def _from(node: fx.Node, fresh: set[fx.Node]) -> bool:
    return bool(node.all_input_nodes) and all(
        source in fresh or is_shape(source) for source in node.all_input_nodes
    )


def _only_reads(trace: Trace, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = trace.modules[node]
        torchs = type(module).__module__.startswith("torch.nn.modules.")
        ours = isinstance(module, (QuantizedModule, FusedActivation))
        plain = not has_hooks(module)
        return (torchs or ours) and plain and not getattr(module, "inplace", False)
    if node.op in ("call_function", "call_method"):
        return _target(node) in _READING and "out" not in node.kwargs
    return True  # placeholders, attributes


def _target(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "?")


def _describe(trace: Trace, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{type(trace.modules[node]).__name__} ({node.target})"
    return _target(node)


def _unknown(flow: Dataflow, wanted: set[int], taken: set[int]) -> Iterator[FusionReport]:
    """Reports on layers of a module whose trace failed before it reached their calls."""
    by_caller: dict[int, list[QuantizedModule]] = {}
    for key in wanted - taken:
        for caller in flow.callers.get(key, []):
            module = next(m for m in caller.modules() if id(m) == key)
            if not isinstance(module, QuantizedModule) or module.group_type is None:
                continue
            if key not in flow.calls:
                by_caller.setdefault(id(caller), []).append(module)
    for caller_id, members in by_caller.items():
        failures = [t for t in flow.traces.get(caller_id, []) if t.failure is not None]
        alike = len({member.weight_shape[1:] for member in members}) < len(members)
        if failures and alike:
            order = [id(m) for m in failures[0].root.modules()]
            members.sort(key=lambda member: order.index(id(member)))
            kind = type(failures[0].root).__name__
            reason = f"{kind}.forward could not be traced ({failures[0].failure})"
            names = tuple(flow.name(member) for member in members)
            yield FusionReport("projections", names, "", "not fused", reason)
