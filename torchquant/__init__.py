"""torchquant: quantization for PyTorch with exact integer kernels that are fast in eager mode.

Example:
    >>> import torch, torchquant
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    >>> print(torchquant.quantize_(model).summary())
    1 quantized (100 % of parameters), 0 skipped; model 257.00 KiB -> 68.00 KiB (3.78x smaller)

- :func:`quantize_` replaces linear layers, convolutions and embeddings by integer layers, in place;
  :func:`replace_norms_` and :func:`replace_attention_` replace norms and attention, and
  :func:`fuse_decoder_` computes the blocks of a language model in one call.
- :func:`gptq_` does the same with integers of small error, which it finds with data.
- :func:`prepare_`, :func:`calibrate` and :func:`convert_` are for static quantization, with the
  observers of :mod:`torchquant.observers`; :func:`prepare_qat_` and :func:`convert_` are for
  quantization-aware training, whose stages are in :mod:`torchquant.qat`. :func:`verify` compares
  the converted model with the trained model. :func:`to_float_` converts back.
- :func:`save` and :func:`load` store a model in a safetensors file. :func:`load_checkpoint` and
  :func:`save_checkpoint` read and write the checkpoints of other libraries.
- :mod:`torchquant.configs` has the configurations, :mod:`torchquant.nn` the layers,
  :mod:`torchquant.ops` the operators, and :mod:`torchquant.functional` their specification in plain
  torch. :mod:`torchquant.cpu` selects the instruction set, :mod:`torchquant.cuda` the path on GPUs.
"""

from torchquant import algorithms, configs, cpu, cuda, functional, nn, observers, ops, qat
from torchquant.algorithms.adaround import adaround_
from torchquant.algorithms.awq import awq_
from torchquant.algorithms.bias_correction import correct_bias_
from torchquant.algorithms.equalize import equalize_
from torchquant.algorithms.gptq import gptq_
from torchquant.algorithms.hqq import hqq_
from torchquant.algorithms.rotate import rotate_
from torchquant.algorithms.smoothquant import smoothquant_
from torchquant.analysis.verify import VerifyReport, verify
from torchquant.configs import (
    Dynamic,
    Fusion,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    QuantizationConfig,
    Static,
    Weights,
)
from torchquant.convert.calibrate import calibrate
from torchquant.convert.convert import convert_
from torchquant.convert.norms import NormReport, NormsReport, replace_norms_, restore_norms_
from torchquant.convert.prepare import prepare_
from torchquant.convert.qat import prepare_qat_
from torchquant.convert.quantize import quantize_
from torchquant.convert.stages import QATSchedule
from torchquant.convert.to_float import to_float_
from torchquant.files.load import load
from torchquant.files.save import save
from torchquant.integrations.checkpoints import (
    CheckpointReport,
    CheckpointRow,
    load_checkpoint,
    save_checkpoint,
)
from torchquant.integrations.peft.register import register_on_import as _register_peft
from torchquant.integrations.pretrained import refuse_on_import as _refuse_save_pretrained
from torchquant.integrations.transformers.attention import (
    AttentionReport,
    AttentionRow,
    replace_attention_,
    restore_attention_,
)
from torchquant.integrations.transformers.decoder import (
    DecoderReport,
    DecoderRow,
    fuse_decoder_,
    unfuse_decoder_,
)
from torchquant.nn import QATLinear, QuantizedIntxLinear, QuantizedLinear
from torchquant.ops import PackedWeight, quantized_linear
from torchquant.report import (
    CalibrationReport,
    FusionReport,
    LayerReport,
    QuantizationReport,
    Report,
    RowReport,
)
from torchquant.scheme import (
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    quant_range,
)
from torchquant.training.configuration import QATConfig, TrainingConfig
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
    "AttentionReport",
    "AttentionRow",
    "CalibrationReport",
    "CheckpointReport",
    "CheckpointRow",
    "DecoderReport",
    "DecoderRow",
    "Dynamic",
    "FakeQuantize",
    "Fusion",
    "FusionReport",
    "Granularity",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8WeightOnlyConfig",
    "IntxActivationIntxWeightConfig",
    "IntxWeightOnlyConfig",
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
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedIntxLinear",
    "QuantizedLinear",
    "Report",
    "RowReport",
    "Static",
    "TrainingConfig",
    "VerifyReport",
    "Weights",
    "__version__",
    "adaround_",
    "algorithms",
    "awq_",
    "calibrate",
    "configs",
    "convert_",
    "correct_bias_",
    "cpu",
    "cuda",
    "equalize_",
    "functional",
    "fuse_decoder_",
    "gptq_",
    "hqq_",
    "load",
    "load_checkpoint",
    "nn",
    "observers",
    "ops",
    "parameter_groups",
    "prepare_",
    "prepare_qat_",
    "qat",
    "quant_range",
    "quantize_",
    "quantized_linear",
    "replace_attention_",
    "replace_norms_",
    "report_nonfinite",
    "restore_attention_",
    "restore_norms_",
    "rotate_",
    "save",
    "save_checkpoint",
    "smoothquant_",
    "to_float_",
    "unfuse_decoder_",
    "verify",
]

_register_peft()
_refuse_save_pretrained()
