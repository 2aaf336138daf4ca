"""What a module is that belongs to no kind of layer, in the words of a report."""

from __future__ import annotations

from torch import nn

from torchquant.report import NORMS

# Libraries that quantize: the beginning of a class's full name, the library's name, and the parts
# of the full name of which one shows that a class is quantized; without parts, every class is.
_LIBRARIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("torch.ao.nn.", "torch.ao", (".quantized.", ".qat.")),
    ("torchao.", "torchao", ()),
    ("bitsandbytes.", "bitsandbytes", ("8bit", "4bit", "NF4", "FP4", "SwitchBack")),
    ("optimum.quanto.", "optimum-quanto", ()),
    ("quanto.", "quanto", ()),
    ("hqq.", "HQQ", ()),
    ("auto_gptq.", "AutoGPTQ", ("Quant",)),
    ("gptqmodel.", "GPTQModel", ("Quant",)),
    ("awq.", "AutoAWQ", ("WQLinear",)),
    ("compressed_tensors.", "compressed-tensors", ()),
)
_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def other_library(module: nn.Module) -> str | None:
    """How another library has quantized a module, or None if none has.

    Example:
        >>> from torch.ao.nn.quantized import dynamic
        >>> other_library(dynamic.Linear(4, 4)), other_library(nn.Linear(4, 4))
        ('already quantized by torch.ao (Linear)', None)
    """
    tensors = [*module._parameters.values(), *module._buffers.values()]
    for cls in (type(module), *(type(tensor) for tensor in tensors if tensor is not None)):
        library = _library(f"{cls.__module__}.{cls.__name__}")
        if library is not None:
            prepared = ".qat." in cls.__module__ + "."
            done = "prepared for training" if prepared else "quantized"
            return f"already {done} by {library} ({cls.__name__})"
    return None


def _library(cls: str) -> str | None:
    for beginning, library, parts in _LIBRARIES:
        if cls.startswith(beginning) and (not parts or any(part in cls for part in parts)):
            return library
    return None


def family_of(module: nn.Module, name: str) -> str:
    """What a module with parameters is, for the summary of a report.

    Args:
        module: a module that belongs to no kind of layer.
        name: its name in the model.

    Example:
        >>> family_of(nn.Conv2d(3, 8, 3), "stem"), family_of(nn.LSTM(4, 4), "rnn")
        ('convolutions', 'recurrent layers')
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    flat = not any(_dimensions(p) > 1 for p in parameters)
    cls = type(module).__name__.lower()
    if isinstance(module, _NORM_TYPES) or ("norm" in cls and flat and not module._modules):
        return NORMS
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent layers"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embeddings"
    if isinstance(module, nn.MultiheadAttention) or "in_proj_weight" in module._parameters:
        return "attention in_proj"
    expert = "expert" in cls or "moe" in cls or "expert" in name.lower()
    if expert and any(_dimensions(p) > 2 for p in parameters):
        return "experts"
    return "raw parameters"


def _dimensions(parameter: nn.Parameter) -> int:
    return 0 if nn.parameter.is_lazy(parameter) else parameter.dim()


__all__ = ["family_of", "other_library"]
