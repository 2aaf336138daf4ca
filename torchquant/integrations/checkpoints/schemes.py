"""The ``quantization_config`` of compressed-tensors checkpoints: which layer has which integers.

``config_groups`` has schemes, each with the layers that it is for (``targets``: names, regular
expressions after ``re:``, or names of classes), the integers of their weights, and what happens to
their inputs. ``ignore`` lists layers that stay in float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchquant.configs import Dynamic, QuantizationConfig, Static
from torchquant.integrations.checkpoints.stored import DAMAGED, UNKNOWN, Unreadable
from torchquant.scheme import PerGroup

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How the weights and the inputs of some layers are quantized.

    Attributes:
        targets: the layers.
        bits: of a weight.
        symmetric: whether weights have no zero points.
        group_size: the inputs that share a scale; None for a scale per channel or per tensor.
        activations: a part of a configuration, or None.
    """

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    group_size: int | None
    activations: Any


def schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """The schemes of a checkpoint.

    Raises:
        Unreadable: a format or a scheme is none that our layers have.

    Example:
        >>> weights = {"num_bits": 4, "strategy": "group", "group_size": 128}
        >>> group = {"targets": ["Linear"], "weights": weights}
        >>> schemes({"format": "pack-quantized", "config_groups": {"group_0": group}})[0].group_size
        128
    """
    for part in ("transform_config", "sparsity_config"):
        found = config.get(part) or {}
        if found and found.get("format", "") != "dense":
            raise Unreadable(f"{part} must be empty, got {found}", UNKNOWN)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise Unreadable(f"config_groups must be a table of schemes, got {groups!r}", DAMAGED)
    return [_scheme(name, group, config.get("format")) for name, group in groups.items()]


def scheme_of(name: str, module: nn.Module, found: list[Scheme]) -> Scheme | None:
    """The scheme of a layer: by its name, by a regular expression, or by its class."""

    def matches(target: str, step: int) -> bool:
        if step == 0:
            return target == name
        if step == 1:
            return target.startswith("re:") and re.match(target[3:], name) is not None
        return any(cls.__name__ == target for cls in type(module).__mro__)

    for step in range(3):
        for scheme in found:
            if any(matches(target, step) for target in scheme.targets):
                return scheme
    return None


def _scheme(name: str, group: Any, default: Any) -> Scheme:
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise Unreadable(f"{where} must describe weights, got {group!r}", DAMAGED)
    form = group.get("format") or default
    if form not in FORMATS:
        raise Unreadable(
            f"{where} must have one of the formats {', '.join(FORMATS)}, got {form!r}", UNKNOWN
        )
    if group.get("output_activations") is not None:
        raise Unreadable(f"{where} must leave outputs in float, got output_activations", UNKNOWN)
    weights = group["weights"]
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    bits = weights.get("num_bits", 8)
    fits = weights.get("type", "int") == "int" and isinstance(bits, int) and 2 <= bits <= 8
    if not fits or strategy not in ("tensor", "channel", "group"):
        raise Unreadable(
            f"{where} must have integer weights of 2 to 8 bits per tensor, per channel or in "
            f"groups, got type {weights.get('type', 'int')}, num_bits {bits!r}, strategy "
            f"{strategy!r}",
            UNKNOWN,
        )
    if strategy == "group" and not (isinstance(size, int) and size > 0):
        raise Unreadable(f"{where} must have a positive group_size, got {size!r}", DAMAGED)
    return Scheme(
        tuple(group.get("targets", ())),
        bits,
        bool(weights.get("symmetric", True)),
        size if strategy == "group" else None,
        _activations(where, group.get("input_activations")),
    )


def _activations(where: str, values: Any) -> Dynamic | Static | None:
    if values is None:
        return None
    bits, symmetric = values.get("num_bits", 8), bool(values.get("symmetric", True))
    dynamic, strategy = values.get("dynamic", False), values.get("strategy")
    if values.get("type", "int") == "int" and bits in range(2, 9):
        if dynamic is True and strategy == "token":
            return Dynamic(bits, symmetric)
        if dynamic is False and strategy in ("tensor", None):
            return Static(bits, symmetric, narrow_range=False)
    raise Unreadable(
        f"{where} must have integer inputs, dynamic per token or static per tensor, or float "
        f"inputs, got {values}",
        UNKNOWN,
    )


def described(config: QuantizationConfig, targets: list[str], packed: bool) -> dict[str, Any]:
    """The entry of ``config_groups`` for layers of one configuration.

    Example:
        >>> from torchquant.configs import Weights
        >>> entry = described(QuantizationConfig(Weights(4), None), ["Linear"], True)
        >>> entry["weights"]["strategy"], entry["input_activations"]
        ('channel', None)
    """
    granularity, activations = config.weights.granularity, config.activations
    size = granularity.group_size if isinstance(granularity, PerGroup) else None
    weights = {
        "num_bits": config.weights.bits,
        "type": "int",
        "symmetric": config.weights.symmetric,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    inputs = None
    if activations is not None:
        dynamic = isinstance(activations, Dynamic)
        inputs = {
            "num_bits": activations.bits,
            "type": "int",
            "symmetric": activations.symmetric,
            "strategy": "token" if dynamic else "tensor",
            "dynamic": dynamic,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": FORMATS[0] if packed else FORMATS[1],
    }


__all__ = ["described", "schemes"]
