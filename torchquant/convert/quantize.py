"""quantize_: plan, check the plan, then replace the layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from torchquant.configs import Fusion, QuantizationConfig, check_config, check_fusion
from torchquant.convert.account import Account, account_of
from torchquant.convert.activations import fuse_activations
from torchquant.convert.adjustment import adjustment_problem, apply_adjustment
from torchquant.convert.attention import separated
from torchquant.convert.calibration_hooks import hook_of
from torchquant.convert.notes import asked_problems, plan_notes, sentences, untied_note
from torchquant.convert.plan import Step, check_model, check_strict, plan_layers
from torchquant.convert.projections import group_projections
from torchquant.convert.regions import kept
from torchquant.convert.selection import FilterFn, Selection, selection
from torchquant.convert.tables import Shared
from torchquant.graph.modules import tensor_bytes
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.report import FusionReport, LayerReport, QuantizationReport
from torchquant.report.progress import track
from torchquant.training.configuration import TrainingConfig


def quantize_(
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    *,
    fusion: Fusion | None = None,
    progress: bool | None = None,
) -> QuantizationReport:
    """Quantize a model's linear layers, convolutions and embeddings, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QuantizedLinear` with the same hooks, or a
    :class:`torchquant.nn.QuantizedIntxLinear` if the configuration has weights of fewer bits or in
    groups, or float activations. Every ``nn.Conv2d`` becomes a
    :class:`torchquant.nn.QuantizedConv2d`, every ``nn.Conv1d`` a
    :class:`torchquant.nn.QuantizedConv1d`. Every parameter of the model is in one row of the
    report. Layers of these kinds that stay in float have a reason: subclasses, weights computed
    from other tensors, layers whose weight is read by another module, adapters that are being
    trained, layers too small to benefit, depthwise convolutions, which dynamic activations make no
    faster. Layers that are already quantized are left unchanged. Modules of other kinds (transposed
    and three-dimensional convolutions, recurrent layers, experts in one parameter, norms) stay in
    float and are in the report's ``others``.

    The projections of an ``nn.MultiheadAttention``, which keeps three of them in one parameter,
    become layers: a :class:`torchquant.nn.MultiheadAttention` takes its place, and
    :func:`torchquant.to_float_` puts the original class back. An ``nn.TransformerEncoderLayer``
    then runs its ordinary forward instead of its fused one, which reads float weights.

    Embeddings have no activations. A configuration of weights alone, such as
    :func:`torchquant.IntxWeightOnlyConfig`, therefore also applies to them: every ``nn.Embedding``
    becomes a :class:`torchquant.nn.QuantizedEmbedding`, every ``nn.EmbeddingBag`` a
    :class:`torchquant.nn.QuantizedEmbeddingBag`, so that the memory of the model falls as the bits
    say. ``filter_fn="!*embed*"`` leaves them in float. Other configurations leave embeddings in
    float, unless they are tied.

    An embedding and an output layer that are tied get one quantized weight, if the output layer has
    weights in groups, of fewer than 8 bits, or beside float activations, and the arguments exclude
    neither. Otherwise they are untied: the output layer gets its own integer copy. If the model
    would then be larger than in float, the layer stays in float, unless filter_fn selects it.

    The model may be on the CPU or on CUDA devices; each new layer is on the device of the old one.

    Integers and biases that an algorithm found for a layer
    (:class:`torchquant.convert.adjustment.Adjustment`) are taken instead of the nearest integers.

    Memory use never exceeds the float model plus its largest layer. If a conversion fails halfway
    (out of memory), the layers before it are quantized, the others are in float, and the model
    works.

    Args:
        model: any module that contains layers. A bare layer cannot be replaced in place: use
            ``from_float`` of its class, such as :meth:`torchquant.nn.QuantizedLinear.from_float`.
        config: the configuration of the quantized layers; None is
            :func:`torchquant.Int8DynamicActivationInt8WeightConfig`. A dictionary gives layers
            different configurations: its keys are names or patterns such as ``"encoder.*"``, its
            values configurations, or None to leave layers in float. The first key that matches
            decides; layers that no key matches stay in float.
        filter_fn: selects the layers to quantize, including small ones: a function that is called
            with each layer of a kind and each of its names, a name pattern such as
            ``"encoder.*.q_proj"``, or a list of patterns, in which ``"!head"`` excludes. None
            selects all layers except those that do not benefit; so does a list of exclusions, for
            the other layers. A function that raises an AttributeError for a layer does not select
            it: convolutions have no ``out_features``. A function is also called with the model
            itself, with the name "", and with modules of other kinds, if there are any: one that
            selects a module and not the model itself asks for that module.
        strict: if True, raise before anything is changed if something that was asked for cannot be
            done: a selected layer cannot be quantized, filter_fn selects a module of another kind
            or no layer at all, or a pattern matches nothing. False reports it.
        fusion: what to compute together with the quantized layers; None is
            :class:`torchquant.Fusion` with its defaults, which change results only by rounding.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module or is scripted, config is not a configuration, filter_fn is
            neither callable nor patterns, or fusion is not a :class:`torchquant.Fusion`.
        ValueError: model is a bare layer; config has static activations; a pattern is empty;
            what an algorithm found does not fit a layer or its configuration; or, with ``strict``,
            something that was asked for cannot be done.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = quantize_(model)
        >>> [(layer.name, layer.action, layer.reason) for layer in report.layers]
        [('0', 'quantized', ''), ('2', 'skipped', 'too small to benefit')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
        >>> model = nn.ModuleDict({"body": nn.Linear(64, 64), "head": nn.Linear(64, 64)})
        >>> quantize_(model, filter_fn="!head")["head"].reason
        'filter_fn'
    """
    return quantize_model("quantize_", model, config, filter_fn, strict, fusion, progress)


def quantize_model(
    who: str,
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None,
    filter_fn: FilterFn | None,
    strict: bool,
    fusion: Fusion | None,
    progress: bool | None,
    find: Callable[[list[Step]], None] | None = None,
) -> QuantizationReport:
    """What :func:`quantize_` does, with integers that an algorithm finds for the layers.

    Args:
        who: the verb, with which messages start.
        model: see :func:`quantize_`; so are the other arguments that are not listed here.
        find: is called once it is clear which layers will be replaced, with their steps, and before
            the model changes. It may give each layer an
            :class:`~torchquant.convert.adjustment.Adjustment`; if it raises, it must leave the
            model as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> def find(steps):
        ...     print([step.name for step in steps])
        >>> _ = quantize_model("verb", model, None, None, False, None, None, find)
        ['0', '2']
    """
    check_model(
        who,
        model,
        trained="which is prepared for training; use its to_quantized()",
        quantized="which is quantized already; use it as it is",
        floating=(
            "which cannot be replaced in place; use "
            "torchquant.nn.{quantized}.from_float({kind}, config)"
        ),
    )
    chosen = selection(who, filter_fn, config, partial(_check_config, who))
    fusion = check_fusion(who, fusion)
    with separated(model, lambda: _plan(model, chosen)) as attention:
        plan = attention.plan
        account = account_of(model, [step.module for step in plan])
        problems = asked_problems(model, plan, account, chosen)
        if strict:
            check_strict(who, plan, account.others, problems)
        shared = Shared(plan)
        if find is not None:
            find([step for step in plan if step.skip is None])
        _check_adjustments(who, plan)
        shared.settle()
        bytes_before = tensor_bytes(model)
        attention.commit()
        with kept(model):
            rows = _carry_out(who, model, plan, chosen, shared, bytes_before, progress)
            fusions = tuple(_fuse(model, plan, fusion))
    layers, others = account.filled(rows)
    notes = (*_notes(model, plan, account, problems), *shared.notes(), *attention.notes())
    return QuantizationReport(
        layers, bytes_before, tensor_bytes(model), notes, fusions, others=others
    )


def _check_config(who: str, config: QuantizationConfig | None) -> QuantizationConfig:
    if isinstance(config, TrainingConfig):
        raise TypeError(
            f"{who}: config must be the configuration of a quantized layer, got {config!r}, "
            "which is for training; use prepare_qat_(model, config), train, and convert_(model)"
        )
    config = check_config(who, config)
    if config.activations is not None and config.activations.needs_calibration:
        raise ValueError(
            f"{who}: config must have dynamic activations, got {config!r}: one scale for all "
            "inputs has to be observed first; call prepare_(model, config), calibrate(model, "
            "loader) and convert_(model), or train with prepare_qat_(model, config)"
        )
    return config


def _check_adjustments(who: str, plan: list[Step]) -> None:
    """Raise if what an algorithm found for a layer does not fit the layer that will be made."""
    for step in plan:
        problem = None
        if step.skip is None:
            problem = adjustment_problem(step.module, step.config.weights)
        if problem is not None:
            raise ValueError(f"{who}: {step.name} cannot be quantized: {problem}")


def _plan(model: nn.Module, chosen: Selection[QuantizationConfig]) -> list[Step]:
    def done(step: Step) -> str | None:
        module: Any = step.module
        if hook_of(module) is not None:
            return "prepared for calibration; calibrate(model, loader) and convert_(model) follow"
        if isinstance(module, TrainedModule):
            return "prepared for training; convert_(model) quantizes it"
        config = chosen.config_of(step.names)[1]
        other = "" if config is None or module.config == config else ", with another configuration"
        return f"already quantized{other}"

    def refusal(step: Step) -> str | None:
        if refused := step.kind.refusal(step.module):
            return refused
        refused = step.kind.config_refusal(step.config, step.module)
        return refused or step.kind.value_refusal(step.module)

    return plan_layers(model, chosen, done, refusal, tables=True)


def _carry_out(
    who: str,
    model: nn.Module,
    plan: list[Step],
    chosen: Selection[QuantizationConfig],
    shared: Shared,
    bytes_before: int,
    progress: bool | None,
) -> list[LayerReport]:
    """Replace the layers, and return their rows.

    A layer whose float weight stays in use adds memory. Such layers come last, when it is clear
    whether the model is then larger than it was.
    """
    weights = {f"{step.name}.weight" for step in plan if step.skip is None}
    adding = [step.skip is None and not weights.issuperset(step.tied_to) for step in plan]
    rows: dict[int, LayerReport] = {}
    order = sorted(range(len(plan)), key=adding.__getitem__)
    for place in track(order, who, progress):
        step = plan[place]
        if step.skip is not None:
            rows[place] = step.skipped()
            continue
        layer_class = step.kind.layer_class(step.config, step.module)
        new = layer_class.from_float(step.module, step.config)
        apply_adjustment(step.module, new)
        free = not (chosen.filter.chooses or chosen.named_in_full(step.names))
        if adding[place] and free and tensor_bytes(model) + _added(step, new) > bytes_before:
            step.leave = (
                f"shares its weight with {', '.join(step.tied_to)}; an integer copy would make the "
                "model larger than in float"
            )
            rows[place] = step.skipped()
            continue
        shared.share(step, new)
        # This releases the float weights now, not at the end of the plan.
        remarks = [step.untied, step.reads.remark if step.reads else ""]
        rows[place] = step.replaced(new, "quantized", "; ".join(filter(None, remarks)))
    return [rows[place] for place in range(len(plan))]


def _added(step: Step, new: nn.Module) -> int:
    """The bytes by which a layer whose float weight stays in use makes the model larger."""
    bias = step.module._parameters.get("bias")
    if bias is None or step.bias_tied_to:
        return tensor_bytes(new)
    return tensor_bytes(new) - bias.numel() * bias.element_size()


def _fuse(model: nn.Module, plan: list[Step], fusion: Fusion) -> Iterator[FusionReport]:
    layers = [
        step.module
        for step in plan
        if step.skip is None and isinstance(step.module, QuantizedModule)
    ]
    names = {id(module): name for name, module in model.named_modules()}
    if layers and fusion.activations:
        yield from fuse_activations(model, layers, names)
    if layers and fusion.projections:
        yield from group_projections(model, layers, names)


def _notes(
    model: nn.Module, plan: list[Step], account: Account, problems: list[str]
) -> Iterator[str]:
    yield from sentences(problems)
    yield from plan_notes(model, plan, account, "quantize")
    untied = [step.name for step in plan if step.tied and not step.skip and step.shares is None]
    if untied:
        yield untied_note(untied)
