"""Conversions of a float torch model to each engine, in place. Libraries load when used."""

# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Convert = Callable[["nn.Module"], object]


@dataclass(frozen=True)
class Engine:
    """A way of running the model.

    Args:
        description: printed below the table.
        convert: changes the float model in place, and can return a report; None if the engine does
            not run torch modules.
        requires: modules that must be installed.
    """

    description: str
    convert: Convert | None = None
    requires: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.requires if find_spec(module) is None]


def keep(model: nn.Module) -> None:
    """Keep the float model."""


def to_bfloat16(model: nn.Module) -> None:
    """Convert weights and arithmetic to bfloat16."""
    import torch

    model.to(torch.bfloat16)


def torch_ao(backend: str) -> Convert:
    """torch.ao's dynamic int8 on one of its backends; its own choice, "x86", is FBGEMM here.

    Weights have one scale per channel, which is more accurate than one per tensor, and as fast.
    """

    def convert(model: nn.Module) -> None:
        import torch
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        torch.backends.quantized.engine = backend
        quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig}, inplace=True)

    return convert


def torchao(model: nn.Module) -> None:
    """torchao's dynamic int8, in eager mode."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


@dataclass(frozen=True)
class Switches:
    """Options of torchquant in addition to int8 linear layers.

    Args:
        activations, projections: as in `torchquant.Fusion`, for `quantize_`.
        norms: norms, with the addition before them, as torchquant's operators.
        gated: a language model's `silu(gate) * up` in one pass.
        attention: in bfloat16, by torchquant's operator, also in a float32 model.
        bfloat16: everything between the linears in bfloat16.
    """

    activations: bool = False
    projections: bool = False
    norms: bool = False
    gated: bool = False
    attention: bool = False
    bfloat16: bool = False


FUSED = Switches(activations=True, projections=True)  # quantize_'s default


def torchquant(
    switches: Switches = FUSED,
    activation_symmetric: bool = False,
    config: Callable[[], object] | None = None,
) -> Convert:
    """torchquant's quantization, with the options of ``switches``.

    Args:
        switches: in addition to the linear layers.
        activation_symmetric: of the default configuration, dynamic int8.
        config: makes another configuration.
    """

    def convert(model: nn.Module) -> object:
        import torchquant
        from harness import rewrite

        chosen: Any = torchquant.Int8DynamicActivationInt8WeightConfig(
            activation_symmetric=activation_symmetric
        )
        if config is not None:
            chosen = config()
        if switches.gated:  # before quantize_, which would fuse the activation into its layer
            rewrite.gate_mlps(model)
        fusion = torchquant.Fusion(
            activations=switches.activations, projections=switches.projections
        )
        report = torchquant.quantize_(model, chosen, fusion=fusion)
        if switches.norms:
            torchquant.replace_norms_(model)
            rewrite.add_in_norms(model)
        if switches.attention:
            torchquant.replace_attention_(model)
        if switches.bfloat16:
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
    "ao-onednn": Engine("torch.ao dynamic int8 per channel, oneDNN", torch_ao("onednn")),
    "ao-fbgemm": Engine("torch.ao dynamic int8 per channel, FBGEMM", torch_ao("fbgemm")),
    "torchao": Engine("torchao dynamic int8, eager", torchao, ("torchao",)),
}
