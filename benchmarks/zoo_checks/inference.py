"""Checks of the quantized model when it runs: outputs, fusion, generation, norms and attention."""

from __future__ import annotations

import tempfile
from math import prod
from typing import Any

import torch
from torch import Tensor

import torchquant
from torchquant.nn.kinds import weight_shape

from .case import (
    Case,
    FloatFails,
    Outcome,
    compared,
    cosine,
    decibels,
    quantized_layers,
    same_bits,
    same_values,
    state_of,
)

NEW_TOKENS = 8
LEAST_DECIBELS = 20.0  # a rounding that falls on the other side moves an int8 step
LEAST_NORM_COSINE = 0.9999


def runs(case: Case) -> Outcome:
    """``quantize_``, which changes nothing but the layers that it quantizes, and a call."""
    original, model = case.float_model(), case.float_model()
    random = torch.get_rng_state()
    torchquant.quantize_(model)
    if not torch.equal(random, torch.get_rng_state()):
        return Outcome("quantize_ draws random numbers", False)
    quantized = tuple(f"{name}." for name in quantized_layers(model))
    before, after = state_of(original), state_of(model)
    for name in before.keys() & after.keys():
        if not name.startswith(quantized) and not same_values(before[name], after[name]):
            return Outcome(f"quantize_ changes {name}", False)
    _ = case.outputs
    return Outcome("ok")


def share(case: Case) -> Outcome:
    """The share of the model's weights (matrices, embeddings, kernels) that are integers now."""
    quantized = sum(
        prod(weight_shape(case.quantized.get_submodule(name)))
        for name in quantized_layers(case.quantized)
    )
    left = sum(p.numel() for p in case.quantized.parameters() if p.dim() > 1)
    part = quantized / (quantized + left)
    return Outcome(f"{part:.0%}", None, part)


def cosine_fp32(case: Case) -> Outcome:
    """The least cosine between outputs of the float and of the quantized model."""
    least = cosine(case.expected, case.outputs)
    return Outcome(f"{least:.4f}", least >= case.architecture.least, least)


def cosine_bf16(case: Case) -> Outcome:
    """The same for a bfloat16 model, compared with the float32 model."""
    original = case.float_model().to(torch.bfloat16)
    try:
        reference = case.call(original, torch.bfloat16)
    except Exception as error:
        raise FloatFails from error
    model = case.float_model().to(torch.bfloat16)
    torchquant.quantize_(model)
    outputs = case.call(model, torch.bfloat16)
    if [tensor.dtype for tensor in outputs] != [tensor.dtype for tensor in reference]:
        return Outcome("other dtypes than the float model's", False)
    least = cosine(case.expected, outputs)
    # bfloat16 alone can send a token to another expert.
    enough = min(case.architecture.least, cosine(case.expected, reference) - 0.01)
    return Outcome(f"{least:.4f}", least >= enough, least)


def fusion(case: Case) -> Outcome:
    """Fusion against none: projections keep bits; activations change results by rounding."""
    none = case.call(
        case.quantized_model(fusion=torchquant.Fusion(activations=False, projections=False))
    )
    projections = case.call(
        case.quantized_model(fusion=torchquant.Fusion(activations=False, projections=True))
    )
    ratio = decibels(none, case.outputs)
    if not same_bits(none, projections):
        return Outcome(f"projections change bits: {decibels(none, projections):.0f} dB", False)
    return Outcome(f"same bits, {ratio:.0f} dB", ratio >= LEAST_DECIBELS, ratio)


