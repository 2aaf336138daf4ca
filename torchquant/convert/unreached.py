"""Prepared layers that no batch reached: they have no range, and stay in float.

An expert without tokens or a layer that dropped out in every step must not stop the conversion of
the other layers. Such a layer was not trained, and the range of its inputs is unknown, so the float
layer is the one result that is right for every input.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from torchquant.convert.plan import Step
from torchquant.graph.modules import owners_by_module
from torchquant.nn.base import TrainedModule
from torchquant.nn.fused import FusedActivation

UNREACHED = "left in float: no range, because no batch with values other than 0 reached it"


def unreached_layers(steps: list[Step], strict: bool) -> list[Step]:
    """The steps whose layers have no range.

    Raises:
        ValueError: all layers lack a range, so the model was not calibrated; or, with ``strict``,
            one of them does.

    Example:
        >>> unreached_layers([], strict=False)
        []
    """
    found = [(step, reason) for step in steps if (reason := step.prepared.missing_range())]
    if found and len(found) == len(steps):
        step, reason = found[0]
        raise ValueError(f"convert_: {step.name} cannot be converted: {reason}")
    if found and strict:
        names = ", ".join(step.name for step, _ in found)
        trained = any(isinstance(step.module, TrainedModule) for step, _ in found)
        verb = "prepare_qat_" if trained else "prepare_"
        raise ValueError(
            "convert_: with strict=True a batch must have reached every prepared layer, got "
            f"{len(found)} without a range ({names}); run batches that reach them, exclude them "
            f"from {verb} with filter_fn, or pass strict=False to leave them in float"
        )
    return [step for step, _ in found]


def unreached_notes(steps: list[Step]) -> Iterator[str]:
    """The note of the report on layers that have no range."""
    if steps:
        yield (
            f"Left in float, because no batch reached them: {', '.join(s.name for s in steps)}. "
            "Run batches that reach them before convert_, or call quantize_(model) afterwards, "
            "which needs no ranges."
        )


def activations_to_restore(model: nn.Module, steps: list[Step]) -> list[FusedActivation]:
    """The places of activations that the layers of ``steps`` compute, which float layers do not.

    A place does not name its layer, so all places of the function are restored. Applying a ReLU
    twice changes nothing.

    Raises:
        ValueError: a layer computes an activation that cannot be restored.
    """
    trained = [(step, step.module) for step in steps if isinstance(step.module, TrainedModule)]
    needed = {layer.activation for _, layer in trained} - {"none"}
    places = [
        module
        for module in model.modules()
        if isinstance(module, FusedActivation) and module.activation in needed
    ]
    possible = {place.activation for place in places} & {"relu"}
    for step, layer in trained:
        activation = layer.activation
        if activation in needed - possible:
            raise ValueError(
                f"convert_: {step.name} cannot be converted: {layer.missing_range()}; nor "
                f"can it be left in float, because it computes activation {activation!r}, which "
                "was not a module of the model"
            )
    return places


def restore_activations(model: nn.Module, places: list[FusedActivation]) -> None:
    """Put the original activation modules back into their places."""
    owners = owners_by_module(model)
    for place in places:
        for parent, attribute in owners[id(place)]:
            parent._modules[attribute] = place.original.train(place.training)
