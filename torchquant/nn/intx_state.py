"""IntxState: what layers read from a packed weight of 2 to 8 bits."""

from __future__ import annotations

from torch import Tensor

from torchquant.configs import QuantizationConfig
from torchquant.nn.base import QuantizedModule
from torchquant.nn.intx_weight import format_of, group_size_of
from torchquant.nn.weight import IntxFormat


class IntxState(QuantizedModule):
    """A layer whose ``packed`` holds integers of 2 to 8 bits, their scales and zero points.

    The base class of the linear layer and of the embeddings with such weights.

    Example:
        >>> from torchquant.nn import QuantizedEmbedding, QuantizedIntxLinear
        >>> issubclass(QuantizedEmbedding, IntxState), issubclass(QuantizedIntxLinear, IntxState)
        (True, True)
    """

    def take_weights(self, config: QuantizationConfig) -> None:
        """Have the arguments of the operators as attributes: reading ``config`` is slower."""
        self._bits: int = config.weights.bits
        self._group_size = group_size_of(config.weights)
        self._has_zero_point = not config.weights.symmetric

    @property
    def layout(self) -> IntxFormat:
        """The object that packs the weight."""
        return format_of(self.config.weights)

    @property
    def qweight_scale(self) -> Tensor:  # type: ignore[override]
        """The scales, which ``packed`` holds; each access unpacks them again."""
        return self.unpacked()["qweight_scale"]

    @property
    def qweight_zero_point(self) -> Tensor | None:  # type: ignore[override]
        """The zero points, which ``packed`` holds, or None; each access unpacks them again."""
        return self.unpacked()["qweight_zero_point"] if self._has_zero_point else None

    @property
    def integers(self) -> Tensor:
        """The integers of the weight as int8, in the shape of the weight; a new tensor."""
        return self.layout.unpack_integers(self.packed, self.weight_shape)[0]
