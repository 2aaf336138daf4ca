"""Ways of turning a float torch model into an engine's own, in place. Libraries load when asked."""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Convert = Callable[["nn.Module"], object]


@dataclass(frozen=True)
class Engine:
    """A way of running the model.

    Args:
        description: for the reader of the table.
        convert: changes the float model in place, and may return a report; None where the engine
            does not run torch modules.
        requires: modules that must be installed.
    """

    description: str
    convert: Convert | None = None
    requires: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.requires if find_spec(module) is None]


def keep(model: nn.Module) -> None:
    """The float model as it is."""


def to_bfloat16(model: nn.Module) -> None:
    """Weights and arithmetic in bfloat16."""
    import torch

    model.to(torch.bfloat16)


def torch_ao(backend: str) -> Convert:
    """torch.ao's dynamic int8 on one of its backends; its own choice, "x86", is one of these."""

    def convert(model: nn.Module) -> None:
        import torch

        torch.backends.quantized.engine = backend
        torch.ao.quantization.quantize_dynamic(
            model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True
        )

    return convert


def torchao(model: nn.Module) -> None:
    """torchao's dynamic int8, in eager mode."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def torchquant(
    activation_symmetric: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    bfloat16: bool = False,
) -> Convert:
    """torchquant's dynamic int8; everything between the linears in float32 or bfloat16."""

    def convert(model: nn.Module) -> object:
        import torchquant

        config = torchquant.Int8DynamicActivationInt8WeightConfig(
            activation_symmetric=activation_symmetric
        )
        report = torchquant.quantize_(model, config, filter_fn)
        if bfloat16:
            to_bfloat16(model)
        return report

    return convert


def saved_megabytes(model: nn.Module) -> float:
    """Size of the model's saved state."""
    import torch

    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell() / 1e6


TORCH_ENGINES = {
    "fp32": Engine("torch, float32", keep),
    "bf16": Engine("torch, bfloat16", to_bfloat16),
    "ao-onednn": Engine("torch.ao dynamic int8, oneDNN", torch_ao("onednn")),
    "ao-fbgemm": Engine("torch.ao dynamic int8, FBGEMM", torch_ao("fbgemm")),
    "torchao": Engine("torchao dynamic int8, eager", torchao, ("torchao",)),
    "torchquant": Engine("torchquant int8", torchquant()),
    "torchquant-symmetric": Engine(
        "torchquant int8, activations without zero points", torchquant(activation_symmetric=True)
    ),
    "torchquant-bf16": Engine("torchquant int8, the rest in bfloat16", torchquant(bfloat16=True)),
}
