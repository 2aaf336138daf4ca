"""ObservedQuantizer: an observer and the fake quantization with the scales that follow from it."""

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
    """Rounds a tensor to what its integers will stand for; watches its range while training.

    In training mode each batch updates the observer and with it the scale; in evaluation mode the
    scale stays. Gradients pass straight through where the rounded value lies in the integer range.

    State: ``scale`` float32 (NaN until there is a range) and ``zero_point`` int32 of the scale's
    shape, ``observer_enabled`` and ``fake_quant_enabled`` uint8 ``[1]``, and the observer's. So a
    checkpoint taken in the middle of a schedule resumes in the stage it was taken in. The switches
    are set with the methods below, not by writing into their buffers.

    Args:
        observer: any :class:`~torchquant.observers.Observer`; None is
            ``MovingAverageMinMaxObserver()``: 8 bits, asymmetric, per tensor.
        observer_enabled, fake_quant_enabled: the switches at the start.

    Raises:
        TypeError: observer is none.
        RuntimeError: a forward without observing, before there is a range.

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
        # What the two buffers say, so that a forward need not wait for the device.
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
        """Whether training batches move the range."""
        return self._observing

    @property
    def quantizing(self) -> bool:
        """Whether what passes is rounded."""
        return self._quantizing

    def enable_observer(self, enabled: bool = True) -> ObservedQuantizer:
        """Let training batches move the range, or not; returns the module."""
        self.observer_enabled.fill_(bool(enabled))
        self._observing = bool(enabled)
        return self

    def enable_fake_quant(self, enabled: bool = True) -> ObservedQuantizer:
        """Round what passes, or let it pass as it is; returns the module."""
        self.fake_quant_enabled.fill_(bool(enabled))
        self._quantizing = bool(enabled)
        return self

    def freeze(self) -> ObservedQuantizer:
        """Keep the scale from now on; returns the module."""
        return self.enable_observer(False)

    def forward(self, input: Tensor) -> Tensor:
        """float32, bfloat16 or float16 to the same dtype and shape.

        Raises:
            TypeError, ValueError: no float tensor, on another device, or other scales' shape.
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
        """Update range and scale with one batch; nothing happens inside a backward pass."""
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
        """``(scale float32, zero_point int32)``: what a deployed layer takes over, not copied.

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