def generation(case: Case) -> Outcome:
    """Greedy generation; the cache changes no token; the share of the float model's tokens.

    Where two tokens are nearly as likely, the rounding of the sums decides, and the sums are others
    with a cache. The logits of that step must then be almost the same.
    """
    if case.architecture.prompt is None:
        return Outcome("-", None)
    quantized = case.quantized_model()
    tokens, logits = _generated(case, quantized, True)
    expected, _ = _generated(case, case.float_model(), True)
    equal = (expected == tokens).double().mean().item()
    uncached, uncached_logits = _generated(case, quantized, False)
    if torch.equal(tokens, uncached):
        return Outcome(f"{equal:.2f}", value=equal)
    if not torch.equal(expected, _generated(case, case.float_model(), False)[0]):
        return Outcome(f"{equal:.2f}; float differs with a cache", None, equal)
    step = int((tokens != uncached).any(0).nonzero()[0])
    least = cosine([logits[step]], [uncached_logits[step]])
    if least >= case.architecture.least:
        return Outcome(f"{equal:.2f}; near tie", value=equal)
    return Outcome(f"other tokens with a cache: cosine of logits {least:.3f}", False, least)


def _generated(case: Case, model: Any, cache: bool) -> tuple[Tensor, list[Tensor]]:
    """The new tokens, and the logits of each."""
    torch.manual_seed(7)
    made = model.generate(
        **case.architecture.prompts(),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[:, -NEW_TOKENS:], list(made.logits)


def ties(case: Case) -> Outcome:
    """``tie_weights()``, which transformers calls in many places, changes nothing."""
    if not case.of_transformers:
        return Outcome("-", None)
    model: Any = case.quantized_model()
    model.tie_weights()
    return compared(case.outputs, case.call(model))


def pretrained(case: Case) -> Outcome:
    """``save_pretrained`` and ``from_pretrained``: the same bits, or a refusal that names us."""
    if not case.of_transformers:
        return Outcome("-", None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.quantized.save_pretrained(folder)  # type: ignore[operator]
        except Exception as error:
            if "torchquant" not in str(error):
                raise
            return Outcome("refused")
        found = compared(case.outputs, case.call(_from_pretrained(case, folder)))
    if found.ok:
        return found
    original: Any = case.float_model()
    with tempfile.TemporaryDirectory() as folder:
        try:
            original.save_pretrained(folder)
            again = compared(case.expected, case.call(_from_pretrained(case, folder)))
        except Exception as error:
            raise FloatFails from error
    if not again.ok:
        raise FloatFails
    return found


def _from_pretrained(case: Case, folder: str) -> Any:
    return type(case.quantized).from_pretrained(folder).eval()  # type: ignore[attr-defined]


def norms(case: Case) -> Outcome:
    """``replace_norms_`` on the float model: replaced of found, and the cosine; then the undo."""
    model = case.float_model()
    report = torchquant.replace_norms_(model)
    least = cosine(case.expected, case.call(model))
    text = f"{len(report.replaced)}/{len(report.norms)}, {least:.4f}"
    if not least >= LEAST_NORM_COSINE:
        return Outcome(text, False, least)
    torchquant.restore_norms_(model)
    undone = same_bits(case.call(model), case.expected)
    return Outcome(text if undone else f"{text}; undo changes numbers", undone, least)


def attention(case: Case) -> Outcome:
    """``replace_attention_`` on the float model: replaced of found, cosine; then the undo."""
    if not case.of_transformers:
        return Outcome("-", None)
    model = case.float_model()
    try:
        report = torchquant.replace_attention_(model)
    except ValueError as error:
        if not str(error).startswith("replace_attention_: "):
            raise
        return unless_changed("refused", case.call(model), case.expected)
    least = cosine(case.expected, case.call(model))
    text = f"{len(report.changed)}/{len(report.rows)}, {least:.4f}"
    if not least >= case.architecture.least:
        return Outcome(text, False, least)
    torchquant.restore_attention_(model)
    undone = same_bits(case.call(model), case.expected)
    return Outcome(text if undone else f"{text}; undo changes numbers", undone, least)


def unless_changed(text: str, a: list[Tensor], b: list[Tensor]) -> Outcome:
    """``text`` if the bits are the same, else what differs."""
    found = compared(a, b)
    return Outcome(text) if found.ok else Outcome(f"{text}, but {found.text}", False)
