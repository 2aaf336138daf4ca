"""FusedActivation: replaces an activation module that the preceding layer computes."""

from __future__ import annotations

from torch import nn


class FusedActivation(nn.Identity):
    """An identity in place of an activation that became part of the preceding quantized layer.

    :func:`torchquant.load` inserts it for files that say so (formats up to 3), so that the
    surrounding forward does not have to change. It has no state, so the keys of a state dict do not
    change either. :func:`torchquant.quantize_` leaves activations in their places.

    Args:
        activation: the function that the layer computes, a name in ``functional.ACTIVATIONS``.
        original: the replaced module. It is not registered as a child, so it is no longer one of
            the model's modules.

    Example:
        >>> place = FusedActivation("relu", nn.ReLU())
        >>> place, place.original
        (FusedActivation(relu), ReLU())
    """

    def __init__(self, activation: str, original: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self._original = (original,)  # the tuple keeps nn.Module from registering a child

    @property
    def original(self) -> nn.Module:
        """The activation module that was replaced."""
        return self._original[0]

    def extra_repr(self) -> str:
        return self.activation
