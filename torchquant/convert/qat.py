"""prepare_qat_: the layers of a model train with the integers to deploy.

``prepare_qat_`` replaces every linear layer by a :class:`torchquant.nn.QATLinear` with the same
parameter objects, so that an existing optimizer, tie or distributed wrapper stays valid. Like every
verb, it changes the model only after all new layers have been created: an error leaves the model
unchanged.

The stages of training are in :mod:`torchquant.convert.stages`, the conversion to the quantized
model is in :mod:`torchquant.convert.convert`, and the one back to float in
:mod:`torchquant.convert.to_float`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.configs import QuantizationConfig, Static
from torchquant.convert.account import account_of
from torchquant.convert.activations import fuse_activations
from torchquant.convert.attention import Separated, separated
from torchquant.convert.batch_norms import Pair, folded_rows, pairs_to_fold
from torchquant.convert.calibration_hooks import hook_of
from torchquant.convert.fold_pairs import pairs_of
from torchquant.convert.notes import asked_problems, plan_notes, sentences
from torchquant.convert.plan import Step, check_model, check_strict, plan_layers
from torchquant.convert.regions import find, join_small_ones, region_reports, reports_of
from torchquant.convert.selection import FilterFn, Selection, selection
from torchquant.convert.training_regions import (
    cover_training,
    is_static,
    learn_sizes,
    without_training,
)
from torchquant.graph.modules import tensor_bytes
from torchquant.graph.order import in_order
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import Kind
from torchquant.ops._arguments import has_kernels
from torchquant.report import QuantizationReport, RegionReport
from torchquant.report.progress import track
from torchquant.training.configuration import TrainingConfig, training_config
from torchquant.training.layer_part import LayerPart

AnyConfig = QuantizationConfig | TrainingConfig

_IN_PLACE = "which cannot be replaced in place; use"


def prepare_qat_(
    model: nn.Module,
    config: AnyConfig | Mapping[str, AnyConfig | None] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    *,
    fold_batch_norms: bool = True,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> QuantizationReport:
    """Prepare a model's linear layers and convolutions for quantization-aware training, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QATLinear` with the same parameters, hooks
    and training mode, every ``nn.Conv2d`` a :class:`torchquant.nn.QATConv2d`, every ``nn.Conv1d`` a
    :class:`torchquant.nn.QATConv1d`. The forward of a layer is the computation of the converted
    layer, bit for bit. The layers are the ones that :func:`torchquant.quantize_` replaces; with
    static activations, small and depthwise convolutions are among them. A tied weight stays tied. A
    layer applies the ReLU module after it in calls where that module alone receives its output.
    Training then stores neither the layer's output nor the ReLU's output for the backward pass.

    An ``nn.Conv2d`` and the ``nn.BatchNorm2d`` that alone receives its output become one
    :class:`torchquant.nn.QATConvBn2d`, which is deployed as one convolution. An identity takes the
    place of the batch norm.

    With static activations, values stay int8 between the layers of the converted model, as after
    :func:`torchquant.prepare_`, wherever the forward that connects them can be followed in both
    modes. Training rounds these values, too: those that layers read with the layers'
    ``input_quantizer``, which layers that read one value share; others, such as the summands of an
    addition, with quantizers that the layers before them hold (``value_quantizers``). A dropout
    drops elements of rounded values. The report's ``regions`` say where values are int8. The first
    batch decides which ones, and then also runs in float, to compare; with ``example_inputs`` this
    happens here. If a model is compiled, loads a state dict and is converted at once, or trains
    under DistributedDataParallel with learned steps, pass ``example_inputs``.

    Layers that are already prepared stay unchanged, so several calls with different filters prepare
    layers with different numbers of bits.

    Args:
        model: any module that contains layers. A bare layer cannot be replaced in place: use
            ``from_float`` of its class, such as :meth:`torchquant.nn.QATLinear.from_float`.
        config: the configuration of the converted model, such as
            :func:`torchquant.Int8DynamicActivationInt8WeightConfig` (used for None) or
            :func:`torchquant.Int8StaticActivationInt8WeightConfig`; or a
            :func:`torchquant.QATConfig`, which adds the options of training. A dictionary gives
            layers different configurations, by name or pattern, as in :func:`quantize_`.
        filter_fn: selects the layers to prepare, including small ones: a function of
            ``(module, name)``, a name pattern or a list of patterns, as in :func:`quantize_`. None
            selects all layers except those that are too small to benefit.
        strict: if True, raise before anything is changed if something that was asked for cannot be
            done, as in :func:`quantize_`. False reports it.
        fold_batch_norms: False leaves each batch norm as it is: it then runs in float after the
            convolution, in training and in the converted model.
        example_inputs: a batch as :func:`torchquant.calibrate` takes it, or None.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module or is scripted, config is not a configuration, or filter_fn
            is neither callable nor patterns.
        ValueError: model is a bare layer; no layer can be trained for config; the model cannot be
            called with example_inputs; a pattern is empty; or, with ``strict``, something that was
            asked for cannot be done.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> import torch, torchquant
        >>> report = prepare_qat_(model, torchquant.QATConfig(weight_bits=4))
        >>> [(layer.name, layer.action) for layer in report.layers]
        [('0', 'prepared'), ('2', 'prepared')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> print(torchquant.convert_(model).summary().partition(";")[0])
        2 converted (100 % of parameters), 0 skipped
    """
    check_model(
        "prepare_qat_",
        model,
        trained="which is prepared already; use it as it is",
        quantized=f"{_IN_PLACE} its to_float() and then torchquant.nn.{{trained}}.from_float",
        floating=f"{_IN_PLACE} torchquant.nn.{{trained}}.from_float({{kind}}, config)",
    )
    chosen = selection(
        "prepare_qat_", filter_fn, config, lambda value: training_config("prepare_qat_", value)
    )
    with (
        without_training(model),
        separated(model, lambda: _plan(model, chosen)) as attention,
    ):
        return _prepare(
            model, chosen, attention, strict, fold_batch_norms, example_inputs, progress
        )


def _prepare(
    model: nn.Module,
    chosen: Selection[TrainingConfig],
    attention: Separated,
    strict: bool,
    fold_batch_norms: bool,
    example_inputs: Any,
    progress: bool | None,
) -> QuantizationReport:
    plan = attention.plan
    account = account_of(model, [step.module for step in plan])
    problems = asked_problems(model, plan, account, chosen)
    if strict:
        check_strict("prepare_qat_", plan, account.others, problems)
    static = {
        id(step.module)
        for step in plan
        if step.skip is None and isinstance(step.config.deployed().activations, Static)
    }
    recorded: list[tuple[nn.Module, nn.Module]] = []
    if static:
        found = find(model, lambda module: id(module) in static)
        join_small_ones(plan, found)
        every = pairs_of(model, found.regions, lambda layer: False)
        recorded = [(pair.layer, pair.norm) for pair in every if not pair.problem]
    steps = [step for step in plan if step.skip is None]
    edges, edge_notes = _edges(model, plan)
    pairs, folds = pairs_to_fold(model, steps, recorded) if fold_batch_norms else ({}, [])
    if example_inputs is not None:
        learn_sizes(model, example_inputs)  # can the model be called with them?
    new_layers: dict[int, TrainedModule] = {}
    for step in track(steps, "prepare_qat_", progress):
        edge, pair = edges.get(id(step.module)), pairs.get(id(step.module))
        config = edge.config if edge else step.config.inner()
        new_layers[id(step.module)] = _prepared(step, config, pair)
    bytes_before = tensor_bytes(model)
    attention.commit()
    rows = []  # from here on the model changes; nothing can fail
    for step in plan:
        edge, pair = edges.get(id(step.module)), pairs.get(id(step.module))
        new = new_layers.get(id(step.module))
        remarks = (edge.remark if edge else "", f"with {pair.name}" if pair else "")
        rows.append(step.replaced(new, "prepared", "; ".join(filter(None, remarks))))
        if pair is not None:
            pair.fold()
    names = {id(module): name for name, module in model.named_modules()}
    fusions = fuse_activations(model, new_layers.values(), names, only=("relu",))
    layers, others = account.filled(rows)
    others = folded_rows(others, pairs)
    regions: tuple[RegionReport, ...] = ()
    if any(is_static(module) for module in model.modules()):
        found = cover_training(model)
        if example_inputs is not None:
            learn_sizes(model, example_inputs)
        regions = region_reports(model, reports_of(found))
    general = (*sentences(problems), *plan_notes(model, plan, account, "prepare"))
    notes = (*general, *_notes(plan), *edge_notes, *attention.notes(optimizer=True))
    return QuantizationReport(
        layers,
        bytes_before,
        tensor_bytes(model),
        notes,
        (*folds, *fusions),
        "prepared",
        others,
        regions,
    )


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Edge:
    """The configuration of a layer, and the remark on it in the report."""

    config: TrainingConfig
    remark: str = ""


def _plan(model: nn.Module, chosen: Selection[TrainingConfig]) -> list[Step]:
    def done(step: Step) -> str | None:
        module: Any = step.module
        if hook_of(module) is not None:
            return "prepared for calibration; to_float_(model) takes that back"
        if isinstance(module, QuantizedModule):
            return "already quantized; to_float_(model) makes it trainable again"
        config = chosen.config_of(step.names)[1]
        other = "" if config is None or module.config == config else ", with another configuration"
        return f"already prepared{other}"

    def refusal(step: Step) -> str | None:
        module, kind, config = step.module, step.kind, step.config
        if kind.trained is None:
            return f"{kind.name} layers cannot be trained for quantization"
        refused = kind.refusal(module) or kind.trained.config_refusal(config)
        refused = refused or kind.config_refusal(config.deployed(), module)
        if refused is not None:
            return refused
        weight = module._parameters["weight"]
        if config.simulate and weight is not None and not (has_kernels(weight) or weight.is_meta):
            return None  # the simulation runs on any device
        return kind.value_refusal(module)

    steps = plan_layers(model, chosen, done, refusal)
    for step in steps:
        if step.skip is None and step.reads is not None and step.reads.values:
            step.refusal = f"{step.reads.remark}, so training would not see the quantized one"
    return steps


def _edges(model: nn.Module, plan: list[Step]) -> tuple[dict[int, _Edge], list[str]]:
    """The configurations of the first and the last layer, by id, and notes on these layers."""
    if not any(step.config is not None and step.config.edge_bits is not None for step in plan):
        return {}, []
    modules = [step.module for step in plan]
    order, problem = in_order(model, modules)
    if not order:
        order, problem = modules, problem or "no forward calls the layers"
    remarks: dict[int, list[str]] = {}
    for place, module in (("first", order[0]), ("last", order[-1])):
        remarks.setdefault(id(module), []).append(place)
    edges = {}
    for step in plan:
        config, places = step.config, remarks.get(id(step.module))
        if places and config is not None and config.edge_bits is not None:
            remark = f"{' and '.join(places)} layer, {config.edge_bits} bits"
            edges[id(step.module)] = _Edge(config.edge(), remark)
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


def _notes(plan: list[Step]) -> Iterator[str]:
    steps = [step for step in plan if step.skip is None]
    tied = [step.name for step in steps if step.tied]
    if tied:
        yield (
            "Shares its weight with another module during training, and gets its own integers in "
            f"convert_: {', '.join(tied)}."
        )
    if any(step.config.learned for step in steps):
        yield (
            "Learned steps are new parameters: create the optimizer now, with "
            "torchquant.parameter_groups(model, weight_decay)."
        )


# ---------------------------------------------------------------- the new layers


def _trained(kind: Kind) -> type[TrainedModule]:
    assert kind.trained is not None  # other kinds are skipped
    return kind.trained


def _prepared(step: Step, config: TrainingConfig, pair: Pair | None) -> TrainedModule:
    new: TrainedModule
    if pair is None:
        new = _trained(step.kind).from_float(step.module, config)
    else:
        new = step.kind.trained_with_norm.from_float(step.module, pair.norm, config)
    for part in new.modules():
        if isinstance(part, LayerPart):
            part.set_layer_name(step.name)
    return new


__all__ = ["prepare_qat_"]
