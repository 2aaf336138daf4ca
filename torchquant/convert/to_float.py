"""to_float_: convert prepared or quantized layers back to float layers."""

from __future__ import annotations

from torch import nn

from torchquant.convert.attention import join_attention
from torchquant.convert.calibration_hooks import hook_of, release
from torchquant.convert.notes import kept_notes
from torchquant.convert.plan import check_model, find_layers
from torchquant.convert.regions import forget
from torchquant.convert.tables import tied_again
from torchquant.graph.modules import owners_by_module, tensor_bytes
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.folded_norm import FoldedNorm, restore_norms
from torchquant.nn.fused import FusedActivation
from torchquant.nn.norm_replacement import restore_norm
from torchquant.nn.replaced_activation import restore_activation_
from torchquant.report import QuantizationReport


def to_float_(model: nn.Module) -> QuantizationReport:
    """Convert prepared or quantized layers back to float layers, in place.

    The float layer of a prepared layer (:class:`torchquant.nn.QATLinear`) has the same parameter
    objects. The float layer of a quantized layer (:class:`torchquant.nn.QuantizedLinear`) has the
    values that the integers represent. ``nn.MultiheadAttention`` is put back where a verb made
    layers of its projections. Activation modules are restored, and so are norms that
    :func:`torchquant.replace_norms_` replaced, and batch norms that a prepared layer trains.
    Observers that :func:`torchquant.prepare_` attached are removed. A batch norm that ``prepare_``
    folded, or that was converted with its convolution, stays part of the layer: the layer keeps the
    weight and the bias that compute both, and an identity keeps the place of the norm. After
    ``prepare_`` alone, the model computes what it did before, up to rounding; the report says how
    many batch norms stay folded.

    Args:
        model: a model with prepared or quantized layers. A bare layer cannot be replaced in place:
            use its ``to_float()``.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module, or is a scripted module.
        ValueError: model is a bare layer, or a layer computes an activation that was never a module
            of the model and so cannot be restored. The model is unchanged.

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> weight = model[0].weight
        >>> _ = torchquant.prepare_qat_(model)
        >>> _ = to_float_(model)
        >>> model[0].weight is weight, model
        (True, Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
          (1): ReLU()
        ))
    """
    remedy = "which cannot be replaced in place; use its to_float()"
    check_model("to_float_", model, quantized=remedy, trained=remedy)
    steps = find_layers(model, (QuantizedModule, TrainedModule))
    places = [module for module in model.modules() if isinstance(module, FusedActivation)]
    known = {place.activation for place in places}
    for step in steps:
        computed = getattr(step.module, "activation")  # noqa: B009
        if computed != "none" and computed not in known:
            raise ValueError(
                "to_float_: each activation that a layer computes must have been a module of the "
                f"model, got {step.name}, which was created with activation {computed!r}; replace "
                "the layer by its to_float() and the activation"
            )
    new_layers = {id(step.module): step.module.to_float() for step in steps}  # type: ignore[operator]
    tied_again((step.module, new_layers[id(step.module)]) for step in steps)
    owners = owners_by_module(model)
    bytes_before = tensor_bytes(model)
    rows = []  # from here on the model changes; nothing can fail
    norms = [norm for step in steps for norm in getattr(step.module, "norms", ())]
    for step in steps:
        rows.append(step.replaced(new_layers[id(step.module)], "restored"))
    restore_norms(model, norms)
    for place in places:
        for parent, attribute in owners[id(place)]:
            parent._modules[attribute] = place.original.train(place.training)
    for module in model.modules():
        restore_activation_(module)
    forget(model)
    prepared = [module for module in model.modules() if hook_of(module) is not None]
    for module in prepared:
        release(module)
    join_attention(model)
    restored = sum(restore_norm(module) for module in model.modules())
    notes = tuple(kept_notes(steps))
    if prepared:
        have = "1 layer has" if len(prepared) == 1 else f"{len(prepared)} layers have"
        notes += (f"{have} no observer any more.",)
    elif not steps:
        notes = ("The model has no prepared or quantized layers; none was restored.",)
    if restored:
        have = "norm has its" if restored == 1 else "norms have their"
        notes += (f"{restored} {have} own forward again.",)
    folded = sum(isinstance(module, FoldedNorm) for module in model.modules())
    if folded:
        stay = "batch norm stays" if folded == 1 else "batch norms stay"
        notes += (f"{folded} {stay} part of the layers before them.",)
    return QuantizationReport(
        tuple(rows), bytes_before, tensor_bytes(model), notes, action="restored"
    )


__all__ = ["to_float_"]
