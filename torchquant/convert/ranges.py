"""Prepared layers as convert_ sees them: do they have a range, and the layer to deploy."""

from __future__ import annotations

from torch import Tensor, nn

from torchquant.convert.adjustment import apply_adjustment
from torchquant.convert.calibration_hooks import InputObserver, hook_of, missing_range, release
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import kind_of
from torchquant.training.observers import Observer


class Calibrated:
    """A prepared float layer, and the range of its input over all processes.

    Args:
        layer: the float layer.
        hook: its hook.

    Example:
        >>> from torchquant.configs import Int8StaticActivationInt8WeightConfig
        >>> from torchquant.convert.calibration_hooks import observe_input
        >>> import torch
        >>> layer = nn.Linear(64, 32)
        >>> hook = observe_input(layer, "fc", Int8StaticActivationInt8WeightConfig())
        >>> Calibrated(layer, hook).missing_range()
        'HistogramObserver of fc: no batch reached it; call calibrate(model, loader) first'
        >>> hook.see(torch.linspace(-1, 1, 64))
        >>> Calibrated(layer, hook).to_quantized().extra_repr()[-61:]
        'int8 per channel, activations int8 per tensor with zero point'
    """

    def __init__(self, layer: nn.Module, hook: InputObserver) -> None:
        self.layer, self.config = layer, hook.config
        self.observer: Observer = hook.observer.reduced()
        self.shared: tuple[Tensor, Tensor] | None = None

    def share(self, qparams: tuple[Tensor, Tensor] | None) -> None:
        """Take the scale and zero point of a value that others read or make, too."""
        self.shared = qparams

    def missing_range(self) -> str | None:
        """Why the layer cannot be deployed yet, or None if it can."""
        return None if self.shared is not None else missing_range(self.observer)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the layer's input."""
        return self.shared or self.observer.calculate_qparams()

    def to_quantized(self) -> QuantizedModule:
        """The layer to deploy.

        Raises:
            TypeError, ValueError: the layer changed since it was prepared and cannot be quantized.
        """
        kind = kind_of(self.layer)
        assert kind is not None  # a layer of no kind is not prepared
        scale, zero_point = self.qparams()
        layer_class = kind.layer_class(self.config, self.layer)
        quantized: QuantizedModule = layer_class.from_float(  # type: ignore[call-arg]
            self.layer, self.config, input_scale=scale, input_zero_point=zero_point
        )
        apply_adjustment(self.layer, quantized)
        return quantized

    def release(self) -> None:
        """Remove the hook of the layer, and what an algorithm found for it."""
        release(self.layer)


def calibrated(layer: nn.Module) -> Calibrated | None:
    """What convert_ needs of a prepared layer; None for other modules.

    With torch.distributed, all processes must call this function for the same layers.

    Example:
        >>> calibrated(nn.Linear(4, 4)) is None
        True
    """
    hook = hook_of(layer)
    return None if hook is None else Calibrated(layer, hook)
