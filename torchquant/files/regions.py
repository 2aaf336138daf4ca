"""The regions of a model in a file: what a first batch showed, so that load needs none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchquant.chains.first_batch import FirstBatch
from torchquant.chains.region import RegionForward
from torchquant.chains.root import SCALE, ZERO_POINT
from torchquant.configs import Float, Static
from torchquant.convert.regions import is_leaf, regions_in
from torchquant.files.fit import Misfit
from torchquant.graph.in_place import without_in_place
from torchquant.graph.trace import Call, Ref, Trace, Untraceable, trace
from torchquant.nn.base import QuantizedModule
from torchquant.training.calibration import observer_for

_WITH_TEXT: tuple[type, ...] = (bool, int, float, str, type(None), type(...))
_WITH_TEXT += (torch.dtype, torch.device, torch.memory_format)


def region_entries(model: nn.Module) -> dict[str, Any]:
    """The JSON values that a file stores for each region, by the name of its root.

    Example:
        >>> region_entries(nn.Sequential(nn.ReLU()))
        {}
    """
    names = {id(module): name for name, module in model.named_modules()}
    entries: dict[str, Any] = {}
    for region in regions_in(model):
        plan, facts = region.plan, region.facts
        if region.quantized and plan is not None and facts is not None:
            entries[names[id(region.root)]] = {
                "calls": [call.target for call in region.trace.calls],
                "arguments": [_described(call) for call in region.trace.calls],
                "result": _text(region.trace.result),
                "shapes": facts.shapes,
                "flops": facts.flops,
                "edges": len(plan.edges),
                "layers": dict(plan.layers),
            }
    return entries


def new_regions(stored: Any, model: nn.Module) -> list[RegionForward]:
    """Make the regions of a file for a model whose layers are already those of the file.

    The buffers of the scales are registered; they have no values yet. The regions are not installed
    yet, either.

    Raises:
        Misfit: a forward of the model is not the one that was saved.
    """
    if not isinstance(stored, Mapping):
        raise Misfit(f"regions must be a table, got {type(stored).__name__}")
    modules = dict(model.named_modules())
    return [_new_region(name, entry, modules.get(name)) for name, entry in stored.items()]


def _new_region(name: str, entry: Any, root: nn.Module | None) -> RegionForward:
    where = f"the forward of {name or 'the model'}"
    if root is None:
        raise Misfit(f"a region at {name!r} in the file, nothing in the model")
    try:
        calls, layers, edges = list(entry["calls"]), dict(entry["layers"]), int(entry["edges"])
        shapes = [None if shape is None else tuple(map(int, shape)) for shape in entry["shapes"]]
        flops = [int(count) for count in entry["flops"]]
    except (KeyError, TypeError, ValueError) as error:
        raise Misfit(f"the entry of region {name!r} is not valid ({error})") from None
    record = _traced(root, where)
    same = [call.target for call in record.calls] == calls
    if not same or not len(shapes) == len(calls) == len(flops):
        raise Misfit(f"{where} makes other calls than the one that was saved")
    _check_arguments(entry, record, where)
    activations: dict[str, Static] = {}
    outputs: dict[str, Static | Float] = {}
    for path in layers:
        layer = root.get_submodule(path)
        part = layer.config.activations if isinstance(layer, QuantizedModule) else None
        if not isinstance(part, Static):
            raise Misfit(f"{path!r} in {where} must be a layer with static activations")
        activations[path] = part
        output = layer.config.output if isinstance(layer, QuantizedModule) else None
        if output is not None:
            outputs[path] = output
    region = RegionForward(root, name, record, activations, observer_for, outputs=outputs)
    region.facts = FirstBatch.known(root, record, shapes, flops)
    region.set_plan(region.facts.plan(activations, outputs))
    plan = region.plan
    if plan is None or len(plan.edges) != edges or dict(plan.layers) != layers:
        found = 0 if plan is None else len(plan.edges)
        raise Misfit(f"{where} has {found} int8 values with a scale, {edges} in the file")
    device = next((buffer.device for buffer in root.buffers()), torch.device("cpu"))
    root.register_buffer(SCALE, torch.ones(edges, dtype=torch.float32, device=device))
    root.register_buffer(ZERO_POINT, torch.zeros(edges, dtype=torch.int32, device=device))
    return region


def _check_arguments(entry: Mapping[str, Any], record: Trace, where: str) -> None:
    """Compare the arguments of the calls; files of older versions do not have them."""
    saved = entry.get("arguments")
    if saved is None:
        return
    found = [_described(call) for call in record.calls]
    for index, call in enumerate(record.calls):
        text = saved[index] if isinstance(saved, list) and index < len(saved) else None
        if text != found[index]:
            raise Misfit(
                f"{where} makes call {index} ({call.target}) with the arguments {found[index]}, "
                f"the file with {text}"
            )
    if entry.get("result") != _text(record.result):
        raise Misfit(f"{where} returns other results than the one that was saved")


def _described(call: Call) -> str:
    """The arguments of a call as text; results of other calls are #index."""
    named = (f"{key}={_text(value)}" for key, value in call.kwargs.items())
    return f"({', '.join((*map(_text, call.args), *named))})"


def _text(value: Any) -> str:
    if isinstance(value, Ref):
        return f"#{value.index}"
    if isinstance(value, slice):
        return f"{_text(value.start)}:{_text(value.stop)}:{_text(value.step)}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return f"{left}{', '.join(map(_text, value))}{right}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    return repr(value) if isinstance(value, _WITH_TEXT) else type(value).__name__


def _traced(root: nn.Module, where: str) -> Trace:
    before = root.__dict__.pop("forward", None)
    try:
        return without_in_place(trace(root, is_leaf), root)
    except Untraceable as reason:
        raise Misfit(f"{where} cannot be followed: {reason}") from None
    finally:
        if before is not None:
            root.__dict__["forward"] = before
