"""torchquant: quantization for PyTorch with exact integer kernels that are fast in eager mode."""

from torchquant import cpu, functional, nn, ops
from torchquant.configs import Int8DynamicActivationInt8WeightConfig
from torchquant.ops import PackedWeight, quantized_linear
from torchquant.scheme import PerAxis, PerGroup, PerTensor, PerToken, quant_range
