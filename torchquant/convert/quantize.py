"""quantize_: the verb. Plan first, check the plan, then change the model layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torchquant.configs import Config, Fusion, QATConfig, check_config, check_fusion
from torchquant.convert.activations import fuse_activations
from torchquant.convert.plan import (
    FilterFn,
    Step,
    check_filter,
    check_model,
    check_strict,
    features,
    plan_layers,
)
from torchquant.convert.projections import group_projections
from torchquant.graph.dataflow import Dataflow
from torchquant.graph.modules import owners_by_module, replace_module, tensor_bytes
from torchquant.nn.linear import QuantizedLinear, refusal, value_refusal
from torchquant.nn.qat_linear import QATLinear
from torchquant.report import FusionReport, LayerReport, QuantizationReport

_BARE: dict[type[nn.Module], str] = {
    QATLinear: "which is prepared for training; use its to_quantized()",
    QuantizedLinear: "which is quantized already; use it as it is",
    nn.Linear: (
        "which cannot be replaced in place; use "
        "torchquant.nn.QuantizedLinear.from_float(linear, config)"
    ),
}


def quantize_(
    model: nn.Module,
    config: Config | None = None,
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
    check_model("quantize_", model, _BARE)
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


def _check_config(config: Config | None) -> Config:
    if isinstance(config, QATConfig):
        raise TypeError(
            f"quantize_: config must be the configuration of a quantized layer, got {config!r}, "
            "which says how to train; use prepare_qat_(model, config), train, and convert_(model)"
        )
    config = check_config("quantize_", config)
    if config.static:
        raise ValueError(
            f"quantize_: config must have dynamic activations, got {config!r}: one scale for all "
            "inputs has to be observed or learned first; use prepare_qat_(model, config), run or "
            "train the model, and convert_(model)"
        )
    return config


def _plan(model: nn.Module, config: Config, filter_fn: FilterFn | None) -> list[Step]:
    def done(module: nn.Module) -> str | None:
        if isinstance(module, QATLinear):
            return "prepared for training; convert_(model) quantizes it"
        if not isinstance(module, QuantizedLinear):
            return None
        other = "" if module.config == config else ", with another configuration"
        return f"already quantized{other}"

    return plan_layers(model, filter_fn, done, lambda m: refusal(m) or value_refusal(m))


def _carry_out(step: Step, config: Config) -> LayerReport:
    if step.skip is not None:
        return step.skipped()
    old = step.module
    assert isinstance(old, nn.Linear)
    kind, before = type(old).__name__, tensor_bytes(old)
    new = QuantizedLinear.from_float(old, config)
    replace_module(step.owners, old, new)
    step.dtype = old.weight.dtype
    step.module = new  # the float weights go now, not when the plan does
    remark, sizes = step.remark("untied" if step.tied else ""), (*features(new), before)
    return LayerReport(step.name, kind, "quantized", remark, *sizes, tensor_bytes(new))


def _fuse(model: nn.Module, plan: list[Step], fusion: Fusion) -> Iterator[FusionReport]:
    layers = [
        (step.module, step.dtype)
        for step in plan
        if step.skip is None and isinstance(step.module, QuantizedLinear)
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
        yield "The model has no linear layers; there was nothing to quantize."
    untied = [step.name for step in plan if step.tied and not step.skip]
    if untied:
        yield f"Untied from a shared weight, with an int8 copy of their own: {', '.join(untied)}."
