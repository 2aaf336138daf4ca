"""FusedActivation: marks the place of an activation that the layer before it computes."""

from __future__ import annotations

from torch import nn


class FusedActivation(nn.Identity):
    """An identity where an activation was that is now part of the quantized layer before it.

    :func:`torchquant.quantize_` puts it there, so that the forward around it need not change. It
    has no state, so the keys of a state dict stay what they were.

    Args:
        activation: what the layer computes instead, a name in ``functional.ACTIVATIONS``.
        original: the module that was here; ``original`` gives it back. It is no child: it is not
            among the model's modules any more.

    Example:
        >>> place = FusedActivation("relu", nn.ReLU())
        >>> place, place.original
        (FusedActivation(relu), ReLU())
    """

    def __init__(self, activation: str, original: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self._original = (original,)  # in a tuple, or it would become a child

    @property
    def original(self) -> nn.Module:
        """The activation module that stood here."""
        return self._original[0]

    def extra_repr(self) -> str:
        return self.activation
