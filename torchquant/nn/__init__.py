"""Drop-in modules."""

from torchquant.nn.fused import FusedActivation
from torchquant.nn.linear import QuantizedLinear

__all__ = ["FusedActivation", "QuantizedLinear"]
