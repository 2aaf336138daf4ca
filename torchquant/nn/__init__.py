"""Drop-in modules."""

from torchquant.nn.linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
