"""torchao, successor of torch.ao: `Int8DynamicActivationInt8WeightConfig`, eager and compiled."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch

from peers.base import Call, LinearPeer, float_linear


class TorchaoInt8(LinearPeer):
    """Per-token symmetric int8 activations, per-channel int8 weights, in eager mode."""

    model: torch.nn.Module

    def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        warnings.filterwarnings("ignore")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        self.model = torch.nn.Sequential(float_linear(weight, bias))  # quantize_ replaces children
        quantize_(self.model, Int8DynamicActivationInt8WeightConfig())

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        layer = self.model[0]  # type: ignore[index]
        return {"module": lambda: layer(x)}

    def about(self) -> dict[str, str]:
        return {"torch": torch.__version__, "torchao": version("torchao")}


class TorchaoInt8Compiled(TorchaoInt8):
    """The same layer through `torch.compile`, compiled per shape outside the measured time."""

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        torch._dynamo.reset()
        layer = torch.compile(self.model[0], dynamic=False)  # type: ignore[index]
        return {"compiled": lambda: layer(x)}
