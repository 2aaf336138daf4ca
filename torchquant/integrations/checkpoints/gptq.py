"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel): qweight, qzeros, scales, g_idx.

A layer with K inputs and N outputs has, for integers of ``bits`` bits in G groups of inputs::

    qweight  int32 [K * bits / 32, N]   integers without a sign, packed along the inputs
    qzeros   int32 [G, N * bits / 32]   zero points, packed along the outputs
    scales   float [G, N]
    g_idx    int32 [K]                  the group of each input; absent for groups in order
    bias     float [N]                  if the layer has one

    weight[n, k] = (q[n, k] - z[g_idx[k], n]) * scales[g_idx[k], n]

``qzeros`` of the format "gptq" (version 1) holds ``z - 1``, and of "gptq_v2" ``z``. Where z is 0,
writers of version 1 differ: most store the highest integer, and GPTQModel subtracts 1 from all
integers of a word at once, so that a 0 borrows from the next integer.

With activation order, g_idx is not monotonic. Our groups are runs of inputs. Such a weight keeps
its integers if g_idx is constant on runs of at least 8 inputs, which become the groups; otherwise
it is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

NAME = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
_SHORTEST_RUN = 8  # shorter groups of 4 bits take as much as 8 bits in groups of 32


class GPTQWeight(StoredWeight):
    """The weight of one layer of a GPTQ checkpoint.

    Args:
        files: the tensors of the checkpoint.
        name: the layer.
        shape: its outputs and inputs.
        config: the quantization_config of the checkpoint.

    Raises:
        Unreadable: a tensor is missing or has a wrong shape, or g_idx is wrong.
    """

    def __init__(
        self, files: TensorFiles, name: str, shape: tuple[int, int], config: Mapping[str, Any]
    ) -> None:
        self._files, self._name, self.shape = files, name, shape
        outputs, inputs = shape
        for part in PARTS[:3]:
            if f"{name}.{part}" not in files:
                raise Unreadable(f"{name}.{part} is missing", DAMAGED)
        words = self._described("qweight", torch.int32)
        self.bits = words[0] * 32 // inputs
        if self.bits not in BITS or words != (inputs * self.bits // 32, outputs):
            raise Unreadable(
                f"{name}.qweight must be int32 [K * bits / 32, N] with K = {inputs}, N = {outputs} "
                f"and bits 2, 3, 4 or 8, got {list(words)}",
                MISFIT,
            )
        scales = self._described("scales")
        groups = scales[0] if scales else 0
        for part, wanted in (
            ("scales", (groups, outputs)),
            ("qzeros", (groups, outputs * self.bits // 32)),
        ):
            found = self._described(part)
            if found != wanted or groups == 0:
                raise Unreadable(f"{name}.{part} must be {list(wanted)}, got {list(found)}", MISFIT)
        self.names = tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in files)
        self._version_2 = _version_2(config)
        self._borrows = "gptqmodel" in str((config.get("meta") or {}).get("quantizer"))
        self._order = self._groups_of_inputs(groups, config)
        size = _run(self._order)
        self.form = f"GPTQ, int{self.bits} {_place(groups, inputs, self._order)}"
        if size is not None and size < _SHORTEST_RUN:
            self.why = "its groups are no runs of inputs (activation order)"
        self._size = size

    def _described(self, part: str, dtype: torch.dtype | None = None) -> tuple[int, ...]:
        key = f"{self._name}.{part}"
        if dtype is not None and self._files.dtype(key) != dtype:
            raise Unreadable(f"{key} must be {dtype}, got {self._files.dtype(key)}", DAMAGED)
        return self._files.shape(key)

    def _groups_of_inputs(self, groups: int, config: Mapping[str, Any]) -> Tensor:
        """The group of each input, int64 ``[K]``."""
        key, inputs = f"{self._name}.g_idx", self.shape[1]
        if key not in self._files:
            size = int(config.get("group_size") or -1)
            size = inputs if size <= 0 else size
            if groups == 1:
                size = inputs
            if -(-inputs // size) != groups:
                raise Unreadable(
                    f"{self._name}.scales must have {-(-inputs // size)} groups of {size} inputs, "
                    f"got {groups}",
                    MISFIT,
                )
            return torch.arange(inputs) // size
        order = self._files.get(key)
        if tuple(order.shape) != (inputs,) or order.is_floating_point():
            raise Unreadable(
                f"{key} must be integers [{inputs}], got {order.dtype} {list(order.shape)}", MISFIT
            )
        order = order.to(torch.int64)
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise Unreadable(
                f"{key} must hold groups from 0 to {groups - 1}, as {self._name}.scales has them, "
                f"got {int(order.min())} to {int(order.max())}",
                DAMAGED,
            )
        return order

    def _unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """int8 ``[N, K]``, float32 ``[N, G]`` and int8 ``[N, G]``; 0 is half the range."""
        inputs = self.shape[1]
        words = self._files.get(f"{self._name}.qweight")
        qweight = unpack_words(words.t(), self.bits, inputs)
        zeros = self._files.get(f"{self._name}.qzeros")
        return qweight, self._files.get(f"{self._name}.scales").float().t(), self._zeros(zeros)

    def _zeros(self, words: Tensor) -> Tensor:
        outputs, bits = self.shape[0], self.bits
        if not self._version_2 and self._borrows and bits != 3:
            ones = sum(1 << place for place in range(0, 32, bits))
            words = ((words.to(torch.int64) + ones + (1 << 31)) % (1 << 32) - (1 << 31)).int()
            return unpack_words(words, bits, outputs).t()
        zeros = unpack_words(words, bits, outputs).t()
        if self._version_2:
            return zeros
        half = 1 << (bits - 1)
        return torch.where(zeros == half - 1, -half, zeros + 1)

    def integers(self) -> Integers | None:
        """The integers of the layer; None with activation order."""
        if self.why:
            return None
        qweight, scale, zero_point = self._unpacked()
        if self._size is not None:
            runs = self._order[:: self._size]
            scale, zero_point = scale[:, runs], zero_point[:, runs]
        else:
            only = self._order[:1]
            scale, zero_point = scale[:, only], zero_point[:, only]
        where = f"{self._name}.scales"
        return canonical(qweight, scale, zero_point, self.bits, self._size, where)

    def rows(self, first: int, last: int) -> Tensor:
        """The float32 values of some rows."""
        words = self._files.get(f"{self._name}.qweight")[:, first:last]
        q = unpack_words(words.t(), self.bits, self.shape[1]).float()
        zeros = self._zeros(self._files.get(f"{self._name}.qzeros"))[first:last].float()
        scale = self._files.get(f"{self._name}.scales").float().t()[first:last]
        return (q - zeros[:, self._order]) * scale[:, self._order]


def layers(
    files: TensorFiles, shapes: Shapes, config: Mapping[str, Any]
) -> dict[str, StoredWeight]:
    """The quantized weights of a checkpoint, by the name of the layer.

    Raises:
        Unreadable: the format is another one, or a tensor does not fit.
    """
    _version_2(config)
    found: dict[str, StoredWeight] = {}
    for name in layers_with(files, "qweight"):
        if name not in shapes:
            raise Unreadable(
                f"{name}.qweight belongs to a layer that the model does not have", MISFIT
            )
        found[name] = GPTQWeight(files, name, shapes[name], config)
    return found


def layers_with(files: TensorFiles, part: str) -> list[str]:
    """The names of the layers that have a tensor of the given name."""
    return [name[: -len(part) - 1] for name in files.names if name.endswith(f".{part}")]


def _version_2(config: Mapping[str, Any]) -> bool:
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise Unreadable(
            f"checkpoint_format must be gptq or gptq_v2, got {form!r}, whose tensors are laid out "
            "for one kernel",
            UNKNOWN,
        )
    return form == "gptq_v2"


def _run(order: Tensor) -> int | None:
    """The longest run so that all inputs of each run are of one group; None: all inputs are.

    Example:
        >>> _run(torch.tensor([0, 0, 1, 1])), _run(torch.tensor([1, 0, 1, 0])), _run(torch.zeros(4))
        (2, 1, None)
    """
    places = (order[1:] != order[:-1]).nonzero().flatten() + 1
    return math.gcd(*places.tolist()) if places.numel() else None


def _place(groups: int, inputs: int, order: Tensor) -> str:
    if groups == 1:
        return "per channel"
    size = int((order == order[0]).sum())
    ordered = torch.equal(order, torch.arange(inputs) // size)
    return f"in groups of {size}{'' if ordered else ', activation order'}"


def tensors_of(integers: Integers, group_size: int | None) -> dict[str, Tensor]:
    """The tensors of one layer, with zero points as version 2 stores them.

    Example:
        >>> from torchquant.configs import Weights
        >>> q = torch.zeros(32, 32, dtype=torch.int8)
        >>> found = tensors_of(Integers(q, torch.ones(32), None, Weights(bits=4)), None)
        >>> {name: [*tensor.shape] for name, tensor in found.items()}
        {'qweight': [4, 32], 'qzeros': [1, 4], 'scales': [1, 32], 'g_idx': [32]}
    """
    outputs, inputs = integers.qweight.shape
    scale = integers.scale.reshape(outputs, -1)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    if integers.zero_point is not None:
        zeros = integers.zero_point.reshape(outputs, -1)
    bits, size = integers.weights.bits, inputs if group_size is None else group_size
    return {
        "qweight": pack_words(integers.qweight, bits).t().contiguous(),
        "qzeros": pack_words(zeros.t().contiguous(), bits),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(inputs) // size).to(torch.int32),
    }


def as_version_1(qzeros: Tensor, bits: int) -> Tensor:
    """Packed zero points of version 2, none of which is 0, as version 1 stores them.

    Example:
        >>> hex(as_version_1(torch.tensor([[0x28282828]], dtype=torch.int32), 4).item())
        '0x17171717'
    """
    length = qzeros.shape[1] * 32 // bits
    return pack_words(unpack_words(qzeros, bits, length) - 1, bits)


__all__ = ["as_version_1", "tensors_of"]
