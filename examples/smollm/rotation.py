"""Two ways of removing outlier channels, which do not change the float results."""

# The optional packages may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def rotate(model: Any) -> None:
    """Rotate the residual stream randomly, so that it has no outlier channel.

    RMSNorm without its weights commutes with a rotation Q: every layer that reads the stream takes
    `W * g` (the norm's weights) and then `W @ Q`, every layer that writes it `Q.T @ W`. The model
    computes what it did before, on a stream whose outliers are spread over all channels.
    QuaRot (arXiv:2404.00456), the part of it that costs nothing at run time.

    Args:
        model: a Llama-like model without biases, changed in place.
    """
    import torch

    # The head must get a weight of its own instead of the embedding's.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    width = model.config.hidden_size
    normal = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    rotation = torch.linalg.qr(normal)[0].float()
    model.model.embed_tokens.weight.data @= rotation
    for norm, readers in norms_and_readers(model):
        for reader in readers:
            reader.weight.data *= norm.weight.data
            reader.weight.data @= rotation
        norm.weight.data.fill_(1)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data = rotation.T @ writer.weight.data


def norms_and_readers(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every norm of the residual stream, with the layers that use its output."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    yield model.model.norm, [model.lm_head]


def balance(model: Any, calibration: torch.Tensor) -> None:
    """Equalize the input channels of every `down_proj`, which the rotation cannot change.

    Its input is `silu(gate) * up`: dividing a row of `up_proj` by s and multiplying the column that
    reads it changes nothing. With x the root mean square of the channel and w the largest weight of
    the column, `s = sqrt(x / w)`. SmoothQuant (arXiv:2211.10438) between two linear layers.

    Args:
        model: a Llama-like model without biases, changed in place.
        calibration: int64 `[B, T]`, tokens of ordinary text.
    """
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    ranges = input_ranges(model, downs, calibration)
    for layer in model.model.layers:
        up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
        largest = down.data.abs().amax(0).clamp_min(1e-5)
        scale = (ranges[layer.mlp.down_proj].clamp_min(1e-5) / largest).sqrt()
        up.data /= scale[:, None]
        down.data *= scale


def input_ranges(
    model: nn.Module, layers: Sequence[nn.Module], tokens: torch.Tensor
) -> dict[nn.Module, torch.Tensor]:
    """Root mean square of each layer's input channels over `tokens` `[B, T]`."""
    squares: dict[nn.Module, Any] = dict.fromkeys(layers, 0.0)

    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares[layer] += inputs[0].flatten(0, -2).square().mean(0) / len(tokens)

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    for window in tokens:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return {layer: square.sqrt() for layer, square in squares.items()}
