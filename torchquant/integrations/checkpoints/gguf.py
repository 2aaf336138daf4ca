"""GGUF files (llama.cpp): tensors in blocks, under names of their own.

The package ``gguf`` reads the file, and its map of names says which tensor belongs to which key of
a transformers model. What else llama.cpp's converter changes depends on the architecture: rows of
queries and keys are in another order (``ROTATED``), norms hold ``weight + 1`` (``SHIFTED``). Files
of other architectures are refused, because nothing in them says what was changed.
"""

# gguf may be missing where this file is type-checked.
# mypy: disable-error-code="import-untyped,import-not-found,unused-ignore"

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchquant.configs import Weights
from torchquant.integrations.checkpoints.gguf_blocks import BLOCKS, Blocks, BlockType
from torchquant.integrations.checkpoints.gguf_fit import exact_zero_points, fit, values_of_blocks
from torchquant.integrations.checkpoints.nearest import row_chunks
from torchquant.integrations.checkpoints.stored import (
    DAMAGED,
    MISFIT,
    UNKNOWN,
    Contents,
    FloatTensor,
    Integers,
    StoredWeight,
    Unreadable,
    canonical,
)
from torchquant.nn.intx_weight import values_of
from torchquant.scheme import PerGroup

NAME = "GGUF"
MAGIC = b"GGUF"
PLAIN = ("qwen2", "qwen3")  # as in transformers, apart from names
ROTATED = ("llama",)  # rows of attn_q and attn_k: pairs that rotate together are neighbours
SHIFTED = ("gemma", "gemma2", "gemma3")  # norms hold weight + 1
_FLOATS = ("F64", "F32", "F16", "BF16")
_FROM_THE_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFWeight(StoredWeight):
    """A quantized matrix of a GGUF file.

    Args:
        tensor: the package's description of the tensor.
        order: for each row of the model the row of the file; None for the same order.

    Raises:
        Unreadable: the tensor is no matrix.
    """

    def __init__(self, tensor: Any, order: Tensor | None = None) -> None:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) != 2:
            raise Unreadable(f"{tensor.name} must be a matrix, got {list(shape)}", DAMAGED)
        self._tensor, self._order = tensor, order
        self.shape = (shape[0], shape[1])
        self.type = str(tensor.tensor_type.name)
        self.form = f"GGUF {self.type}"
        self._kind: BlockType | None = BLOCKS.get(self.type)
        if self._kind is None:
            self.why = f"{self.type} has no integers of ours"
        elif not self._kind.centred:
            self.why = f"{self.type} has a real minimum in each group"

    def _raw(self, first: int, last: int) -> Any:
        """The bytes of some rows of the model, a copy."""
        if self._order is None:
            return np.array(self._tensor.data[first:last])
        return np.array(self._tensor.data[self._order[first:last].numpy()])

    def _blocks(self, first: int, last: int) -> Blocks:
        assert self._kind is not None
        blocks = self._kind.blocks(torch.from_numpy(self._raw(first, last)))
        for part in (blocks.step, blocks.minimum):
            if part is not None and not bool(torch.isfinite(part).all()):
                raise Unreadable(
                    f"{self._tensor.name} must have finite scales, but some are not", DAMAGED
                )
        return blocks

    def rows(self, first: int, last: int) -> Tensor:
        """The float32 values of some rows."""
        if self._kind is None:
            from gguf.quants import dequantize

            raw = self._raw(first, last)
            return torch.from_numpy(dequantize(raw, self._tensor.tensor_type)).float()
        return values_of_blocks(self._blocks(first, last), self._kind.group)

    def integers(self) -> Integers | None:
        """The integers of a layer; None for a type with real minimums, or without integers."""
        if self._kind is None:
            return None
        integers, steps, zero_points = [], [], []
        for first, last in row_chunks(self.shape):
            blocks = self._blocks(first, last)
            zeros = None
            if blocks.minimum is not None:
                zeros = exact_zero_points(blocks, self._kind.bits)
                if zeros is None:
                    return None
            integers.append(blocks.q)
            steps.append(blocks.step)
            if zeros is not None:
                zero_points.append(zeros)
        q, zero_point = torch.cat(integers), None
        if zero_points:
            half = 1 << (self._kind.bits - 1)
            q = q - half
            zero_point = (torch.cat(zero_points) - half).to(torch.int8)
        self.why = ""
        return canonical(
            q, torch.cat(steps), zero_point, self._kind.bits, self._kind.group, self._tensor.name
        )

    def nearest(self, bits: int) -> tuple[Integers, float] | None:
        """Integers whose grid contains that of the blocks, off by a part of a step."""
        if self._kind is None or self._kind.centred:
            return None
        weights = Weights(bits, symmetric=False, granularity=PerGroup(self._kind.group))
        parts, error, norm = [], 0.0, 0.0
        for first, last in row_chunks(self.shape):
            blocks = self._blocks(first, last)
            parts.append(fit(blocks, bits, self._kind.group))
            values = values_of_blocks(blocks, self._kind.group)
            error += float((values_of(*parts[-1], weights) - values).double().square().sum())
            norm += float(values.double().square().sum())
        q, scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        integers = Integers(q, scale, zero_point, weights)
        return integers, math.sqrt(error / norm if norm > 0 else error)


