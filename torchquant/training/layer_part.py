"""LayerPart: what observers and quantizers share, namely float32 state and the name of a layer."""

from __future__ import annotations

from torch import Tensor

from torchquant.functional._checks import FLOAT_DTYPES, require_dtype
from torchquant.training.state import Float32State


class LayerPart(Float32State):
    """A module that observes or quantizes one tensor of a layer.

    Attributes:
        layer_name: path of the layer in the model, used in warnings, errors and reports; "" until
            :meth:`set_layer_name` is called, as ``prepare_`` and ``prepare_qat_`` do.

    Example:
        >>> part = LayerPart()
        >>> part.set_layer_name("encoder.0")
        >>> part.title()
        'LayerPart of encoder.0'
    """

    layer_name: str = ""

    def set_layer_name(self, name: str) -> None:
        """Set the layer's name here and in the parts that this module holds."""
        for part in self.modules():
            if isinstance(part, LayerPart):
                part.layer_name = name

    def title(self) -> str:
        """The class and, if it is set, the layer's name: how messages begin."""
        own = type(self).__name__
        return f"{own} of {self.layer_name}" if self.layer_name else own

    def check_input(self, input: Tensor, state: Tensor) -> None:
        """Raise unless ``input`` is a float tensor on the device of the module's ``state``."""
        who = type(self).__name__
        require_dtype(who, "input", input, FLOAT_DTYPES)
        if input.device != state.device:
            raise ValueError(
                f"{who}: input must be on the module's device {state.device}, got {input.device}; "
                "move one of them with .to(device)"
            )


__all__ = ["LayerPart"]
