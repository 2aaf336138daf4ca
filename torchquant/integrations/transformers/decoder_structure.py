"""Reads the plan of a step from the modules of a decoder, or says why there is none.

Only the structure is read: names of children, layers, norms, numbers. Whether a plan computes what
the decoder computes is compared by :mod:`torchquant.integrations.transformers.decoder_check`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.graph.modules import HOOKS
from torchquant.graph.recognize import activation_of
from torchquant.integrations.transformers.decoder_plan import DecoderBlock, DecoderPlan, Norm
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import kind_of
from torchquant.nn.norm import RMSNorm
from torchquant.nn.norm_probe import find_recipe
from torchquant.nn.norm_recipe import NormRecipe
from torchquant.nn.replaced_activation import ReplacedActivation

EMBEDDING, LAYERS, FINAL_NORM, ROTARY = "embed_tokens", "layers", "norm", "rotary_emb"
_BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "act_fn")
_WITHOUT_EFFECT = (nn.Dropout, nn.Identity)  # in evaluation
_CAPTURING = "transformers.utils.output_capturing"  # its hooks do nothing unless they are asked to
_WINDOWS = ("sliding_window", "attention_chunk_size")
_OUTPUTS = ("output_attentions", "output_hidden_states")
# What a configuration may lack, or keep under a private name.
_READ = ("is_causal", "return_dict", *_OUTPUTS, *(f"_{name}" for name in _OUTPUTS))


class Refusal(Exception):
    """A decoder has no plan; the text says why."""


@dataclass
class Known:
    """What was found out about norms and activations before, to find it out once."""

    recipes: dict[Any, NormRecipe | str] = field(default_factory=dict)
    functions: dict[Any, str | None] = field(default_factory=dict)


def decoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose blocks are called like Llama's, with their names in the model."""
    for name, module in model.named_modules():
        blocks = module._modules.get(LAYERS)
        described = hasattr(getattr(module, "config", None), "__dict__")
        if described and isinstance(blocks, nn.ModuleList) and len(blocks):
            first = blocks[0]._modules
            if "self_attn" in first and "mlp" in first:
                yield name, module


def plan_of(decoder: nn.Module, known: Known | None = None) -> DecoderPlan:
    """The plan of a decoder.

    Args:
        decoder: a module that :func:`decoders` found.
        known: what was found out about modules of this model before.

    Raises:
        Refusal: a step cannot compute what the decoder computes.
    """
    known = known or Known()
    config: Any = decoder.config
    _require(decoder, "", (EMBEDDING, LAYERS, FINAL_NORM, ROTARY))
    for name in _OUTPUTS:
        if getattr(config, name, False):
            raise Refusal(f"its configuration asks for {name}")
    if not getattr(config, "is_causal", True):
        raise Refusal("its attention is not causal")
    if getattr(config, "return_dict", True) is False:
        raise Refusal("its configuration asks for results as tuples (return_dict=False)")
    layers: Any = decoder._modules[LAYERS]
    if getattr(config, "num_hidden_layers", len(layers)) != len(layers):
        raise Refusal(f"its configuration names {config.num_hidden_layers} of {len(layers)} blocks")
    _check_modules(decoder)
    blocks, numbers = [], set()
    for index, layer in enumerate(layers):
        block, number = _block(layer, f"{LAYERS}.{index}", known)
        blocks.append(block)
        numbers.add(number)
    if len(numbers) != 1:
        raise Refusal("its blocks differ in heads, scale or activation")
    heads, kv_heads, head_dim, scale, activation = numbers.pop()
    final = _norm(decoder._modules[FINAL_NORM], FINAL_NORM, known)
    return DecoderPlan(tuple(blocks), heads, kv_heads, head_dim, scale, activation, final)


