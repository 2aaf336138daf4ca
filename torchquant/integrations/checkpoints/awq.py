"""The layout of AWQ checkpoints (AutoAWQ's version "gemm"): qweight, qzeros, scales.

A layer with K inputs and N outputs has, with 4 bits and G groups of inputs::

    qweight  int32 [K, N / 8]   integers without a sign, packed along the outputs
    qzeros   int32 [G, N / 8]   zero points, packed along the outputs
    scales   float [G, N]
    bias     float [N]          if the layer has one

    weight[n, k] = (q[n, k] - z[g, n]) * scales[g, n]        g = k // (K / G)

A word holds 8 outputs; from its lowest bits on: 0, 2, 4, 6, 1, 3, 5, 7. The scales that AWQ gives
to the inputs are part of the layers before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchquant.integrations.checkpoints.gptq import layers_with
from torchquant.integrations.checkpoints.stored import (
    DAMAGED,
    MISFIT,
    UNKNOWN,
    Integers,
    Shapes,
    StoredWeight,
    Unreadable,
    canonical,
)
from torchquant.integrations.checkpoints.tensors import TensorFiles
from torchquant.integrations.checkpoints.words import pack_words, unpack_words

NAME = "awq"
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
EACH = 32 // BITS  # integers in a word
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # of output 0, 1, ... in a word


class AWQWeight(StoredWeight):
    """The weight of one layer of an AWQ checkpoint.

    Args:
        files: the tensors of the checkpoint.
        name: the layer.
        shape: its outputs and inputs.

    Raises:
        Unreadable: a tensor is missing or has a wrong shape.
    """

    def __init__(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> None:
        self._files, self._name, self.shape = files, name, shape
        outputs, inputs = shape
        self.names = tuple(f"{name}.{part}" for part in PARTS)
        for key in self.names:
            if key not in files:
                raise Unreadable(f"{key} is missing", DAMAGED)
        scales = files.shape(f"{name}.scales")
        groups = scales[0] if scales else 0
        for part, wanted in (
            ("qweight", (inputs, outputs // EACH)),
            ("qzeros", (groups, outputs // EACH)),
            ("scales", (groups, outputs)),
        ):
            key = f"{name}.{part}"
            whole = part == "scales" or files.dtype(key) == torch.int32
            if files.shape(key) != wanted or not whole or outputs % EACH:
                raise Unreadable(
                    f"{key} must be {'float' if part == 'scales' else 'int32'} {list(wanted)} for "
                    f"4 bits, {inputs} inputs and {outputs} outputs, got {files.dtype(key)} "
                    f"{list(files.shape(key))}",
                    MISFIT,
                )
        if not groups or inputs % groups:
            raise Unreadable(
                f"{name}.scales must have groups of equal size for {inputs} inputs, got {groups}",
                MISFIT,
            )
        self._size = None if groups == 1 else inputs // groups
        place = "per channel" if self._size is None else f"in groups of {self._size}"
        self.form = f"AWQ, int4 {place}"

    def integers(self) -> Integers:
        """The integers of the layer."""
        q, zeros = (_unpack(self._files.get(f"{self._name}.{part}")) for part in PARTS[:2])
        scale = self._files.get(f"{self._name}.scales").float().t()
        return canonical(q, scale, zeros, BITS, self._size, f"{self._name}.scales")


def layers(
    files: TensorFiles, shapes: Shapes, config: Mapping[str, Any]
) -> dict[str, StoredWeight]:
    """The quantized weights of a checkpoint, by the name of the layer.

    Raises:
        Unreadable: the version is another one, or a tensor does not fit.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise Unreadable(f"the version of an AWQ checkpoint must be gemm, got {version!r}", UNKNOWN)
    found: dict[str, StoredWeight] = {}
    for name in layers_with(files, "qweight"):
        if name not in shapes:
            raise Unreadable(
                f"{name}.qweight belongs to a layer that the model does not have", MISFIT
            )
        found[name] = AWQWeight(files, name, shapes[name])
    return found


def tensors_of(integers: Integers) -> dict[str, Tensor]:
    """The tensors of one layer.

    Example:
        >>> from torchquant.configs import Weights
        >>> q = torch.zeros(16, 32, dtype=torch.int8)
        >>> found = tensors_of(Integers(q, torch.ones(16), None, Weights(bits=4)))
        >>> {name: [*tensor.shape] for name, tensor in found.items()}
        {'qweight': [32, 2], 'qzeros': [1, 2], 'scales': [1, 16]}
    """
    outputs = len(integers.qweight)
    scale = integers.scale.reshape(outputs, -1)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    if integers.zero_point is not None:
        zeros = integers.zero_point.reshape(outputs, -1)
    return {
        "qweight": _pack(integers.qweight),
        "qzeros": _pack(zeros),
        "scales": scale.t().contiguous(),
    }


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[R, N / 8]`` to int8 ``[N, R]``."""
    rows = unpack_words(words, BITS, words.shape[1] * EACH)
    ordered: Tensor = rows.unflatten(1, (-1, EACH))[..., list(_PLACE)].flatten(1)
    return ordered.t().contiguous()


def _pack(integers: Tensor) -> Tensor:
    """int8 ``[N, R]`` to int32 ``[R, N / 8]``."""
    rows = integers.t().unflatten(1, (-1, EACH))[..., list(_ORDER)].flatten(1)
    return pack_words(rows.contiguous(), BITS)


__all__ = ["tensors_of"]
