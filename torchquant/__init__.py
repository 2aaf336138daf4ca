"""torchquant: quantization for PyTorch with exact integer kernels that are fast in eager mode.

The verbs are here; :mod:`torchquant.functional` is the specification in plain torch,
:mod:`torchquant.ops` the operators, :mod:`torchquant.nn` the modules, :mod:`torchquant.cpu` and
:mod:`torchquant.cuda` the choice of instruction set and of the path on a GPU.
"""

from torchquant import cpu, cuda, functional, nn, observers, ops, qat
from torchquant.analysis.verify import VerifyReport, verify
from torchquant.configs import (
    Fusion,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    IntxActivationIntxWeightConfig,
    QATConfig,
)
from torchquant.convert.norms import NormReport, NormsReport, replace_norms_
from torchquant.convert.qat import QATSchedule, convert_, prepare_qat_, to_float
from torchquant.convert.quantize import quantize_
from torchquant.files.io import load, save
from torchquant.integrations.transformers.attention import replace_attention_
from torchquant.nn import QATLinear
from torchquant.ops import PackedWeight, quantized_linear
from torchquant.report import FusionReport, LayerReport, QuantizationReport
from torchquant.scheme import (
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)
from torchquant.training.fake_quantize import FakeQuantize
from torchquant.training.learned_clip import PACTQuantizer
from torchquant.training.learned_steps import LSQPlusQuantizer, LSQQuantizer
from torchquant.training.observed_quantizer import ObservedQuantizer
from torchquant.training.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    report_nonfinite,
)
from torchquant.training.parameter_groups import parameter_groups
from torchquant.version import __version__

__all__ = [
    "FakeQuantize",
    "Fusion",
    "FusionReport",
    "Granularity",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "IntxActivationIntxWeightConfig",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "LayerReport",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "NormReport",
    "NormsReport",
    "ObservedQuantizer",
    "Observer",
    "PACTQuantizer",
    "PackedWeight",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QATConfig",
    "QATLinear",
    "QATSchedule",
    "QuantizationReport",
    "VerifyReport",
    "__version__",
    "convert_",
    "cpu",
    "cuda",
    "functional",
    "load",
    "nn",
    "observers",
    "ops",
    "parameter_groups",
    "prepare_qat_",
    "qat",
    "quant_range",
    "quantize_",
    "quantized_linear",
    "replace_attention_",
    "replace_norms_",
    "report_nonfinite",
    "save",
    "to_float",
    "verify",
]
