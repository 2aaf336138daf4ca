"""quantize_: plan, check the plan, then replace the layers one by one."""

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
from torchquant.graph.modules import tensor_bytes
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

    Every ``nn.Linear`` becomes a :class:`torchquant.nn.QuantizedLinear` with the same hooks. Linear
    layers that stay in float are reported with the reason: subclasses of ``nn.Linear``, weights
    computed from other tensors, layers whose weight is read by another module
    (``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``), layers too small to benefit. Layers
    that are already quantized are reported and left unchanged. A weight that is shared with an
    embedding is untied: the layer gets its own int8 copy. Modules of other kinds (convolutions,
    embeddings, recurrent layers) stay in float and do not appear in the report.

    The model may be on the CPU or on CUDA devices; each new layer is on the device of the old one.

    Memory use never exceeds the float model plus its largest layer. If a conversion fails halfway
    (out of memory), the layers before it are quantized, the others are in float, and the model
    works.

    Args:
        model: any module that contains layers. A bare ``nn.Linear`` cannot be replaced in place:
            use :meth:`torchquant.nn.QuantizedLinear.from_float`.
        config: the configuration of the quantized layers; None is
            :func:`torchquant.Int8DynamicActivationInt8WeightConfig`.
        filter_fn: called with each linear-like layer and each of its names; returns True for layers
            to quantize, including small ones. None selects all layers except those that are too
            small to benefit.
        strict: if True, raise before anything is changed if a selected layer cannot be quantized.
        fusion: what to compute together with the quantized layers; None is
            :class:`torchquant.Fusion` with its defaults, which change results only by rounding. A
            :class:`torchquant.nn.FusedActivation` takes the place of an activation module that
            became part of the preceding layer.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module or is scripted, config is not a configuration, filter_fn is
            not callable, or fusion is not a :class:`torchquant.Fusion`.
        ValueError: model is a bare linear layer; config has static activations; or, with
            ``strict``, a selected layer cannot be quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = quantize_(model)
        >>> [(layer.name, layer.action, layer.reason) for layer in report.layers]
        [('0', 'quantized', ''), ('2', 'skipped', 'too small to benefit')]
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
            "which is for training; use prepare_qat_(model, config), train, and convert_(model)"
        )
    config = check_config("quantize_", config)
    if config.activations.needs_calibration:
        raise ValueError(
            f"quantize_: config must have dynamic activations, got {config!r}: one scale for all "
            "inputs has to be observed or learned first; use prepare_qat_(model, config), run or "
            "train the model, and call convert_(model)"
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
    # This releases the float weights now, not at the end of the plan.
    remarks = ["untied" if step.tied else "", step.reads.remark if step.reads else ""]
    return step.replaced(new, "quantized", "; ".join(filter(None, remarks)))


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


def _notes(plan: list[Step]) -> Iterator[str]:
    if not plan:
        yield no_layers("quantize")
    untied = [step.name for step in plan if step.tied and not step.skip]
    if untied:
        yield f"No longer shares its weight; has its own integer copy: {', '.join(untied)}."
