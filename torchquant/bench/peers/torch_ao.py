"""torch.ao's dynamic linear, the deprecated stack, on each of its engines; and oneDNN's operator.

`torch.ao.nn.quantized.dynamic.Linear` is what `quantize_dynamic` puts into a model.
"""

# mypy: disable-error-code="no-untyped-call,assignment"

from __future__ import annotations

import warnings

import torch

from torchquant.bench.peers.base import (
    Call,
    LinearPeer,
    NotInThisTorch,
    float_linear,
    quantize_weight,
)


def require_quantized_tensors() -> None:
    """Raise where torch no longer has them; torch has warned of their removal since 2.13."""
    names = ("qint8", "quint8", "quantize_per_tensor", "quantize_per_channel")
    if gone := [name for name in names if not hasattr(torch, name)]:
        raise NotInThisTorch(f"torch {torch.__version__} has no torch.{gone[0]} any more")


def select_engine(engine: str) -> None:
    """Make torch's quantized operators run on `engine`, without their announcements.

    Raises:
        NotInThisTorch: this torch has no quantized tensors.
        RuntimeError: this torch has no such engine.
    """
    require_quantized_tensors()
    warnings.filterwarnings("ignore")  # the whole stack announces its removal
    engines = torch.backends.quantized.supported_engines
    if engine not in engines:
        raise RuntimeError(
            f"this torch has no quantized engine {engine!r}, only {', '.join(engines)}"
        )
    torch.backends.quantized.engine = engine


class TorchAoDynamic(LinearPeer):
    """Per-channel int8 weights, uint8 activations with one scale per tensor: its only scheme."""

    engine: str
    layer: torch.nn.Module

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        select_engine(self.engine)

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        try:
            from torch.ao.nn.quantized.dynamic import Linear
            from torch.ao.quantization import per_channel_dynamic_qconfig
        except ImportError as error:
            raise NotInThisTorch(f"torch {torch.__version__} has no torch.ao: {error}") from error

        linear = float_linear(weight, bias)
        linear.qconfig = per_channel_dynamic_qconfig
        self.layer = Linear.from_float(linear)

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        layer = self.layer
        return {"module": lambda: layer(x)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__, "engine": self.engine}


class TorchAoX86(TorchAoDynamic):
    """torch.ao's default on x86, which picks oneDNN or FBGEMM by the CPU's features."""

    engine = "x86"


class TorchAoOnednn(TorchAoDynamic):
    """oneDNN, on every CPU."""

    engine = "onednn"


class TorchAoFbgemm(TorchAoDynamic):
    """FBGEMM, on every CPU."""

    engine = "fbgemm"


class TorchAoQnnpack(TorchAoDynamic):
    """QNNPACK, made for phones."""

    engine = "qnnpack"


class OnednnPointwise(LinearPeer):
    """`torch.ops.onednn.qlinear_pointwise`, Inductor's int8 linear, with the cheapest eager
    quantization before it.

    The operator takes an activation that is already uint8 with one scale; choosing the scale and
    quantizing is what makes it dynamic, so both are part of the call.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require_quantized_tensors()

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        warnings.filterwarnings("ignore")  # the quantized dtypes announce their removal
        qweight, scale = quantize_weight(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(qweight, None)
        self.scale, self.bias = scale, bias
        self.zero_point = torch.zeros(len(scale), dtype=torch.int32)

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        choose, quantize = torch._choose_qparams_per_tensor, torch.quantize_per_tensor
        linear = torch.ops.onednn.qlinear_pointwise.default
        packed, scale, zero_point, bias = self.packed, self.scale, self.zero_point, self.bias

        def call() -> torch.Tensor:
            x_scale, x_zero_point = choose(x)
            qx = quantize(x, x_scale, x_zero_point, torch.quint8).int_repr()
            result: torch.Tensor = linear(
                qx,
                x_scale,
                x_zero_point,
                packed,
                scale,
                zero_point,
                bias,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
            return result

        return {"eager": call}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__}
