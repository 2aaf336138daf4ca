"""Drop-in modules: layers, the two base classes of layers, and the table of kinds."""

from torchquant.nn.activation import Activation
from torchquant.nn.base import QuantizedModule, TrainedModule
from torchquant.nn.conv import QuantizedConv1d, QuantizedConv2d
from torchquant.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from torchquant.nn.fused import FusedActivation
from torchquant.nn.intx_linear import QuantizedIntxLinear
from torchquant.nn.kinds import Kind, kind_of, register
from torchquant.nn.linear import QuantizedLinear
from torchquant.nn.multihead_attention import MultiheadAttention
from torchquant.nn.norm import LayerNorm, RMSNorm
from torchquant.nn.norm_replacement import ReplacedNorm
from torchquant.nn.qat_conv import QATConv1d, QATConv2d
from torchquant.nn.qat_conv_bn import QATConvBn2d
from torchquant.nn.qat_linear import QATLinear

__all__ = [
    "Activation",
    "FusedActivation",
    "Kind",
    "LayerNorm",
    "MultiheadAttention",
    "QATConv1d",
    "QATConv2d",
    "QATConvBn2d",
    "QATLinear",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedIntxLinear",
    "QuantizedLinear",
    "QuantizedModule",
    "RMSNorm",
    "ReplacedNorm",
    "TrainedModule",
    "kind_of",
    "register",
]