def watched(decoder: nn.Module, absent: Any) -> list[tuple[Any, str | None, Any]]:
    """What the plan of a decoder relies on, as entries of the C++ guard.

    Args:
        decoder: the module.
        absent: what stands for no value.
    """
    plain = (bool, int, float, str, tuple, type(None))
    config: Any = vars(decoder.config)
    entries: list[tuple[Any, str | None, Any]] = [
        (config, name, value)
        for name, value in config.items()
        if isinstance(value, plain) and name[0] != "_"
    ]
    entries += [(config, name, config.get(name, absent)) for name in _READ]
    entries.append((vars(decoder), "config", vars(decoder).get("config", absent)))
    children = tuple(part for item in decoder._modules.items() for part in item)
    entries.append((decoder._modules, None, children))
    for _, module in _computed(decoder):
        own = vars(module)
        entries.append((module, None, type(module)))
        for name in ("_modules", "_parameters", "_buffers"):
            contents = tuple(part for item in own[name].items() for part in item)
            entries.append((own[name], None, contents))
        for tensors in (own["_parameters"], own["_buffers"]):  # their memory and versions, too
            entries += [
                (tensors, key, value) for key, value in tensors.items() if value is not None
            ]
        for name, value in own.items():
            if (name in HOOKS and isinstance(value, dict)) or isinstance(value, plain):
                entries.append((own, name, value))
        entries.append((own, "forward", own.get("forward", absent)))
    return entries


def _require(module: nn.Module, place: str, names: tuple[str, ...]) -> None:
    """Raise unless a module has children of these names and no others that compute."""
    children: Mapping[str, Any] = module._modules
    missing = [name for name in names if children.get(name) is None]
    where = f"{place} ({type(module).__name__})" if place else type(module).__name__
    if missing:
        raise Refusal(f"{where} has no {' and no '.join(missing)}")
    further = [
        name
        for name, child in children.items()
        if name not in names and child is not None and type(child) not in _WITHOUT_EFFECT
    ]
    if further:
        raise Refusal(f"{where} has further parts: {', '.join(further)}")
    own = [name for name, value in (*module._parameters.items(),) if value is not None]
    if own:
        raise Refusal(f"{where} has parameters of its own: {', '.join(own)}")


def _check_modules(decoder: nn.Module) -> None:
    """Raise if a module does something else in its calls than its class does."""
    if decoder.training:
        raise Refusal("it is in training mode; call model.eval()")
    for name, module in _computed(decoder):
        if "forward" in module.__dict__:
            raise Refusal(f"{name}.forward was replaced")
        if any(not _does_nothing(hook) for hook in _hooks(module)):
            raise Refusal(f"{name} has hooks")
        if module.training:
            raise Refusal(f"{name} is in training mode")


