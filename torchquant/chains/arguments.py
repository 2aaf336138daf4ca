"""One name for each function, its modules, its methods and its spellings; arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchquant.graph.trace import Call, function_named


def arguments_of(call: Call, module: nn.Module | None) -> tuple[str, Mapping[str, Any] | None]:
    """The name of what is called and its arguments by name; None if they are not understood.

    Example:
        >>> from torchquant.graph.trace import Ref
        >>> arguments_of(Call("method", "flatten", (Ref(3), 1)), None)
        ('flatten', {'input': Ref(index=3), 'start_dim': 1})
    """
    if module is not None:
        if isinstance(module, nn.Identity):  # also in place of a folded batch norm
            return "identity", {}
        name = _MODULES.get(type(module))
        name = name or _MODULES.get(getattr(type(module), "original_class", type(module)))
        if name is None or len(call.args) != 1 or call.kwargs:
            return "", None
        keys = _ATTRIBUTES.get(name, ())
        return name, {"input": call.args[0], **{key: getattr(module, key, None) for key in keys}}
    if call.kind == "method":
        name = call.target.removesuffix("_") if call.target in _IN_PLACE else call.target
    else:
        function = function_named(call.target)
        name = _FUNCTIONS.get(function, getattr(function, "__name__", ""))
    signature = _SIGNATURES.get(name)
    if signature is None:
        return name, {}
    if len(call.args) > len(signature) and not signature[-1].startswith("*"):
        return name, None
    values: dict[str, Any] = {}
    for place, key in enumerate(signature):
        if key.startswith("*"):
            rest = call.args[place:]
            single = len(rest) == 1 and isinstance(rest[0], (tuple, list))
            values[key[1:]] = tuple(rest[0]) if single else tuple(rest)
        elif place < len(call.args):
            values[key] = call.args[place]
    for key, value in call.kwargs.items():
        key = {"axis": "dim", "a": "input", "tensor": "input"}.get(key, key)
        if key not in signature and key not in _IGNORED and f"*{key}" not in signature:
            return name, None
        values[key] = value
    return name, values


_IGNORED = ("inplace", "return_indices", "antialias", "recompute_scale_factor", "alpha")
_IN_PLACE = ("add_", "mul_", "relu_", "sigmoid_", "hardtanh_", "clamp_", "clamp_min_")

_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.ZeroPad1d: "zero_pad",
    nn.ZeroPad2d: "zero_pad",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.Upsample: "interpolate",
    nn.UpsamplingNearest2d: "interpolate",
    nn.Flatten: "flatten",
    nn.Dropout: "identity",
    nn.Dropout1d: "identity",
    nn.Dropout2d: "identity",
    nn.AlphaDropout: "identity",
    nn.FeatureAlphaDropout: "identity",
}
_POOL = ("kernel_size", "stride", "padding")
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hardtanh": ("min_val", "max_val"),
    "gelu": ("approximate",),
    "leaky_relu": ("negative_slope",),
    "max_pool1d": (*_POOL, "dilation", "ceil_mode", "return_indices"),
    "max_pool2d": (*_POOL, "dilation", "ceil_mode", "return_indices"),
    "avg_pool1d": (*_POOL, "ceil_mode", "count_include_pad"),
    "avg_pool2d": (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool1d": ("output_size",),
    "adaptive_avg_pool2d": ("output_size",),
    "adaptive_max_pool1d": ("output_size", "return_indices"),
    "adaptive_max_pool2d": ("output_size", "return_indices"),
    "batch_norm": ("eps", "running_mean", "running_var"),
    "layer_norm": ("normalized_shape", "eps"),
    "zero_pad": ("padding",),
    "pixel_shuffle": ("upscale_factor",),
    "pixel_unshuffle": ("downscale_factor",),
    "channel_shuffle": ("groups",),
    "interpolate": ("size", "scale_factor", "mode", "align_corners"),
    "flatten": ("start_dim", "end_dim"),
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.iadd: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.multiply: "mul",
    operator.sub: "sub",
    operator.isub: "sub",
    torch.subtract: "sub",
    operator.truediv: "div",
    operator.itruediv: "div",
    torch.divide: "div",
    torch.true_divide: "div",
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    torch.relu_: "relu",
    F.relu_: "relu",
    torch.concat: "cat",
    torch.concatenate: "cat",
    F.max_pool1d: "max_pool1d",
    F.max_pool2d: "max_pool2d",
    F.dropout: "dropout",
    F.dropout2d: "dropout",
    F.hardtanh_: "hardtanh",
    F.leaky_relu_: "leaky_relu",
    F.upsample: "interpolate",
    F.upsample_nearest: "interpolate",
}
_BOTH = ("input", "other")
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "relu": ("input",),
    "relu6": ("input",),
    "hardtanh": ("input", "min_val", "max_val"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "silu": ("input",),
    "gelu": ("input", "approximate"),
    "tanh": ("input",),
    "sigmoid": ("input",),
    "hardswish": ("input",),
    "hardsigmoid": ("input",),
    "leaky_relu": ("input", "negative_slope"),
    "add": _BOTH,
    "mul": _BOTH,
    "sub": _BOTH,
    "div": _BOTH,
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "getitem": ("input", "index"),
    "pad": ("input", "pad", "mode", "value"),
    "pixel_shuffle": ("input", "upscale_factor"),
    "pixel_unshuffle": ("input", "downscale_factor"),
    "adaptive_max_pool1d": ("input", "output_size", "return_indices"),
    "adaptive_max_pool2d": ("input", "output_size", "return_indices"),
    "max_pool1d": ("input", *_POOL, "dilation", "ceil_mode", "return_indices"),
    "max_pool2d": ("input", *_POOL, "dilation", "ceil_mode", "return_indices"),
    "avg_pool1d": ("input", *_POOL, "ceil_mode", "count_include_pad"),
    "avg_pool2d": ("input", *_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool1d": ("input", "output_size"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "mean": ("input", "dim", "keepdim"),
    "cat": ("tensors", "dim"),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners"),
    "flatten": ("input", "start_dim", "end_dim"),
    "view": ("input", "*shape"),
    "reshape": ("input", "*shape"),
    "squeeze": ("input", "*dim"),
    "dropout": ("input", "p", "training"),
    "contiguous": ("input", "memory_format"),
}


def attributes_of(module: nn.Module) -> list[str]:
    """The names of the attributes with which a known module computes.

    Example:
        >>> attributes_of(nn.LeakyReLU())
        ['negative_slope']
    """
    name = _MODULES.get(type(module), "")
    return [key for key in _ATTRIBUTES.get(name, ()) if key in module.__dict__]
