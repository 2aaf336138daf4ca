"""fuse_decoder_ and unfuse_decoder_: all blocks of a language model in one call."""

# transformers may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from torchquant.integrations.transformers.decoder_forward import FAILURES, FusedForward, forward_of
from torchquant.integrations.transformers.decoder_structure import LAYERS, Refusal, decoders
from torchquant.report import Report, RowReport


@dataclass(frozen=True)
class DecoderRow(RowReport):
    """What a verb did to one block of a decoder.

    Attributes:
        name: the block's name in the model.
        kind: the name of its class.
        action: "fused", "restored" or "left".
        reason: why the block was left; empty if it was not.

    Example:
        >>> print(DecoderRow("layers.0", "LlamaDecoderLayer", "left", "it has hooks"))
        left: layers.0 (LlamaDecoderLayer): it has hooks
    """

    action: Literal["fused", "restored", "left"]
    reason: str = ""


@dataclass(frozen=True, repr=False)
class DecoderReport(Report):
    """Result of :func:`torchquant.fuse_decoder_` and :func:`torchquant.unfuse_decoder_`.

    Attributes:
        rows: one row per block, in the order of the model's modules.
        notes: sentences that the user should read.
        action: what the verb does to a block: "fused" or "restored".

    Example:
        >>> names = [f"model.layers.{index}" for index in range(4)]
        >>> DecoderReport(tuple(DecoderRow(name, "LlamaDecoderLayer", "fused") for name in names))
        <DecoderReport: 4 of 4 blocks fused>
    """

    rows: tuple[DecoderRow, ...]
    notes: tuple[str, ...] = ()
    action: Literal["fused", "restored"] = "fused"

    @property
    def changed(self) -> tuple[DecoderRow, ...]:
        """The blocks that the verb changed."""
        return tuple(row for row in self.rows if row.action == self.action)

    def summary(self) -> str:
        """One line with the number of blocks."""
        return f"{len(self.changed)} of {len(self.rows)} blocks {self.action}"


def fuse_decoder_(model: nn.Module) -> DecoderReport:
    """Compute all blocks of a quantized language model in one call, in place.

    A decoding step of transformers calls about 50 operators in 10 modules for each block. After
    this function, one call computes the blocks of a decoder such as Llama's: norms, projections,
    rotary embedding, attention to the cache, feed-forward layers. Prompts and steps of one sequence
    on the CPU are served, in evaluation, without gradients; ``generate`` and calls of the model use
    them. All other calls run the model's own forward: several sequences, padding, training,
    requested attention weights or hidden states.

    Keys and values may be in a :class:`~torchquant.integrations.transformers.FusedCache`, in
    transformers' ``DynamicCache`` (whose layers are replaced by those of a ``FusedCache``), or in a
    :class:`~torchquant.integrations.transformers.QuantizedCache`. A call with a cache that another
    forward has filled goes on with its tokens, and the other way round.

    Results differ from those of the model's own forward by the rounding of float32, and by the
    steps of quantized activations and caches that this rounding moves. They do not depend on the
    number of threads; with a float cache, a token's result does not depend on how the sequence is
    cut into calls.

    A decoder is recognised by the names of its parts, and compared with its own forward on a few
    random tokens: queries, keys and the output of each block must agree within 1 %. Sliding
    windows, limits of attention scores, mixtures of experts and other blocks are left. Every linear
    layer of the blocks must be quantized.

    A change of a module of the blocks (another module, a hook, another forward, an attribute)
    ends the fusion with a warning, unless the model passes the comparison again. Changes of classes
    are not noticed. The fusion is not saved; call this function again after
    :func:`torchquant.load`. :func:`unfuse_decoder_` undoes it.

    Args:
        model: a model of the transformers library, or one that holds such a model.

    Returns:
        A report with one row per block.

    Raises:
        TypeError: model is not a module.
        ValueError: no decoder of the model can be fused. The model is unchanged.

    Example:
        >>> import torchquant
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> _ = torchquant.quantize_(model)
        >>> torchquant.fuse_decoder_(model)
        <DecoderReport: 2 of 2 blocks fused>
    """
    _check_model("fuse_decoder_", model)
    rows: list[DecoderRow] = []
    made: list[tuple[nn.Module, FusedForward]] = []
    for name, decoder in decoders(model):
        reason = ""
        if forward_of(decoder) is None:
            try:
                made.append((decoder, FusedForward(decoder, name)))
            except FAILURES as error:
                known = isinstance(error, Refusal)
                reason = str(error) if known else f"{type(error).__name__}: {error}"
        action: Literal["fused", "left"] = "left" if reason else "fused"
        rows += _rows(name, decoder, action, reason)
    if not any(row.action == "fused" for row in rows):
        raise ValueError(
            "fuse_decoder_: model must hold a decoder with quantized layers and blocks such as "
            f"Llama's, got {type(model).__name__}: "
            + (rows[0].reason if rows else "no module has blocks with self_attn and mlp")
        )
    for decoder, forward in made:  # from here on the model changes; nothing can fail
        decoder.__dict__["forward"] = forward
    return DecoderReport(tuple(rows))


def unfuse_decoder_(model: nn.Module) -> DecoderReport:
    """Undo :func:`fuse_decoder_`, in place: the model's own forward runs again.

    Caches that fused calls have filled stay valid.

    Args:
        model: a model, with or without fused decoders.

    Returns:
        A report with one row per block that was restored.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> unfuse_decoder_(nn.Linear(8, 8))
        <DecoderReport: 0 of 0 blocks restored>
    """
    _check_model("unfuse_decoder_", model)
    rows: list[DecoderRow] = []
    for name, module in model.named_modules():
        if forward_of(module) is not None:
            del module.__dict__["forward"]
            rows += _rows(name, module, "restored", "")
    return DecoderReport(tuple(rows), (), "restored")


def _rows(
    name: str, decoder: nn.Module, action: Literal["fused", "restored", "left"], reason: str
) -> list[DecoderRow]:
    prefix = f"{name}.{LAYERS}" if name else LAYERS
    return [
        DecoderRow(f"{prefix}.{index}", type(block).__name__, action, reason)
        for index, block in enumerate(decoder.get_submodule(LAYERS).children())
    ]


def _check_model(verb: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}")
