"""ObservedQuantizer: fake quantization with the scale of an observed range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant import ops
from torchquant.functional._checks import describe
from torchquant.training.layer_part import LayerPart
from torchquant.training.observers import MovingAverageMinMaxObserver, Observer
from torchquant.training.ranges import update_qparams, update_qparams_operator
from torchquant.training.state import adopt_shapes, inside_backward

_NAN = float("nan")


class ObservedQuantizer(LayerPart):
    """Rounds a tensor to the values of its integers and observes its range in training.

    In training mode each batch updates the observer and then the scale; in evaluation mode the
    scale stays. Gradients pass straight through where the rounded value is within the integer
    range, and are 0 elsewhere.

    State: ``scale`` float32 (NaN until there is a range) and ``zero_point`` int32 of the scale's
    shape, ``observer_enabled`` and ``fake_quant_enabled`` uint8 ``[1]``, and the observer's state.
    So a checkpoint from the middle of a schedule resumes in its stage. Set the switches with the
    methods below; do not write into their buffers.

    Args:
        observer: a ``MinMaxObserver`` or ``MovingAverageMinMaxObserver``, or another
            :class:`~torchquant.observers.Observer` whose range is that of its values; None means
            ``MovingAverageMinMaxObserver()``: 8 bits, asymmetric, per tensor.
        observer_enabled, fake_quant_enabled: initial values of the switches.

    Raises:
        TypeError: observer is not an Observer, or searches all batches for its range.
        RuntimeError: a forward that does not observe runs before there is a range.

    Example:
        >>> quantizer = ObservedQuantizer(MovingAverageMinMaxObserver(bits=4))
        >>> quantizer(torch.tensor([-1.0, 0.25, 2.0]))
        tensor([-1.0000,  0.2000,  2.0000])
        >>> quantizer.qparams()
        (tensor([0.2000]), tensor([-3], dtype=torch.int32))
        >>> quantizer.freeze().eval()(torch.tensor([9.0]))
        tensor([2.])
    """

    scale: Tensor
    zero_point: Tensor
    observer_enabled: Tensor
    fake_quant_enabled: Tensor
    observer: Observer

    def __init__(
        self,
        observer: Observer | None = None,
        *,
        observer_enabled: bool = True,
        fake_quant_enabled: bool = True,
    ) -> None:
        super().__init__()
        if observer is None:
            observer = MovingAverageMinMaxObserver()
        if not isinstance(observer, Observer):
            raise TypeError(
                "ObservedQuantizer: observer must be a torchquant observer such as "
                f"MovingAverageMinMaxObserver(), got {describe(observer)}"
            )
        if type(observer).calculate_range is not Observer.calculate_range:
            raise TypeError(
                "ObservedQuantizer: observer must be one whose range is that of its values, such "
                f"as MinMaxObserver(), got {type(observer).__name__}, which searches all batches "
                "for a range; use it with prepare_(model, config) and calibrate(model, loader)"
            )
        self.observer = observer
        shape, device = observer.min_val.shape, observer.min_val.device
        scale = torch.full(shape, _NAN, dtype=torch.float32, device=device)
        self.register_buffer("scale", scale)
        zero_point = torch.zeros(shape, dtype=torch.int32, device=device)
        self.register_buffer("zero_point", zero_point)
        for name, value in (
            ("observer_enabled", observer_enabled),
            ("fake_quant_enabled", fake_quant_enabled),
        ):
            flag = torch.tensor([bool(value)], dtype=torch.uint8, device=device)
            self.register_buffer(name, flag)
        # Copies of the two buffers' values, so that a forward need not wait for the device.
        self._observing, self._quantizing = bool(observer_enabled), bool(fake_quant_enabled)
        self._has_scale = False

    @property
    def qmin(self) -> int:
        """The least integer."""
        return self.observer.qmin

    @property
    def qmax(self) -> int:
        """The greatest integer."""
        return self.observer.qmax

    @property
    def observing(self) -> bool:
        """Whether training batches update the range."""
        return self._observing

    @property
    def quantizing(self) -> bool:
        """Whether a forward rounds its input."""
        return self._quantizing

    def enable_observer(self, enabled: bool = True) -> ObservedQuantizer:
        """Set whether training batches update the range; returns the module."""
        self.observer_enabled.fill_(bool(enabled))
        self._observing = bool(enabled)
        return self

    def enable_fake_quant(self, enabled: bool = True) -> ObservedQuantizer:
        """Set whether a forward rounds its input or returns it unchanged; returns the module."""
        self.fake_quant_enabled.fill_(bool(enabled))
        self._quantizing = bool(enabled)
        return self

    def freeze(self) -> ObservedQuantizer:
        """Keep the scale from now on; returns the module."""
        return self.enable_observer(False)

    def forward(self, input: Tensor) -> Tensor:
        """Fake-quantize float32, bfloat16 or float16; the result has input's dtype and shape.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: input is on another device, or its scales have another shape than those of
                earlier batches.
            RuntimeError: nothing was observed yet and this call does not observe.
        """
        self.check_input(input, self.scale)
        if self._observing and self.training:
            self.observe(input)
        if not self._quantizing:
            return input
        if not self._has_scale and not (self._observing and self.training):
            self._require_scale()
        return ops.fake_quantize(
            input,
            self.scale,
            self.zero_point,
            qmin=self.qmin,
            qmax=self.qmax,
            granularity=self.observer.granularity,
        )

    def observe(self, input: Tensor) -> None:
        """Update range and scale with one batch; inside a backward pass, do nothing."""
        observer = self.observer
        observer(input)
        if self.scale.shape != observer.min_val.shape:
            with torch.inference_mode(False):
                self.scale = torch.full_like(observer.min_val, _NAN)
                self.zero_point = torch.zeros_like(observer.min_val, dtype=torch.int32)
        state = (observer.min_val, observer.max_val, self.scale, self.zero_point)
        if torch.compiler.is_compiling():
            update_qparams_operator(*state, self.qmin, self.qmax, observer.symmetric)
        elif not inside_backward():
            update_qparams(*state, self.qmin, self.qmax, observer.symmetric)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """``(scale float32, zero_point int32)`` for a deployed layer: the buffers, not copies.

        Raises:
            RuntimeError: nothing was observed yet.
        """
        if not self._has_scale:
            self._require_scale()
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        return f"observer_enabled={self._observing}, fake_quant_enabled={self._quantizing}"

    def _require_scale(self) -> None:
        """Raise if there is no scale yet; waits for the device, once."""
        if torch.compiler.is_compiling() or self.scale.is_meta:
            return
        if self.scale.numel() == 0 or bool(self.scale.isnan().any()):
            raise RuntimeError(
                f"{self.title()}: there is no range yet; run batches in training mode "
                "with the observer enabled first, or load a state dict"
            )
        self._has_scale = True

    def _state_replaced(self) -> None:
        self._has_scale = False
        if not self.observer_enabled.is_meta:
            self._observing = bool(self.observer_enabled)
            self._quantizing = bool(self.fake_quant_enabled)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        adopt_shapes(self, state_dict, prefix, "scale", "zero_point")
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


__all__ = ["ObservedQuantizer"]
