"""Quantization-aware training: prepare, train in stages, convert; and the way back.

``prepare_qat_`` puts a :class:`torchquant.nn.QATLinear` in place of every linear layer, on the very
same parameters, so that an optimizer, a tie or a distributed wrapper made before stays valid. Like
every verb it plans first and changes the model only once all new layers exist: an error leaves the
model as it was.

Stages of training are in :mod:`torchquant.convert.stages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from torchquant.configs import Config, QATConfig
from torchquant.convert.activations import absorb, find_relus
from torchquant.convert.plan import (
    FilterFn,
    Step,
    check_filter,
    check_model,
    check_strict,
    features,
    find_layers,
    linear_like,
    plan_layers,
)
from torchquant.convert.projections import group_projections
from torchquant.convert.stages import QATSchedule, freeze, observe, quantize
from torchquant.graph.dataflow import Dataflow
from torchquant.graph.modules import owners_by_module, replace_module, tensor_bytes
from torchquant.nn.fused import FusedActivation
from torchquant.nn.linear import QuantizedLinear, refusal, value_refusal
from torchquant.nn.qat_linear import QATLinear, qat_config
from torchquant.ops._arguments import has_kernels
from torchquant.report import Action, FusionReport, LayerReport, QuantizationReport
from torchquant.scheme import MAX_BITS
from torchquant.training.layer_part import LayerPart

_IN_PLACE = "which cannot be replaced in place; use"
_BARE_FOR_PREPARE: dict[type[nn.Module], str] = {
    QATLinear: "which is prepared already; use it as it is",
    QuantizedLinear: f"{_IN_PLACE} its to_float() and then torchquant.nn.QATLinear.from_float",
    nn.Linear: f"{_IN_PLACE} torchquant.nn.QATLinear.from_float(linear, config)",
}
_BARE_FOR_CONVERT: dict[type[nn.Module], str] = {QATLinear: f"{_IN_PLACE} its to_quantized()"}
_BARE_TO_FLOAT: dict[type[nn.Module], str] = {
    QATLinear: f"{_IN_PLACE} its to_float()",
    QuantizedLinear: f"{_IN_PLACE} its to_float()",
}


def prepare_qat_(
    model: nn.Module,
    config: Config | QATConfig | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
) -> QuantizationReport:
    """Make a model's linear layers trainable for quantization, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QATLinear` on the same parameters, hooks and
    training mode included, whose forward is the computation of the converted layer, bit for bit.
    Which layers are taken is what :func:`torchquant.quantize_` takes; a tied weight stays tied. A
    ReLU module that is the only reader of a layer's output moves into the layer, so that training
    saves neither the layer's output nor the ReLU's.

    Layers that are prepared already are left alone, so several calls with filters of their own give
    layers of different widths.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place:
            use :meth:`torchquant.nn.QATLinear.from_float`.
        config: the configuration that the converted model is to have, such as
            :class:`torchquant.Int8DynamicActivationInt8WeightConfig` (None) or
            :class:`torchquant.Int8StaticActivationInt8WeightConfig`; or a
            :class:`torchquant.QATConfig`, for learned steps and all else that training can choose.
        filter_fn: called with each linear-like layer and each of its names; true asks for it, also
            where it is too small to gain. None asks for all but those.
        strict: raise, before anything is changed, where a layer that was asked for cannot be
            prepared.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model, config or filter_fn is not what it must be.
        ValueError: the model is a bare linear layer; a configuration that training cannot reach;
            or, with ``strict``, the layers and reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> report = prepare_qat_(model, QATConfig(weight_bits=4))
        >>> [(layer.name, layer.action) for layer in report.layers]
        [('0', 'prepared'), ('2', 'prepared')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
        >>> import torch
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> print(convert_(model).summary().partition(";")[0])
        2 converted, 0 skipped
    """
    check_model("prepare_qat_", model, _BARE_FOR_PREPARE)
    check_filter("prepare_qat_", filter_fn)
    config = qat_config("prepare_qat_", config)
    plan = _plan(model, config, filter_fn)
    if strict:
        check_strict("prepare_qat_", plan)
    steps = [step for step in plan if step.skip is None]
    flow = Dataflow(model, [step.module for step in plan])
    edges, edge_notes = _edges(flow, model, plan, config)
    owners = owners_by_module(model)
    relus, fusions = find_relus(flow, [step.module for step in steps], owners)
    inner = _Edge(replace(config, edge_bits=None))
    new_layers = {
        id(step.module): _prepared(step, edges.get(id(step.module), inner).config) for step in steps
    }
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes, and nothing can fail
    for step in plan:
        edge = edges.get(id(step.module))
        new = new_layers.get(id(step.module))
        rows.append(_replace(step, new, "prepared", edge.remark if edge else ""))
    for relu, linears in relus:
        for linear in linears:
            new_layers[id(linear)].activation = "relu"
        absorb(relu, "relu", owners)
    notes = (*_notes(plan, config), *edge_notes)
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, tuple(fusions), "prepared"
    )


def convert_(model: nn.Module) -> QuantizationReport:
    """Turn a prepared model into the one to ship, in place.

    Every :class:`torchquant.nn.QATLinear` becomes the :class:`torchquant.nn.QuantizedLinear` whose
    computation it trained with; in eager mode the model's outputs in evaluation mode keep their
    bits (:func:`torchquant.verify` shows it). Layers on one tensor are computed together, as
    :func:`torchquant.quantize_` has it, which changes no bit either.

    Args:
        model: a model that :func:`prepare_qat_` prepared. A bare ``QATLinear`` cannot be replaced
            in place: use its ``to_quantized()``.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, or a scripted one.
        ValueError: the model is a bare layer, holds no prepared one, or a layer cannot be
            converted (nothing was observed yet, say); the message names it, and the model is as it
            was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = prepare_qat_(model)
        >>> print(convert_(model).layers[0].action, type(model[0]).__name__)
        converted QuantizedLinear
    """
    check_model("convert_", model, _BARE_FOR_CONVERT)
    plan = find_layers(
        model, lambda m: linear_like(m) or isinstance(m, (QATLinear, QuantizedLinear))
    )
    steps = [step for step in plan if isinstance(step.module, QATLinear)]
    if not steps:
        raise ValueError(
            "convert_: model must hold layers that prepare_qat_ prepared, got none; call "
            "prepare_qat_(model, config) and train first, or quantize_(model, config) to quantize "
            "without training"
        )
    for step in plan:
        if isinstance(step.module, QuantizedLinear):
            step.leave = "already quantized"
        elif not isinstance(step.module, QATLinear):
            step.leave = "not prepared"
    new_layers = {id(step.module): _converted(step) for step in steps}
    notes = tuple(_conversion_notes(steps))
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes, and nothing can fail
    for step in plan:
        rows.append(_replace(step, new_layers.get(id(step.module)), "converted", _untied(step)))
    fusions = tuple(_together(model, list(new_layers.values())))
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, fusions, "converted"
    )


def to_float(model: nn.Module) -> QuantizationReport:
    """Turn prepared or quantized layers back into ``nn.Linear``, in place.

    A :class:`torchquant.nn.QATLinear` gives the parameters that it trained, the same objects; a
    :class:`torchquant.nn.QuantizedLinear` gives the values that its integers stand for. Activation
    modules that had become part of a layer are put back.

    Args:
        model: a model with such layers. A bare layer cannot be replaced in place: use its
            ``to_float()``.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, or a scripted one.
        ValueError: the model is a bare layer, or a layer computes an activation for which the model
            holds no module to put back; the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> weight = model[0].weight
        >>> _ = prepare_qat_(model)
        >>> _ = to_float(model)
        >>> model[0].weight is weight, model
        (True, Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
          (1): ReLU()
        ))
    """
    check_model("to_float", model, _BARE_TO_FLOAT)
    steps = find_layers(model, lambda module: isinstance(module, (QATLinear, QuantizedLinear)))
    places = [module for module in model.modules() if isinstance(module, FusedActivation)]
    known = {place.activation for place in places}
    for step in steps:
        computed = getattr(step.module, "activation")  # noqa: B009
        if computed != "none" and computed not in known:
            raise ValueError(
                "to_float: each activation that a layer computes must have been a module of the "
                f"model, got {step.name}, which computes {computed} and was made so; replace it "
                "yourself by its to_float() and the activation"
            )
    new_layers = {id(step.module): step.module.to_float() for step in steps}  # type: ignore[operator]
    owners = owners_by_module(model)
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes, and nothing can fail
    for step in steps:
        rows.append(_replace(step, new_layers[id(step.module)], "restored"))
    for place in places:
        for parent, attribute in owners[id(place)]:
            parent._modules[attribute] = place.original.train(place.training)
    notes = () if steps else ("The model has no prepared or quantized layers; nothing was done.",)
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, action="restored"
    )


# ---------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Edge:
    """What a layer is prepared with, and what the report says of it."""

    config: QATConfig
    remark: str = ""


def _plan(model: nn.Module, config: QATConfig, filter_fn: FilterFn | None) -> list[Step]:
    def done(module: nn.Module) -> str | None:
        if isinstance(module, QATLinear):
            other = "" if module.config == config else ", with another configuration"
            return f"already prepared{other}"
        if isinstance(module, QuantizedLinear):
            return "quantized already; to_float(model) makes it trainable again"
        return None

    def refused(module: nn.Module) -> str | None:
        reason = refusal(module)
        if reason is not None:
            return reason
        weight = module._parameters["weight"]
        if config.simulate and weight is not None and not (has_kernels(weight) or weight.is_meta):
            return None  # computes anywhere
        return value_refusal(module)

    return plan_layers(model, filter_fn, done, refused)


def _edges(
    flow: Dataflow, model: nn.Module, plan: list[Step], config: QATConfig
) -> tuple[dict[int, _Edge], list[str]]:
    """What the first and the last layer are prepared with, by their ids, and notes on them."""
    if config.edge_bits is None or not plan:
        return {}, []
    modules = [step.module for step in plan]
    order, problem = flow.in_order(model, modules)
    if not order:
        order, problem = modules, problem or "no forward calls the layers"
    bits = config.edge_bits
    # LSQ's first step, 2 mean|w| / sqrt(Qp), is six times a channel's own at 8 bits.
    learned = config.learned_weights and bits < MAX_BITS
    edge = replace(
        config,
        weight_bits=bits,
        activation_bits=bits,
        learned_weights=learned,
        edge_bits=None,
    )
    remarks: dict[int, list[str]] = {}
    for place, module in (("first", order[0]), ("last", order[-1])):
        remarks.setdefault(id(module), []).append(place)
    edges = {
        key: _Edge(edge, f"{' and '.join(places)} layer, {bits} bits")
        for key, places in remarks.items()
    }
    notes = [
        f"{step.name} is the model's {' and '.join(remarks[id(step.module)])} linear layer and "
        f"keeps what it has: {step.skip}."
        for step in plan
        if id(step.module) in remarks and step.skip
    ]
    if problem is not None:
        notes.append(f"First and last layer are by the order of modules in part: {problem}.")
    return edges, notes


def _notes(plan: list[Step], config: QATConfig) -> Iterator[str]:
    steps = [step for step in plan if step.skip is None]
    if not plan:
        yield "The model has no linear layers; there was nothing to prepare."
    tied = [step.name for step in steps if step.tied]
    if tied:
        yield (
            "Trained together with what shares its weight, with integers of its own once "
            f"converted: {', '.join(tied)}."
        )
    if steps and (config.learned_weights or config.learned_activations):
        yield (
            "Learned steps are new parameters: make the optimizer now, with "
            "torchquant.parameter_groups(model, weight_decay)."
        )


def _conversion_notes(steps: list[Step]) -> Iterator[str]:
    floating = [step.name for step in steps if not bool(_layer(step).quantize_enabled)]
    if floating:
        yield (
            "Converted in the first stage, in which training computed in float: "
            f"{', '.join(floating)}."
        )
    simulated = [step.name for step in steps if _layer(step).simulate]
    if simulated:
        yield (
            "Trained with a simulation in float, from which the integers differ by rounding: "
            f"{', '.join(simulated)}."
        )
    untied = [step.name for step in steps if step.tied]
    if untied:
        yield f"Untied from a shared weight, with an int8 copy of their own: {', '.join(untied)}."


def _untied(step: Step) -> str:
    return "untied" if step.tied else ""


# ---------------------------------------------------------------- carrying out


def _layer(step: Step) -> QATLinear:
    assert isinstance(step.module, QATLinear)
    return step.module


def _prepared(step: Step, config: QATConfig) -> QATLinear:
    linear = step.module
    assert isinstance(linear, nn.Linear)
    new = QATLinear.from_float(linear, config)
    for part in new.modules():
        if isinstance(part, LayerPart):
            part.set_layer_name(step.name)
    return new


def _converted(step: Step) -> QuantizedLinear:
    try:
        return _layer(step).to_quantized()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"convert_: {step.name} cannot be converted: {error}") from error


def _replace(step: Step, new: nn.Module | None, action: Action, remark: str = "") -> LayerReport:
    if new is None:
        return step.skipped()
    old, before = step.module, tensor_bytes(step.module)
    replace_module(step.owners, old, new)
    step.module = new
    sizes = (*features(new), before, tensor_bytes(new))
    return LayerReport(step.name, type(old).__name__, action, step.remark(remark), *sizes)


def _together(model: nn.Module, layers: Iterable[QuantizedLinear]) -> Iterator[FusionReport]:
    layers = list(layers)
    yield from group_projections(Dataflow(model, layers), layers, owners_by_module(model))


__all__ = [
    "QATSchedule",
    "convert_",
    "freeze",
    "observe",
    "prepare_qat_",
    "quantize",
    "to_float",
]
