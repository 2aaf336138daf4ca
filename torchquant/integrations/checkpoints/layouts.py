"""The three layouts that save_checkpoint writes: what each holds, and its quantization_config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchquant import functional
from torchquant.configs import Dynamic, QuantizationConfig, Static
from torchquant.integrations.checkpoints import awq, compressed_tensors, gptq
from torchquant.integrations.checkpoints.schemes import FORMATS, described
from torchquant.integrations.checkpoints.stored import Integers
from torchquant.nn.base import QuantizedModule
from torchquant.nn.kinds import kind_of, weight_shape
from torchquant.scheme import PerGroup
from torchquant.version import __version__


class Layout:
    """One layout, for one model.

    Args:
        model: the model to write.
        scale_dtype: the dtype of scales.

    Attributes:
        notes: sentences for the report.
        followers: names of layers that share the weight of a layer before them. Nothing is written
            for them but their biases.
    """

    kinds: tuple[str, ...] = ("linear",)
    describes_followers = False
    has_activations = False

    def __init__(self, model: nn.Module, scale_dtype: torch.dtype) -> None:
        self.scale_dtype = scale_dtype
        self.notes: list[str] = []
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
        }
        first: dict[int, str] = {}
        self.followers = {
            name
            for name, layer in self.layers.items()
            if layer.shared_weight is not None
            and first.setdefault(id(layer.shared_weight), name) != name
        }
        self.floats = [
            name
            for name, module in model.named_modules()
            if not isinstance(module, QuantizedModule) and _kind_name(module) == "linear"
        ]
        active = (layer.config.activations is not None for layer in self.layers.values())
        if not self.has_activations and any(active):
            self.notes.append(
                "The layout says nothing about activations; readers leave them in float."
            )

    def refusal(self, name: str, layer: QuantizedModule) -> str | None:
        """Why the layout does not hold a layer, or None."""
        kind = _kind_name(layer)
        return None if kind in self.kinds else f"the layout has no {kind} layers"

    def form(self, layer: QuantizedModule) -> str:
        """How the layout holds a layer, in words."""
        raise NotImplementedError

    def tensors(self, layer: QuantizedModule) -> dict[str, Tensor]:
        """The tensors of a layer, without its bias."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        raise NotImplementedError

    def kept(self) -> dict[str, QuantizedModule]:
        """The layers that the quantization_config describes: those with integers."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if (self.describes_followers or name not in self.followers)
            and self.refusal(name, layer) is None
        }

    def scaled(self, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """The tensors with scales in the wanted dtype."""
        scale = tensors[name].to(self.scale_dtype)
        if not bool(torch.isfinite(scale).all() and (scale != 0).all()):
            raise ValueError(
                f"save_checkpoint: scale_dtype must hold all scales, but {self.scale_dtype} makes "
                "some 0 or infinite; use torch.float32 or torch.bfloat16"
            )
        return {**tensors, name: scale}


class GPTQLayout(Layout):
    """GPTQ: the most common bits and groups, and ``dynamic`` for the other layers."""

    def __init__(self, model: nn.Module, scale_dtype: torch.dtype) -> None:
        super().__init__(model, scale_dtype)
        forms = Counter(_bits_and_group(layer) for layer in self.kept().values())
        self.main = forms.most_common(1)[0][0] if forms else (4, None)
        # In version 1, readers differ where a zero point without sign is 0.
        lowest = (_lowest_zero_point(layer) for layer in self.kept().values())
        self.version_2 = any(lowest)

    def refusal(self, name: str, layer: QuantizedModule) -> str | None:
        reason = super().refusal(name, layer)
        if reason is not None:
            return reason
        (outputs, inputs), bits = weight_shape(layer), layer.config.weights.bits
        if bits not in gptq.BITS:
            return f"the layout has 2, 3, 4 or 8 bits, not {bits}"
        if inputs * bits % 32 or outputs * bits % 32 or (bits == 3 and inputs % 32):
            return f"{bits} bits of {inputs} inputs and {outputs} outputs do not fill words"
        return None

    def form(self, layer: QuantizedModule) -> str:
        return f"GPTQ, {layer.config.weights}"

    def tensors(self, layer: QuantizedModule) -> dict[str, Tensor]:
        integers = integers_of_layer(layer)
        found = gptq.tensors_of(integers, _group(layer))
        if not self.version_2:
            found["qzeros"] = gptq.as_version_1(found["qzeros"], integers.weights.bits)
        return self.scaled(found, "scales")

    def config(self) -> dict[str, Any]:
        kept = self.kept()
        bits, size = self.main
        dynamic: dict[str, Any] = {}
        for name, layer in kept.items():
            if _bits_and_group(layer) != self.main:
                own = _bits_and_group(layer)
                dynamic[f"+:^{re.escape(name)}$"] = {"bits": own[0], "group_size": own[1] or -1}
        for name in [*self.floats, *(name for name in self.layers if name not in kept)]:
            dynamic[f"-:^{re.escape(name)}$"] = {}
        return {
            "quant_method": gptq.NAME,
            "bits": bits,
            "group_size": size or -1,
            "desc_act": False,
            "sym": all(layer.config.weights.symmetric for layer in kept.values()),
            "lm_head": "lm_head" in kept,
            "checkpoint_format": "gptq_v2" if self.version_2 else "gptq",
            "meta": {"quantizer": [f"torchquant:{__version__}"]},
            **({"dynamic": dynamic} if dynamic else {}),
        }


class AWQLayout(Layout):
    """AWQ: layers of 4 bits whose groups are the most common ones."""

    def __init__(self, model: nn.Module, scale_dtype: torch.dtype) -> None:
        super().__init__(model, scale_dtype)
        self.size: Any = ...
        sizes = Counter(_group(layer) for layer in self.kept().values())
        self.size = sizes.most_common(1)[0][0] if sizes else None

    def refusal(self, name: str, layer: QuantizedModule) -> str | None:
        reason = super().refusal(name, layer)
        if reason is not None:
            return reason
        (outputs, inputs), size = weight_shape(layer), _group(layer)
        if layer.config.weights.bits != awq.BITS:
            return f"the layout has 4 bits, not {layer.config.weights.bits}"
        if outputs % awq.EACH:
            return f"{outputs} outputs do not fill words of {awq.EACH}"
        if size is not None and inputs % size:
            return f"the layout has no shorter last group ({inputs} inputs in groups of {size})"
        if self.size is not ... and size != self.size:
            return f"all layers of the layout have groups of {self.size or 'a channel'}"
        return None

    def form(self, layer: QuantizedModule) -> str:
        return f"AWQ, {layer.config.weights}"

    def tensors(self, layer: QuantizedModule) -> dict[str, Tensor]:
        return self.scaled(awq.tensors_of(integers_of_layer(layer)), "scales")

    def config(self) -> dict[str, Any]:
        kept = self.kept()
        others = [*self.floats, *(name for name in self.layers if name not in kept)]
        return {
            "quant_method": awq.NAME,
            "bits": awq.BITS,
            "group_size": self.size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": others or None,
        }


class CompressedTensorsLayout(Layout):
    """compressed-tensors: a scheme for each configuration."""

    kinds = ("linear", "embedding")
    describes_followers = True  # with the scheme of the table whose integers they have
    has_activations = True

    def __init__(self, model: nn.Module, scale_dtype: torch.dtype) -> None:
        super().__init__(model, scale_dtype)
        parts = [layer.config.activations for layer in self.kept().values()]
        if any(isinstance(part, Static) and part.range[0] % 2 for part in parts):
            self.notes.append(
                "Static activations of the model have no lowest integer (-128 in 8 bits), which "
                "the layout does not say; readers use it for values below the range."
            )

    def refusal(self, name: str, layer: QuantizedModule) -> str | None:
        reason = super().refusal(name, layer)
        if reason is not None:
            return reason
        inputs, size = weight_shape(layer)[1], _group(layer)
        if size is not None and inputs % size:
            return f"the layout has no shorter last group ({inputs} inputs in groups of {size})"
        if not isinstance(layer.config.activations, (Dynamic, Static, type(None))):
            return f"the layout does not describe {layer.config.activations}"
        return None

    def form(self, layer: QuantizedModule) -> str:
        return f"compressed-tensors {_format(layer.config)}, {layer.config.weights}"

    def tensors(self, layer: QuantizedModule) -> dict[str, Tensor]:
        packed = _format(layer.config) == FORMATS[0]
        found = compressed_tensors.tensors_of(integers_of_layer(layer), packed)
        if isinstance(layer.config.activations, Static):
            state: Any = layer
            found["input_scale"] = state.input_scale
            if not layer.config.activations.symmetric:
                found["input_zero_point"] = state.input_zero_point.to(torch.int8)
        return self.scaled(found, "weight_scale")

    def config(self) -> dict[str, Any]:
        kept = self.kept()
        groups: dict[QuantizationConfig, list[str]] = {}
        for name, layer in kept.items():
            groups.setdefault(_plain(layer.config), []).append(name)
        classes = {
            name: "Embedding" if layer.is_table else "Linear" for name, layer in kept.items()
        }
        entries, formats = {}, set()
        for place, (config, names) in enumerate(groups.items()):
            own = {classes[name] for name in names}
            others = {classes[name] for name in kept if name not in set(names)}
            # A class stands for all its layers if no other scheme has one of them.
            targets = names if own & others else sorted(own)
            entry = described(config, targets, _format(config) == FORMATS[0])
            entries[f"group_{place}"] = entry
            formats.add(entry["format"])
        ignored = [*self.floats, *(name for name in self.layers if name not in kept)]
        return {
            "quant_method": compressed_tensors.NAME,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": entries,
            "ignore": ignored,
            "kv_cache_scheme": None,
        }


LAYOUTS: dict[str, Callable[[nn.Module, torch.dtype], Layout]] = {
    gptq.NAME: GPTQLayout,
    awq.NAME: AWQLayout,
    compressed_tensors.NAME: CompressedTensorsLayout,
}


def integers_of_layer(layer: QuantizedModule) -> Integers:
    """The canonical tensors of a layer, with integers that are not packed.

    Example:
        >>> from torchquant.nn import QuantizedIntxLinear
        >>> integers_of_layer(QuantizedIntxLinear(64, 32)).qweight.shape
        torch.Size([32, 64])
    """
    state: Any = {**layer.unpacked()}
    weights, inputs = layer.config.weights, weight_shape(layer)[1]
    qweight = state["qweight"]
    if qweight.dtype == torch.uint8:
        qweight = functional.unpack_integers(qweight, weights.bits, inputs)
    scale = state.get("qweight_scale", layer.qweight_scale)
    zero_point = state.get("qweight_zero_point", layer.qweight_zero_point)
    zero_point = None if zero_point is None else zero_point.to(torch.int8)
    return Integers(qweight, scale, zero_point, weights)


def _kind_name(module: nn.Module) -> str:
    kind = kind_of(module)
    return "" if kind is None else kind.name


def _group(layer: QuantizedModule) -> int | None:
    granularity = layer.config.weights.granularity
    return granularity.group_size if isinstance(granularity, PerGroup) else None


def _bits_and_group(layer: QuantizedModule) -> tuple[int, int | None]:
    return layer.config.weights.bits, _group(layer)


def _lowest_zero_point(layer: QuantizedModule) -> bool:
    """True if a zero point is the lowest integer, 0 without a sign."""
    zero_point = layer.qweight_zero_point
    lowest = -(1 << (layer.config.weights.bits - 1))
    return zero_point is not None and bool((zero_point == lowest).any())


def _format(config: QuantizationConfig) -> str:
    """Layers with weights and activations of 8 bits are stored as int8."""
    return FORMATS[1] if config.weights.bits == 8 and config.activations else FORMATS[0]


def _plain(config: QuantizationConfig) -> QuantizationConfig:
    """A configuration without what the layout does not say."""
    weights = replace(config.weights, narrow_range=None)
    activations = config.activations
    if isinstance(activations, Static):
        activations = replace(activations, narrow_range=None, observer=None)
    return QuantizationConfig(weights, activations)


__all__ = ["integers_of_layer"]
