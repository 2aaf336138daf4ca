"""PACT: a quantizer of activations whose clip is learned with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchquant import ops
from torchquant.functional._checks import MIN_SCALE
from torchquant.scheme import quant_range
from torchquant.training.layer_part import LayerPart
from torchquant.training.learned_state import clamp_operator


class PACTQuantizer(LayerPart):
    """Clips activations to [0, alpha] with a learned alpha and rounds to ``2^bits`` levels.

    The gradient of alpha is the sum of the output's gradients where the input is at least alpha.
    The gradient of the input is the output's inside the range and 0 outside.

    State: ``alpha`` float32 ``[1]`` (parameter). It is kept positive like LSQ's step and stays
    float32 under ``.to(torch.bfloat16)``.

    Args:
        bits: 2 to 8, unsigned.
        alpha: initial clip.
        device: device of the state.

    Raises:
        ValueError: bits is not an integer from 2 to 8, or alpha is not a positive number.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks"
    (2018).

    Example:
        >>> quantizer = PACTQuantizer(bits=2, alpha=3.0)
        >>> quantizer(torch.tensor([-1.0, 1.4, 5.0]))
        tensor([0., 1., 3.], grad_fn=<...>)
    """

    alpha: nn.Parameter

    def __init__(
        self, bits: int = 8, alpha: float = 6.0, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = quant_range(bits, signed=False)
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not MIN_SCALE * self.qmax <= alpha <= torch.finfo(torch.float32).max:
            raise ValueError(f"PACTQuantizer: alpha must be a positive number, got {alpha!r}")
        value = torch.full((1,), float(alpha), dtype=torch.float32, device=device)
        self.alpha = nn.Parameter(value)

    def forward(self, input: Tensor) -> Tensor:
        """Fake-quantize float32, bfloat16 or float16 ``[...]``; the result has input's dtype.

        Raises:
            TypeError: input is not a float32, bfloat16 or float16 tensor.
            ValueError: input is on another device.
        """
        self.check_input(input, self.alpha)
        floor = MIN_SCALE * self.qmax
        if torch.compiler.is_compiling():
            if self.training:
                clamp_operator(self.alpha.detach(), floor)
        else:
            self.alpha.data.clamp_(min=floor)
        # In this order of comparison NaN stays NaN.
        clipped = torch.where(input >= self.alpha, self.alpha, input.float()).relu()
        scale = self.qparams()[0]
        return ops.fake_quantize(clipped, scale, qmin=self.qmin, qmax=self.qmax).to(input.dtype)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """``(scale float32 [1], zero_point int32 [1])``, for a deployed layer."""
        scale = (self.alpha.detach() / self.qmax).clamp(min=MIN_SCALE)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range [{self.qmin}, {self.qmax}]"


__all__ = ["PACTQuantizer"]
