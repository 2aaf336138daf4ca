"""Quantization-aware training: prepare a model, train it in stages, convert it.

``prepare_qat_`` replaces every linear layer by a :class:`torchquant.nn.QATLinear` with the same
parameter objects, so that an existing optimizer, tie or distributed wrapper stays valid. Like every
verb, it changes the model only after all new layers have been created: an error leaves the model
unchanged.

The stages of training are in :mod:`torchquant.convert.stages`, the conversion back to float is in
:mod:`torchquant.convert.to_float`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.configs import QuantizationConfig
from torchquant.convert.activations import fuse_activations
from torchquant.convert.plan import (
    FilterFn,
    Step,
    check_filter,
    check_model,
    check_strict,
    find_layers,
    no_layers,
    plan_layers,
)
from torchquant.convert.projections import group_projections
from torchquant.graph.modules import tensor_bytes
from torchquant.graph.order import in_order
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import Kind
from torchquant.ops._arguments import has_kernels
from torchquant.report import FusionReport, QuantizationReport
from torchquant.training.configuration import TrainingConfig, training_config
from torchquant.training.layer_part import LayerPart

_IN_PLACE = "which cannot be replaced in place; use"


def prepare_qat_(
    model: nn.Module,
    config: QuantizationConfig | TrainingConfig | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
) -> QuantizationReport:
    """Prepare a model's linear layers for quantization-aware training, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QATLinear` with the same parameters, hooks
    and training mode. Its forward is the computation of the converted layer, bit for bit. The
    layers are the ones that :func:`torchquant.quantize_` replaces; a tied weight stays tied. A ReLU
    module moves into the layer if it alone uses the layer's output. Training then stores neither
    the layer's output nor the ReLU's output for the backward pass.

    Layers that are already prepared stay unchanged, so several calls with different filters prepare
    layers with different numbers of bits.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place:
            use :meth:`torchquant.nn.QATLinear.from_float`.
        config: the configuration of the converted model, such as
            :func:`torchquant.Int8DynamicActivationInt8WeightConfig` (used for None) or
            :func:`torchquant.Int8StaticActivationInt8WeightConfig`; or a
            :func:`torchquant.QATConfig`, which adds the options of training.
        filter_fn: called with each linear-like layer and each of its names; returns True for layers
            to prepare, including small ones. None selects all layers except those that are too
            small to benefit.
        strict: if True, raise before anything is changed if a selected layer cannot be prepared.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module or is scripted, config is not a configuration, or filter_fn
            is not callable.
        ValueError: model is a bare linear layer; no layer can be trained for config; or, with
            ``strict``, a selected layer cannot be prepared.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> import torch, torchquant
        >>> report = prepare_qat_(model, torchquant.QATConfig(weight_bits=4))
        >>> [(layer.name, layer.action) for layer in report.layers]
        [('0', 'prepared'), ('2', 'prepared')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> print(convert_(model).summary().partition(";")[0])
        2 converted, 0 skipped
    """
    check_model(
        "prepare_qat_",
        model,
        trained="which is prepared already; use it as it is",
        quantized=f"{_IN_PLACE} its to_float() and then torchquant.nn.{{trained}}.from_float",
        floating=f"{_IN_PLACE} torchquant.nn.{{trained}}.from_float({{kind}}, config)",
    )
    check_filter("prepare_qat_", filter_fn)
    config = training_config("prepare_qat_", config)
    plan = _plan(model, config, filter_fn)
    if strict:
        check_strict("prepare_qat_", plan)
    steps = [step for step in plan if step.skip is None]
    edges, edge_notes = _edges(model, plan, config)
    inner = _Edge(config.inner())
    new_layers = {
        id(step.module): _prepared(step, edges.get(id(step.module), inner).config) for step in steps
    }
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes; nothing can fail
    for step in plan:
        edge = edges.get(id(step.module))
        new = new_layers.get(id(step.module))
        rows.append(step.replaced(new, "prepared", edge.remark if edge else ""))
    names = {id(module): name for name, module in model.named_modules()}
    fusions = fuse_activations(model, new_layers.values(), names, only=("relu",))
    notes = (*_notes(plan, config), *edge_notes)
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, tuple(fusions), "prepared"
    )


def convert_(model: nn.Module) -> QuantizationReport:
    """Convert a prepared model into the quantized model to deploy, in place.

    Every :class:`torchquant.nn.QATLinear` becomes the :class:`torchquant.nn.QuantizedLinear` with
    whose computation it was trained. In eager mode, the outputs of the model in evaluation mode
    keep their bits (:func:`torchquant.verify` checks this). As in :func:`torchquant.quantize_`,
    layers that are applied to the same tensor are computed together, which changes no bits.

    Args:
        model: a model that :func:`prepare_qat_` prepared. A bare ``QATLinear`` cannot be replaced
            in place: use its ``to_quantized()``.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, or is a scripted module.
        ValueError: model is a bare layer, contains no prepared layer, or contains a layer that
            cannot be converted, for example because no range was observed. The message names the
            layer; the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = prepare_qat_(model)
        >>> print(convert_(model).layers[0].action, type(model[0]).__name__)
        converted QuantizedLinear
    """
    check_model("convert_", model, trained=f"{_IN_PLACE} its to_quantized()")
    plan = find_layers(model)
    steps = [step for step in plan if isinstance(step.module, TrainedModule)]
    if not steps:
        raise ValueError(
            "convert_: model must hold layers that prepare_qat_ prepared, got none; call "
            "prepare_qat_(model, config) and train first, or quantize_(model, config) to quantize "
            "without training"
        )
    for step in plan:
        if isinstance(step.module, QuantizedModule):
            step.leave = "already quantized"
        elif not isinstance(step.module, TrainedModule):
            step.leave = "not prepared"
    new_layers = {id(step.module): _converted(step) for step in steps}
    notes = tuple(_conversion_notes(steps))
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes; nothing can fail
    for step in plan:
        new = new_layers.get(id(step.module))
        fused = step.module._fuses_activation if new is not None else False
        rows.append(step.replaced(new, "converted", "untied" if step.tied else ""))
        if new is not None:
            new.fuse_activation(bool(fused))
    fusions = tuple(_together(model, list(new_layers.values())))
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, fusions, "converted"
    )


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Edge:
    """The configuration of a layer, and the remark on it in the report."""

    config: TrainingConfig
    remark: str = ""


def _plan(model: nn.Module, config: TrainingConfig, filter_fn: FilterFn | None) -> list[Step]:
    def done(module: Any) -> str | None:
        if isinstance(module, QuantizedModule):
            return "already quantized; to_float_(model) makes it trainable again"
        other = "" if module.config == config else ", with another configuration"
        return f"already prepared{other}"

    def refusal(module: nn.Module, kind: Kind) -> str | None:
        if kind.trained is None:
            return f"{kind.name} layers cannot be trained for quantization"
        refused = kind.refusal(module) or kind.trained.config_refusal(config)
        if refused is not None:
            return refused
        weight = module._parameters["weight"]
        if config.simulate and weight is not None and not (has_kernels(weight) or weight.is_meta):
            return None  # the simulation runs on any device
        return kind.value_refusal(module)

    steps = plan_layers(model, filter_fn, done, refusal)
    for step in steps:
        if step.skip is None and step.reads is not None and step.reads.values:
            step.refusal = f"{step.reads.remark}, so training would not see the quantized one"
    return steps


def _edges(
    model: nn.Module, plan: list[Step], config: TrainingConfig
) -> tuple[dict[int, _Edge], list[str]]:
    """The configurations of the first and the last layer, by id, and notes on these layers."""
    if config.edge_bits is None or not plan:
        return {}, []
    modules = [step.module for step in plan]
    order, problem = in_order(model, modules)
    if not order:
        order, problem = modules, problem or "no forward calls the layers"
    edge = config.edge()
    remarks: dict[int, list[str]] = {}
    for place, module in (("first", order[0]), ("last", order[-1])):
        remarks.setdefault(id(module), []).append(place)
    edges = {
        key: _Edge(edge, f"{' and '.join(places)} layer, {config.edge_bits} bits")
        for key, places in remarks.items()
    }
    notes = [
        f"{step.name} is the model's {' and '.join(remarks[id(step.module)])} {step.kind.name} "
        f"layer but is left unchanged: {step.skip}."
        for step in plan
        if id(step.module) in remarks and step.skip
    ]
    if problem is not None:
        notes.append(
            "The first and the last layer were determined in part from the order of modules: "
            f"{problem}."
        )
    return edges, notes


def _notes(plan: list[Step], config: TrainingConfig) -> Iterator[str]:
    steps = [step for step in plan if step.skip is None]
    if not plan:
        yield no_layers("prepare")
    tied = [step.name for step in steps if step.tied]
    if tied:
        yield (
            "Shares its weight with another module during training, and gets its own integers in "
            f"convert_: {', '.join(tied)}."
        )
    if steps and config.learned:
        yield (
            "Learned steps are new parameters: create the optimizer now, with "
            "torchquant.parameter_groups(model, weight_decay)."
        )


def _conversion_notes(steps: list[Step]) -> Iterator[str]:
    floating = [step.name for step in steps if not bool(_layer(step).quantize_enabled)]
    if floating:
        yield (
            "Converted in the stage 'observe', in which layers compute in float: "
            f"{', '.join(floating)}."
        )
    simulated = [step.name for step in steps if _layer(step).simulate]
    if simulated:
        yield (
            "Trained with a simulation in float, whose results differ from the integers by "
            f"rounding: {', '.join(simulated)}."
        )
    called = {step.name: _layer(step).was_called for step in steps}
    never = [name for name, was_called in called.items() if was_called is False]
    if never and any(called.values()):
        yield (
            "Not called by any forward since prepare_qat_, so not trained with the integers: "
            f"{', '.join(never)}."
        )
    untied = [step.name for step in steps if step.tied]
    if untied:
        yield f"No longer shares its weight; has its own integer copy: {', '.join(untied)}."


# ---------------------------------------------------------------- the new layers


def _layer(step: Step) -> TrainedModule:
    assert isinstance(step.module, TrainedModule)
    return step.module


def _trained(kind: Kind) -> type[TrainedModule]:
    assert kind.trained is not None  # other kinds are skipped
    return kind.trained


def _prepared(step: Step, config: TrainingConfig) -> TrainedModule:
    new: TrainedModule = _trained(step.kind).from_float(step.module, config)
    for part in new.modules():
        if isinstance(part, LayerPart):
            part.set_layer_name(step.name)
    return new


def _converted(step: Step) -> QuantizedModule:
    try:
        return _layer(step).to_quantized()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"convert_: {step.name} cannot be converted: {error}") from error


def _together(model: nn.Module, layers: Iterable[QuantizedModule]) -> Iterator[FusionReport]:
    names = {id(module): name for name, module in model.named_modules()}
    yield from group_projections(model, layers, names)


__all__ = ["convert_", "prepare_qat_"]
