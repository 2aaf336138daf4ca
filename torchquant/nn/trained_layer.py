"""TrainedLayer: what linear layers and convolutions in training share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchquant.configs import QuantizationConfig
from torchquant.nn.base import TrainedModule
from torchquant.nn.qat_parts import (
    ACTIVATION_PARTS,
    ACTIVATIONS,
    input_quantizer,
    weight_quantizer,
)
from torchquant.training.configuration import TrainingConfig, training_config
from torchquant.training.learned_steps import LSQQuantizer
from torchquant.training.observed_quantizer import ObservedQuantizer


class TrainedLayer(TrainedModule):
    """A layer with one weight, whose input and weight are rounded.

    A subclass sets ``quantized_class`` (the layer to deploy) and ``names`` (what messages call one
    such layer, and several).

    Example:
        >>> from torchquant.nn import QATConv2d, QATLinear
        >>> issubclass(QATLinear, TrainedLayer), issubclass(QATConv2d, TrainedLayer)
        (True, True)
    """

    input_quantizer: ObservedQuantizer | LSQQuantizer | None
    qweight_quantizer: LSQQuantizer | None
    fused_activations: ClassVar[tuple[str, ...]] = ("relu",)
    has_compute: ClassVar[bool] = True
    renamed: ClassVar[Mapping[str, str]] = {}
    quantized_class: ClassVar[Any]
    names: ClassVar[tuple[str, str]]

    def init_layer(
        self, config: TrainingConfig, activation: str, features: int, outputs: int
    ) -> None:
        """Make the quantizers; the weight is registered already.

        Args:
            config: how the layer is trained.
            activation: the activation that the layer applies.
            features: the number of features of the input.
            outputs: the number of outputs, the weight's first dimension.
        """
        device = self.weight.device
        self.input_quantizer = input_quantizer(config, features, device)
        self.qweight_quantizer = weight_quantizer(config, outputs, features, device)
        self.init_training(config, activation, device)
        self.was_called = False

    @property
    def weight_quantizer(self) -> LSQQuantizer | None:
        """The quantizer with the learned steps of the weight, or None."""
        return self.qweight_quantizer

    @classmethod
    def config_refusal(cls, config: TrainingConfig) -> str | None:
        """The reason why no layer of this kind can be trained with ``config``, or None."""
        deployed, part = config.deployed(), config.activations
        reason: str | None = cls.quantized_class.class_for(deployed).config_refusal(deployed)
        if reason is None and part is not None and not isinstance(part, ACTIVATION_PARTS):
            return f"{cls.names[1]} cannot train {type(part).__name__} activations"
        return reason

    @classmethod
    def checked(
        cls, who: str, config: TrainingConfig | QuantizationConfig | None
    ) -> TrainingConfig:
        """The training for a configuration that this kind of layer takes.

        Raises:
            TypeError: config is not a configuration.
            ValueError: no layer of this kind can be trained with it.
        """
        config = training_config(who, config)
        reason = cls.config_refusal(config)
        if reason is not None:
            raise ValueError(f"{who}: config must fit a {cls.names[0]}, got {config}: {reason}")
        return config

    @classmethod
    def check_activation(cls, activation: str) -> None:
        """Raise a ValueError unless the layer can apply the activation."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"{cls.__name__}: activation must be none or relu, got {activation!r}")

    def missing_range(self) -> str | None:
        """Why :meth:`to_quantized` would raise RuntimeError: no range of the input, or None."""
        try:
            self.input_qparams()
        except RuntimeError as error:
            return str(error)
        return None

    def input_qparams(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of the input of the layer to deploy; None for dynamic activations.

        Raises:
            RuntimeError: no range has been observed or learned.
        """
        if self.input_quantizer is None:
            return None, None
        scale, zero_point = self.input_quantizer.qparams()
        return scale.detach(), zero_point + self.shift

    @property
    def shift(self) -> int:
        """Unsigned integers of a learned step are deployed as signed integers."""
        part = self.config.activations
        return 0 if part is None else int(part.deployed().range[0] - part.range[0])

    def check_finite(self, weight: Tensor) -> None:
        """Raise a ValueError if the weight to deploy holds NaN or infinities."""
        if not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(
                f"{type(self).__name__}.to_quantized: the weight must be finite, it holds NaN or "
                "infinity; training has diverged"
            )

    def state_text(self) -> str:
        """The activation and the stage, for ``extra_repr``."""
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return fused + ("" if self._quantizing else ", in float")


__all__ = ["TrainedLayer"]
