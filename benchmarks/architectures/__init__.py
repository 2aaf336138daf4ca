"""The architectures of the zoo: 127 float models, by the package that they come from.

Every model is built from a configuration, with random weights from a fixed seed; nothing is
downloaded. Two are trained models, whose weights are in packages.
"""

from . import (
    images,
    own,
    transformers_decoders,
    transformers_signals,
    transformers_text,
    transformers_vision,
)
from .architecture import Architecture, Inputs, tensors

__all__ = ["ARCHITECTURES", "Architecture", "Inputs", "tensors"]

ARCHITECTURES: tuple[Architecture, ...] = tuple(
    architecture
    for file in (
        transformers_text,
        transformers_decoders,
        transformers_vision,
        transformers_signals,
        own,
        images,
    )
    for architecture in file.ARCHITECTURES
)
