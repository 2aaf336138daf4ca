"""The largest parts of a model whose forward can be recorded as a list of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from torchquant.graph.in_place import without_in_place
from torchquant.graph.modules import is_container
from torchquant.graph.trace import Trace, Untraceable, trace

Test = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Region:
    """A module whose forward was recorded.

    Args:
        path: its name in the model; the model itself has the name "".
        module: the module.
        trace: the calls of its forward.
    """

    path: str
    module: nn.Module
    trace: Trace


@dataclass(frozen=True)
class Refusal:
    """A module that holds layers of interest, and why its forward was not recorded."""

    path: str
    module: nn.Module
    reason: str


def find_regions(
    model: nn.Module,
    wanted: Test,
    is_leaf: Test,
    check: Callable[[nn.Module, Trace], None] | None = None,
) -> tuple[list[Region], list[Refusal]]:
    """Find the modules to record: the model itself if possible, otherwise the largest below it.

    Args:
        model: the model; no tensor is computed.
        wanted: takes a module; True for the layers for which regions are looked for. A module
            without such a layer is no region.
        is_leaf: takes a module; True if a call of it is one entry of a record.
        check: takes a module and its record; raises Untraceable if the module cannot be a region.

    Returns:
        The regions, and the refused modules whose children were tried instead.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        ...     def forward(self, x):
        ...         return self.body(x) if x.sum() > 0 else x
        >>> test = lambda module: isinstance(module, (nn.Linear, nn.ReLU))
        >>> regions, refusals = find_regions(Net(), test, test)
        >>> [region.path for region in regions], refusals[0].reason
        (['body'], 'what its forward does depends on values or shapes of its input')
    """
    regions: list[Region] = []
    refusals: list[Refusal] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen or is_leaf(module):
            return
        seen.add(id(module))
        layers = {id(child) for child in module.modules() if wanted(child)}
        if not layers:
            return
        if not is_container(module):
            try:
                found = without_in_place(trace(module, is_leaf), module)
                if check is not None:
                    check(module, found)
            except Untraceable as reason:
                refusals.append(Refusal(path, module, str(reason)))
            else:
                called = [
                    module.get_submodule(call.target)
                    for call in found.calls
                    if call.kind == "module"
                ]
                if any(id(child) in layers for child in called):
                    regions.append(Region(path, module, found))
                    seen.update(id(child) for child in module.modules())
                    return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return regions, refusals