def contents(path: Path, keys: Iterable[str]) -> Contents:
    """What a GGUF file holds for a model.

    Args:
        path: the file.
        keys: the keys of the model's state dict.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: the file is truncated or damaged.
        Unreadable: the architecture is unknown, or a tensor belongs to no key.
    """
    reader = _reader(path)
    architecture = _field(reader, "general.architecture")
    if architecture not in (*PLAIN, *ROTATED, *SHIFTED):
        known = ", ".join((*ROTATED, *PLAIN, *SHIFTED))
        raise Unreadable(
            f"its architecture must be one of {known}, got {architecture!r}: what llama.cpp's "
            "converter changed in others is not known here",
            UNKNOWN,
        )
    if (_field(reader, "split.count") or 1) > 1:
        raise Unreadable("it is one of several parts", "join them with llama.cpp's gguf-split")
    names = _names(keys, architecture, int(_field(reader, f"{architecture}.block_count") or 0))
    found = Contents(f"GGUF of architecture {architecture}")
    unknown = []
    for tensor in reader.tensors:
        key = names.get(tensor.name)
        if tensor.name in _FROM_THE_CONFIG:
            found.ignored[tensor.name] = "the model computes it from its configuration"
        elif key is None:
            unknown.append(tensor.name)
        else:
            _add(found, key, tensor, _order_of(reader, tensor, architecture), architecture)
    if unknown:
        raise Unreadable(
            f"the model has no place for {', '.join(unknown)}",
            "build it from the configuration of this file (transformers' "
            "AutoConfig.from_pretrained(folder, gguf_file=name))",
        )
    return found


def _add(found: Contents, key: str, tensor: Any, order: Tensor | None, architecture: str) -> None:
    kind = str(tensor.tensor_type.name)
    if kind not in _FLOATS:
        layer, _, part = key.rpartition(".")
        if part != "weight":
            raise Unreadable(f"{tensor.name} is {kind}, but {key} is no weight of a layer", MISFIT)
        found.weights[layer] = GGUFWeight(tensor, order)
        return
    shift = 1.0 if architecture in SHIFTED and key.endswith("norm.weight") else 0.0
    shape = tuple(int(size) for size in reversed(tensor.shape))
    found.floats[key] = FloatTensor(shape, lambda: _float(tensor, order, shift), f"GGUF {kind}")


def _float(tensor: Any, order: Tensor | None, shift: float) -> Tensor:
    from gguf.quants import dequantize

    data = np.array(tensor.data)
    if str(tensor.tensor_type.name) == "BF16":
        data = dequantize(data, tensor.tensor_type)
    values = torch.from_numpy(data)
    values = values if order is None else values[order]
    return values - shift if shift else values


def _order_of(reader: Any, tensor: Any, architecture: str) -> Tensor | None:
    """For each row of the model the row of the file, where the converter has changed the order."""
    matched = re.match(r"blk\.(\d+)\.(attn_q|attn_k)\.", tensor.name)
    if architecture not in ROTATED or matched is None:
        return None
    block, part = int(matched[1]), matched[2]
    heads = int(_field(reader, f"{architecture}.attention.head_count", block) or 0)
    if part == "attn_k":
        heads = int(_field(reader, f"{architecture}.attention.head_count_kv", block) or heads)
    rows = int(tensor.shape[-1])
    if heads <= 0 or rows % (2 * heads):
        raise Unreadable(f"{tensor.name} must have rows for {heads} heads, got {rows}", MISFIT)
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).flatten()


def _names(keys: Iterable[str], architecture: str, blocks: int) -> dict[str, str]:
    """The key of the model for each name of GGUF."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    arch = known.get(architecture)
    if arch is None:
        raise Unreadable(
            f"this version of the package gguf has no architecture {architecture!r}",
            "update the package gguf",
        )
    mapped = get_tensor_name_map(arch, blocks)
    found: dict[str, str] = {}
    for key in keys:
        name = mapped.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is not None:
            found.setdefault(name, key)
    return found


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"load_checkpoint: reading {str(path)!r} needs the package gguf ({error}); install it "
            "with pip install gguf"
        ) from None
    try:
        reader = GGUFReader(path)
    except (PermissionError, FileNotFoundError):
        raise
    except Exception as error:  # the package raises what numpy raises
        raise ValueError(
            f"load_checkpoint: {str(path)!r} must be a complete GGUF file, but it is truncated or "
            f"damaged ({error}); fetch it again"
        ) from None
    if reader.byte_order != "I":
        raise ValueError(
            f"load_checkpoint: {str(path)!r} must have this machine's order of bytes, got the "
            "other one; convert it with gguf-convert-endian"
        )
    return reader


def _field(reader: Any, name: str, block: int = 0) -> Any:
    """A value of the file, or None; of a list of values for the blocks that of one block."""
    field = reader.get_field(name)
    if field is None or not field.data:
        return None
    value = field.parts[field.data[min(block, len(field.data) - 1)]]
    if field.types[0].name == "STRING":
        return bytes(value).decode(errors="replace")
    return value.tolist()[0]
