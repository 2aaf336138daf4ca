"""Drop-in modules."""

from torchquant.nn.activation import Activation
from torchquant.nn.fused import FusedActivation
from torchquant.nn.linear import QuantizedLinear
from torchquant.nn.norm import LayerNorm, RMSNorm
from torchquant.nn.qat_linear import QATLinear

__all__ = ["Activation", "FusedActivation", "LayerNorm", "QATLinear", "QuantizedLinear", "RMSNorm"]
