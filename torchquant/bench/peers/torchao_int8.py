"""torchao, successor of torch.ao: `Int8DynamicActivationInt8WeightConfig`, eager and compiled."""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import time
import warnings
from importlib.metadata import version

import torch

from torchquant.bench.peers.base import Call, LinearPeer, float_linear

SECONDS_PER_SHAPE = 1.0


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
    """The same layer through `torch.compile`, compiled for each shape outside the measured time.

    Compiling takes seconds per shape (a tenth if Inductor's cache has it). Shapes are left out,
    and the results say so, as long as the average is above `SECONDS_PER_SHAPE`.
    """

    seen, spent = 0, 0.0

    def calls(self, x: torch.Tensor) -> dict[str, Call]:
        self.seen += 1
        if self.spent > SECONDS_PER_SHAPE * self.seen:
            raise RuntimeError(f"left out, compiling takes more than {SECONDS_PER_SHAPE} s a shape")
        start = time.perf_counter()
        torch._dynamo.reset()
        layer = torch.compile(self.model[0], dynamic=False)  # type: ignore[index]
        layer(x)
        self.spent += time.perf_counter() - start
        return {"compiled": lambda: layer(x)}
