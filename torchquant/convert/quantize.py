"""quantize_: the verb. Plan first, check the plan, then change the model layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from torchquant.configs import Fusion, QuantizationConfig, check_config, check_fusion
from torchquant.convert.activations import fuse_activations
from torchquant.convert.plan import (
    FilterFn,
    Step,
    check_filter,
    check_model,
    check_strict,
    no_layers,
    plan_layers,
)
from torchquant.convert.projections import group_projections
from torchquant.graph.dataflow import Dataflow
from torchquant.graph.modules import owners_by_module, tensor_bytes
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.kinds import Kind
from torchquant.report import FusionReport, LayerReport, QuantizationReport
from torchquant.training.configuration import TrainingConfig


def quantize_(
    model: nn.Module,
    config: QuantizationConfig | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    *,
    fusion: Fusion | None = None,
) -> QuantizationReport:
    """Quantize a model's linear layers, in place.

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QuantizedLinear`, its hooks included. What
    stays in float is reported with the reason: subclasses of ``nn.Linear``, weights computed from
    other tensors, layers whose weight is read by a fused fast path (``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``), layers too small to gain. Layers that are quantized already are
    reported and left alone. A weight shared with an embedding is untied: the layer gets its own
    int8 copy.

    The model may lie on the CPU or on CUDA devices; each new layer is where the old one was.

    Memory never exceeds the float model plus its largest layer. Should a conversion fail halfway
    (out of memory), the layers before it are quantized, the others in float, and the model works.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place:
            use :meth:`torchquant.nn.QuantizedLinear.from_float`.
        config: :class:`torchquant.Int8DynamicActivationInt8WeightConfig` when None.
        filter_fn: called with each linear-like layer and each of its names; true asks for it, also
            where it is too small to gain. None asks for all but those.
        strict: raise, before anything is changed, where a layer that was asked for cannot be
            quantized.
        fusion: what may be computed together with the quantized layers;
            :class:`torchquant.Fusion` when None, which fuses what changes results by rounding
            alone. An activation that became part of the layer before it leaves a
            :class:`torchquant.nn.FusedActivation` in its place.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model, config, filter_fn or fusion is not what it must be.
        ValueError: the model is a bare linear layer; or, with ``strict``, the layers and reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = quantize_(model)
        >>> [(layer.name, layer.action, layer.reason) for layer in report.layers]
        [('0', 'quantized', ''), ('2', 'skipped', 'too small to gain')]
        >>> print(report.fusions[0])
        fused: 0 with 1 (relu)
    """
    check_model(
        "quantize_",
        model,
        trained="which is prepared for training; use its to_quantized()",
        quantized="which is quantized already; use it as it is",
        floating=(
            "which cannot be replaced in place; use "
            "torchquant.nn.{quantized}.from_float({kind}, config)"
        ),
    )
    check_filter("quantize_", filter_fn)
    config = _check_config(config)
    fusion = check_fusion("quantize_", fusion)
    plan = _plan(model, config, filter_fn)
    if strict:
        check_strict("quantize_", plan)
    bytes_before = tensor_bytes(model)
    rows = tuple(_carry_out(step, config) for step in plan)
    fusions = tuple(_fuse(model, plan, fusion))
    return QuantizationReport(rows, bytes_before, tensor_bytes(model), tuple(_notes(plan)), fusions)


def _check_config(config: QuantizationConfig | None) -> QuantizationConfig:
    if isinstance(config, TrainingConfig):
        raise TypeError(
            f"quantize_: config must be the configuration of a quantized layer, got {config!r}, "
            "which says how to train; use prepare_qat_(model, config), train, and convert_(model)"
        )
    config = check_config("quantize_", config)
    if config.activations.needs_calibration:
        raise ValueError(
            f"quantize_: config must have dynamic activations, got {config!r}: one scale for all "
            "inputs has to be observed or learned first; use prepare_qat_(model, config), run or "
            "train the model, and convert_(model)"
        )
    return config


def _plan(model: nn.Module, config: QuantizationConfig, filter_fn: FilterFn | None) -> list[Step]:
    def done(module: Any) -> str | None:
        if isinstance(module, TrainedModule):
            return "prepared for training; convert_(model) quantizes it"
        other = "" if module.config == config else ", with another configuration"
        return f"already quantized{other}"

    def refusal(module: nn.Module, kind: Kind) -> str | None:
        refused = kind.refusal(module) or kind.quantized.config_refusal(config)
        return refused or kind.value_refusal(module)

    return plan_layers(model, filter_fn, done, refusal)


def _carry_out(step: Step, config: QuantizationConfig) -> LayerReport:
    if step.skip is not None:
        return step.skipped()
    step.dtype = step.module.weight.dtype  # type: ignore[assignment]
    new = step.kind.quantized.from_float(step.module, config)
    # The float weights go now, not when the plan does.
    return step.replaced(new, "quantized", "untied" if step.tied else "")


def _fuse(model: nn.Module, plan: list[Step], fusion: Fusion) -> Iterator[FusionReport]:
    layers = [
        (step.module, step.dtype)
        for step in plan
        if step.skip is None and isinstance(step.module, QuantizedModule)
    ]
    if not layers or not (fusion.activations or fusion.projections):
        return
    only = [layer for layer, _ in layers]
    flow = Dataflow(model, only)
    if fusion.activations:
        yield from fuse_activations(flow, layers, owners_by_module(model))
    if fusion.projections:
        yield from group_projections(flow, only, owners_by_module(model))


def _notes(plan: list[Step]) -> Iterator[str]:
    if not plan:
        yield no_layers("quantize")
    untied = [step.name for step in plan if step.tied and not step.skip]
    if untied:
        yield f"Untied from a shared weight, with an int8 copy of their own: {', '.join(untied)}."
