"""Which int8 values a region observes itself, because no layer's hook sees all of them."""

from __future__ import annotations

from torchquant.chains.operations import Flatten, Layer, Operation, Other, Upsample
from torchquant.chains.plan import Plan
from torchquant.graph.trace import Trace, refs


def observed_points(trace: Trace, plan: Plan) -> dict[int, int]:
    """The values to observe, with their edges.

    They are the values of edges that no layer reads, such as summands, and values that a layer
    reads only through a maximum: where something else reads them too, their range counts, not only
    that of their maxima.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchquant.chains.first_batch import FirstBatch
        >>> from torchquant.configs import Static
        >>> from torchquant.graph.trace import trace
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(1, 1, 1)
        ...     def forward(self, x):
        ...         return self.conv(torch.max_pool2d(x, 2)), x.sum()
        >>> net = Net()
        >>> record = trace(net, lambda module: True)
        >>> facts = FirstBatch(net, record)
        >>> facts.compare(net.forward, [torch.ones(1, 1, 2, 2)])
        ''
        >>> observed_points(record, facts.plan({"conv": Static()}))
        {0: 0}
    """
    by_layers = set(plan.layers.values())
    points = {index: plan.edge_of[index] for index in sorted(plan.points)}
    return {
        index: edge
        for index, edge in points.items()
        if edge not in by_layers or not _is_seen(index, trace, plan)
    }


def _is_seen(index: int, trace: Trace, plan: Plan) -> bool:
    """True if the hook of a layer sees a value, or if only its maxima matter."""
    readers = _readers(index, trace, plan)
    if any(isinstance(reader, Layer) for _, reader in readers):
        return True
    return bool(readers) and all(
        place in plan.edge_of and plan.edge_of[place] == plan.edge_of[index] for place, _ in readers
    )


def _readers(index: int, trace: Trace, plan: Plan) -> list[tuple[int, Operation | None]]:
    """The calls that read a value, or the same values in another shape; None for the result."""
    found: list[tuple[int, Operation | None]] = []
    for place in sorted(plan.live):
        if index not in {plan.sources[read] for read in trace.calls[place].reads()}:
            continue
        operation = plan.operations[place]
        if isinstance(operation, Other) and operation.quiet:
            continue
        same = isinstance(operation, (Flatten, Upsample)) and place in plan.edge_of
        found += _readers(place, trace, plan) if same else [(place, operation)]
    if index in {plan.sources[read] for read in refs(trace.result)}:
        found.append((len(trace.calls), None))
    return found