def _computed(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are not called when a step runs."""
    called = (EMBEDDING, ROTARY)
    for name, module in decoder.named_modules():
        if name and name.partition(".")[0] not in called:
            yield name, module


def is_captured() -> bool:
    """True if transformers collects the outputs of blocks of an outer model in this call."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return collector is not None and collector.get() is not None


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in HOOKS:
        found = getattr(module, name, None)
        if isinstance(found, dict):
            yield from (found.values() if not name.endswith("_with_kwargs") else ())


def _does_nothing(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == _CAPTURING


_Numbers = tuple[int, int, int, float, str]


def _block(layer: nn.Module, place: str, known: Known) -> tuple[DecoderBlock, _Numbers]:
    _require(layer, place, _BLOCK)
    input_norm, attention, post_norm, feed_forward = (layer._modules[name] for name in _BLOCK)
    assert attention is not None and feed_forward is not None
    place_a, place_f = f"{place}.self_attn", f"{place}.mlp"
    has_norms = any(attention._modules.get(name) is not None for name in _HEAD_NORMS)
    _require(attention, place_a, (*_ATTENTION, *(_HEAD_NORMS if has_norms else ())))
    _require(feed_forward, place_f, _FEED_FORWARD)
    for name in _WINDOWS:
        value = getattr(attention, name, None)
        if value is not None:
            raise Refusal(f"{place_a} has a {name.replace('_', ' ')} ({value})")
    head_dim, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(head_dim, int) or not isinstance(scale, (int, float)):
        raise Refusal(f"{place_a} has no head_dim and scaling, which are numbers")
    q, k, v, o = (_layer(attention, place_a, name) for name in _ATTENTION)
    gate, up, down = (_layer(feed_forward, place_f, name) for name in _FEED_FORWARD[:3])
    norms = [
        _norm(attention._modules[name], f"{place_a}.{name}", known) if has_norms else None
        for name in _HEAD_NORMS
    ]
    block = DecoderBlock(
        input_norm=_norm(input_norm, f"{place}.input_layernorm", known),
        query=q,
        key=k,
        value=v,
        output=o,
        query_norm=norms[0],
        key_norm=norms[1],
        post_norm=_norm(post_norm, f"{place}.post_attention_layernorm", known),
        gate=gate,
        up=up,
        down=down,
    )
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    expected = heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, q.in_features
    sizes = q.out_features, k.out_features, v.out_features, o.out_features
    if sizes != expected or not kv_heads or heads % kv_heads or head_dim % 2:
        raise Refusal(f"{place_a} has projections to {sizes} channels for heads of {head_dim}")
    if any(norm is not None and len(norm) != head_dim for norm in _weights(norms)):
        raise Refusal(f"{place_a} normalizes all heads together")
    function = _function(feed_forward._modules["act_fn"], known)
    if function is None:
        raise Refusal(f"{place_f}.act_fn computes no function that torchquant has")
    return block, (heads, kv_heads, head_dim, float(scale), function)


def _weights(norms: list[Norm | None]) -> list[Tensor | None]:
    return [None if norm is None else norm.weight for norm in norms]


def _layer(owner: nn.Module, place: str, name: str) -> Any:
    """A quantized linear layer that a step can compute."""
    layer: Any = owner._modules[name]
    kind = kind_of(layer)
    if not isinstance(layer, QuantizedModule) or kind is None or kind.name != "linear":
        raise Refusal(
            f"{place}.{name} is a {type(layer).__name__} and no quantized linear layer; call "
            "torchquant.quantize_(model) first"
        )
    if not hasattr(layer, "decoder_arguments"):
        raise Refusal(f"{place}.{name} is a {type(layer).__name__}, which no step computes")
    if layer.activation != "none":
        raise Refusal(f"{place}.{name} applies {layer.activation} itself")
    if not layer.packed.is_cpu:
        raise Refusal(f"{place}.{name} is on {layer.packed.device}; steps run on the CPU")
    if layer.dtype != torch.float32:
        dtype = str(layer.dtype).removeprefix("torch.")
        raise Refusal(f"{place}.{name} works in {dtype}; call model.float()")
    return layer


def _norm(norm: Any, place: str, known: Known) -> Norm:
    recipe: Any = None
    if type(norm) is RMSNorm:
        weight, eps = norm.weight, norm.eps
    else:
        recipe = find_recipe(norm, known.recipes)
        if isinstance(recipe, str):
            raise Refusal(f"{place} ({type(norm).__name__}) is no RMSNorm: {recipe}")
        if recipe.family != "rms" or recipe.one_plus or recipe.bias or recipe.channels_first:
            raise Refusal(f"{place} ({type(norm).__name__}) is no RMSNorm with a weight alone")
        weight, eps = norm._parameters[recipe.weight] if recipe.weight else None, recipe.eps
    if weight is not None and (weight.dtype != torch.float32 or not weight.is_cpu):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise Refusal(f"{place} is {dtype} on {weight.device}; steps need float32 on the CPU")
    return Norm(weight, eps)


def _function(module: Any, known: Known) -> str | None:
    if isinstance(module, ReplacedActivation):
        return module.function
    options = ((name, repr(value)) for name, value in vars(module).items() if name[0] != "_")
    key = type(module), *sorted(options)
    if key not in known.functions:
        known.functions[key] = activation_of(module)
    return known.functions[key]
