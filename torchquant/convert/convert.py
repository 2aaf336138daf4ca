"""convert_: replace prepared layers by the layers to deploy.

Prepared are the layers that trained for quantization (``prepare_qat_``) and the float layers whose
inputs were observed (``prepare_`` and ``calibrate``). All new layers are created before the model
changes: an error leaves it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from torchquant.configs import Fusion, check_fusion
from torchquant.convert.account import account_of
from torchquant.convert.activations import fuse_activations
from torchquant.convert.notes import plan_notes, untied_note
from torchquant.convert.plan import Step, check_model, find_layers
from torchquant.convert.projections import group_projections
from torchquant.convert.ranges import Calibrated, calibrated
from torchquant.convert.regions import Ranges, kept, quantize, ranges, region_reports, remembered
from torchquant.convert.tables import without_float_tables
from torchquant.convert.training_regions import check_loaded
from torchquant.convert.unreached import (
    UNREACHED,
    activations_to_restore,
    restore_activations,
    unreached_layers,
    unreached_notes,
)
from torchquant.graph.modules import tensor_bytes
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.folded_norm import places_of, restore_norms
from torchquant.report import FusionReport, LayerReport, QuantizationReport
from torchquant.report.progress import track

_BARE = "which cannot be replaced in place; use its to_quantized()"


def convert_(
    model: nn.Module,
    strict: bool = False,
    *,
    fusion: Fusion | None = None,
    progress: bool | None = None,
) -> QuantizationReport:
    """Convert a prepared model into the quantized model to deploy, in place.

    A layer that :func:`torchquant.prepare_` prepared becomes a quantized layer whose input has the
    scale that :func:`torchquant.calibrate` observed. If torch.distributed is initialised, all
    processes must call this function; the ranges are those of all their batches.

    Every :class:`torchquant.nn.QATLinear` becomes the :class:`torchquant.nn.QuantizedLinear` with
    whose computation it was trained; so do convolutions, with the batch norms that are part of
    them. In eager mode, the outputs of the trained model in evaluation mode keep their bits
    (:func:`torchquant.verify` checks this). As in :func:`torchquant.quantize_`, layers that are
    applied to the same tensor are computed together, which changes no bits.

    In a model with static activations, values stay int8 from layer to layer; the
    report's ``regions`` say where, and where and why they are float. On the CPU such a part of the
    model runs as one call, unless inner modules have hooks. If it is changed later (a module is
    replaced), it computes with its layers one by one, and warns once.

    A layer with static activations that no batch reached has no range (an expert without tokens, a
    layer that dropped out in every step, a layer whose inputs were all 0). It is a float layer
    again, and the report gives the reason. :func:`torchquant.quantize_` can then quantize it with
    dynamic activations, which need no range.

    Args:
        model: a model that :func:`torchquant.prepare_` or :func:`torchquant.prepare_qat_` prepared.
            A bare ``QATLinear`` cannot be replaced in place: use its ``to_quantized()``.
        strict: if True, raise before anything is changed if a layer has no range.
        fusion: what to compute together, as in :func:`torchquant.quantize_`; None is
            :class:`torchquant.Fusion` with its defaults. Its ``activations`` concern calibrated
            layers only: for layers that trained, :func:`torchquant.prepare_qat_` has decided.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, or is a scripted module; fusion is not a
            :class:`torchquant.Fusion`.
        ValueError: model is a bare layer, contains no prepared layer, or contains a layer that
            cannot be converted; no layer has a range; a state dict brought ranges of values between
            layers, and no batch has shown yet which values these are; or, with ``strict``, a layer
            has none. The message names the layer; the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> import torchquant
        >>> _ = torchquant.prepare_qat_(model)
        >>> print(convert_(model).layers[0].action, type(model[0]).__name__)
        converted QuantizedLinear
    """
    check_model("convert_", model, trained=_BARE)
    fusion = check_fusion("convert_", fusion)
    plan = without_float_tables(find_layers(model))
    check_loaded(model)
    observed, refused = ranges(model), remembered(model)
    steps = _prepared_steps(plan, observed)
    unreached = unreached_layers(steps, strict)
    left = {id(step.module) for step in unreached}
    steps = [step for step in steps if id(step.module) not in left]
    restored = activations_to_restore(model, unreached)
    account = account_of(model, [step.module for step in plan])
    inside = observed.inside()
    new_layers = {
        id(step.module): _converted(step, id(step.module) in inside)
        for step in track(steps, "convert_", progress)
    }
    notes = [*_conversion_notes(steps), *unreached_notes(unreached)]
    bytes_before = tensor_bytes(model)
    with kept(model):
        rows = []  # from here on the model changes; nothing can fail
        for step in plan:
            new = new_layers.get(id(step.module))
            if new is not None:
                rows.append(_replaced(model, step, new))
            else:
                rows.append(_restored(model, step) if id(step.module) in left else step.skipped())
        restore_activations(model, restored)
        notes += plan_notes(model, plan, account, "convert")
        calibrated_layers = [step.module for step in steps if isinstance(step.prepared, Calibrated)]
        fusions = tuple(_fuse(model, calibrated_layers, new_layers.values(), fusion))
    quantize(observed)
    layers, others = account.filled(rows)
    return QuantizationReport(
        layers,
        bytes_before,
        tensor_bytes(model),
        tuple(notes),
        fusions,
        "converted",
        others,
        region_reports(model, refused, observed.useless),
    )


def _prepared_steps(plan: list[Step], observed: Ranges) -> list[Step]:
    """The steps of the prepared layers; the other ones get the reason why they stay."""
    steps = []
    for step in plan:
        trained = isinstance(step.module, TrainedModule)
        step.prepared = step.module if trained else calibrated(step.module)
        if isinstance(step.prepared, Calibrated):
            step.prepared.share(observed.layers.get(id(step.module)))
        if step.prepared is not None:
            steps.append(step)
        else:
            quantized = isinstance(step.module, QuantizedModule)
            step.leave = "already quantized" if quantized else "not prepared"
    if not steps:
        raise ValueError(
            "convert_: model must hold layers that prepare_ or prepare_qat_ prepared, got none; "
            "call prepare_(model, config) and calibrate(model, loader), or prepare_qat_(model, "
            "config) and train, or quantize_(model, config) to quantize without both"
        )
    return steps


def _replaced(model: nn.Module, step: Step, new: QuantizedModule) -> LayerReport:
    """Put the new layer into the place of the prepared one."""
    prepared = step.prepared
    if isinstance(prepared, Calibrated):
        prepared.release()
        return step.replaced(new, "converted", step.untied)
    for place in places_of(model, prepared.norms):
        place.release()
    fused = bool(prepared._fuses_activation)
    row = step.replaced(new, "converted", step.untied)
    new.fuse_activation(fused)
    return row


def _restored(model: nn.Module, step: Step) -> LayerReport:
    """Leave a layer without range in float."""
    prepared = step.prepared
    if isinstance(prepared, Calibrated):
        prepared.release()
        return step.marked("skipped", UNREACHED)
    norms = prepared.norms
    row = step.replaced(prepared.to_float(), "skipped", UNREACHED)
    restore_norms(model, norms)
    return row


def _conversion_notes(steps: list[Step]) -> Iterator[str]:
    trained = {step.name: step.module for step in steps if isinstance(step.module, TrainedModule)}
    floating = [name for name, layer in trained.items() if not bool(layer.quantize_enabled)]
    if floating:
        yield (
            "Converted in the stage 'observe', in which layers compute in float: "
            f"{', '.join(floating)}."
        )
    simulated = [name for name, layer in trained.items() if layer.simulate]
    if simulated:
        yield (
            "Trained with a simulation in float, whose results differ from the integers by "
            f"rounding: {', '.join(simulated)}."
        )
    called = {name: layer.was_called for name, layer in trained.items()}
    never = [name for name, was_called in called.items() if was_called is False]
    if never and any(called.values()):
        yield (
            "Not called by any forward since prepare_qat_, so not trained with the integers: "
            f"{', '.join(never)}."
        )
    untied = [step.name for step in steps if step.tied]
    if untied:
        yield untied_note(untied)


def _converted(step: Step, inside: bool) -> QuantizedModule:
    try:
        layer: QuantizedModule = step.prepared.to_quantized()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"convert_: {step.name} cannot be converted: {error}") from error
    return layer if inside else layer.outside_programs()


def _fuse(
    model: nn.Module,
    observed: Iterable[Any],
    layers: Iterable[QuantizedModule],
    fusion: Fusion,
) -> Iterator[FusionReport]:
    names = {id(module): name for name, module in model.named_modules()}
    if fusion.activations:
        yield from fuse_activations(model, observed, names)
    if fusion.projections:
        yield from group_projections(model, layers, names)


__all__ = ["convert_"]
