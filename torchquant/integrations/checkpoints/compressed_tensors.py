"""The layouts of compressed-tensors checkpoints: pack-quantized and int-quantized.

A layer with K inputs and N outputs has, for integers of ``bits`` bits::

    weight_packed      int32 [N, ceil(K * bits / 32)]   integers without a sign, along the inputs
    weight             int8 [N, K]                      instead of it, if not packed
    weight_shape       int64 [2]                        N and K; with weight_packed
    weight_scale       float [N, G], [N, 1] or [1]      per group, per channel, per tensor
    weight_zero_point  int8 of that shape; with weight_packed int32 [ceil(N * bits / 32), G]
    weight_g_idx       int32 [K]                        the group of each input (older versions)
    input_scale        float [1]                        static activations
    input_zero_point   int8 [1]

    weight[n, k] = (q[n, k] - z[n, g]) * scale[n, g]

Older versions packed ``32 // bits`` whole integers of 3, 5, 6 or 7 bits into a word, and did not
pack zero points. The shapes tell these apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchquant.configs import Static
from torchquant.integrations.checkpoints.gptq import layers_with
from torchquant.integrations.checkpoints.schemes import Scheme, scheme_of, schemes
from torchquant.integrations.checkpoints.stored import (
    DAMAGED,
    MISFIT,
    Integers,
    Shapes,
    StoredWeight,
    Unreadable,
    canonical,
)
from torchquant.integrations.checkpoints.tensors import TensorFiles
from torchquant.integrations.checkpoints.words import (
    pack_words,
    unpack_words,
    unpack_words_with_gaps,
    words_for,
)

NAME = "compressed-tensors"


class CompressedWeight(StoredWeight):
    """The weight of one layer of a compressed-tensors checkpoint.

    Args:
        files: the tensors of the checkpoint.
        name: the layer.
        shape: its outputs and inputs.
        scheme: its scheme.

    Raises:
        Unreadable: a tensor is missing or has a wrong shape or dtype.
    """

    def __init__(
        self, files: TensorFiles, name: str, shape: tuple[int, int], scheme: Scheme
    ) -> None:
        self._files, self._name, self.shape, self._scheme = files, name, shape, scheme
        self.activations = scheme.activations
        outputs, inputs = shape
        self._packed = f"{name}.weight_packed" in files
        size = scheme.group_size
        groups = 1 if size is None else -(-inputs // size)
        self._check("weight_scale", (outputs, groups), *(() if size else ((outputs,), (1,), ())))
        place = "per channel" if size is None else f"in groups of {size}"
        kind = "packed" if self._packed else "int8"
        self.form = f"compressed-tensors, int{scheme.bits} {place}, {kind}"
        if self._packed:
            dense, gaps = words_for(inputs, scheme.bits), -(-inputs // (32 // scheme.bits))
            self._check("weight_packed", (outputs, dense), (outputs, gaps), dtype=torch.int32)
            self._with_gaps = files.shape(f"{name}.weight_packed")[1] != dense
            if f"{name}.weight_shape" in files:
                stored = files.get(f"{name}.weight_shape").flatten().tolist()
                if stored != [outputs, inputs]:
                    raise Unreadable(
                        f"{name}.weight_shape must be {[outputs, inputs]}, the shape of the "
                        f"model's layer, got {stored}",
                        MISFIT,
                    )
        else:
            self._check("weight", (outputs, inputs), dtype=torch.int8)
        self._order = self._groups_of_inputs(groups)
        if self._order is not None:
            self.form += ", activation order"
            self.why = "its groups are no runs of inputs (activation order)"
        # Older versions stored zero points of symmetric weights, too.
        self._has_zeros = not scheme.symmetric or f"{name}.weight_zero_point" in files
        if self._has_zeros:
            self._check_zero_points(outputs, groups)
        self._check_input()
        used = ["weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point"]
        used.append("weight_g_idx")
        if isinstance(scheme.activations, Static):
            used += ["input_scale", "input_zero_point"]
        self.names = tuple(f"{name}.{part}" for part in used if f"{name}.{part}" in files)

    def _check(
        self, part: str, *shapes: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> tuple[int, ...]:
        key = f"{self._name}.{part}"
        if key not in self._files:
            raise Unreadable(f"{key} is missing", DAMAGED)
        found = self._files.shape(key), self._files.dtype(key)
        if found[0] not in shapes or (dtype is not None and found[1] != dtype):
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            kind = "" if dtype is None else f"{str(dtype).removeprefix('torch.')} "
            raise Unreadable(
                f"{key} must be {kind}{wanted}, got {found[1]} {list(found[0])}", MISFIT
            )
        return found[0]

    def _check_input(self) -> None:
        if isinstance(self.activations, Static):
            self._check("input_scale", (1,), ())
            if not self.activations.symmetric:
                self._check("input_zero_point", (1,), ())

    def _groups_of_inputs(self, groups: int) -> Tensor | None:
        """The group of each input, int64 ``[K]``; None for groups in order."""
        key, inputs = f"{self._name}.weight_g_idx", self.shape[1]
        if key not in self._files:
            return None
        self._check("weight_g_idx", (inputs,))
        order = self._files.get(key).to(torch.int64)
        if bool((order == -1).all()):  # written where nothing was reordered
            return None
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise Unreadable(
                f"{key} must hold groups from 0 to {groups - 1}, as {self._name}.weight_scale has "
                f"them, got {int(order.min())} to {int(order.max())}",
                DAMAGED,
            )
        plain = torch.arange(inputs) // (self._scheme.group_size or inputs)
        return None if torch.equal(order, plain) else order

    def _check_zero_points(self, outputs: int, groups: int) -> None:
        bits = self._scheme.bits
        plain: list[tuple[int, ...]] = [(outputs, groups)]
        if self._scheme.group_size is None:
            plain += [(outputs,), (1,), ()]
        key = f"{self._name}.weight_zero_point"
        self._packed_zeros = (
            self._packed and key in self._files and self._files.dtype(key) == torch.int32
        )
        if self._packed_zeros:
            rows = words_for(outputs, bits), -(-outputs // (32 // bits))
            found = self._check("weight_zero_point", *((count, groups) for count in rows))
            self._zeros_with_gaps = found[0] != rows[0]
        else:
            self._check("weight_zero_point", *plain)

    def integers(self) -> Integers | None:
        """The integers of the layer; None with activation order."""
        if self.why:
            return None
        q, scale, zeros = self._unpacked(0, self.shape[0])
        where = f"{self._name}.weight_scale"
        return canonical(q, scale, zeros, self._scheme.bits, self._scheme.group_size, where)

    def rows(self, first: int, last: int) -> Tensor:
        """The float32 values of some rows, with activation order."""
        q, scale, zeros = self._unpacked(first, last)
        assert self._order is not None
        centred = q.float() if zeros is None else q.float() - zeros.float()[:, self._order]
        return centred * scale[:, self._order]

    def _unpacked(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Some rows: int8 ``[R, K]``, float32 ``[R, G]``, and int8 ``[R, G]`` or None."""
        outputs, inputs = self.shape
        bits, size = self._scheme.bits, self._scheme.group_size
        where = f"{self._name}.weight"
        if self._packed:
            unpack = unpack_words_with_gaps if self._with_gaps else unpack_words
            q = unpack(self._files.get(f"{where}_packed")[first:last], bits, inputs)
        else:
            q = self._files.get(where)[first:last].clone()
            half = 1 << (bits - 1)
            if q.numel() and not -half <= int(q.min()) <= int(q.max()) < half:
                raise Unreadable(
                    f"{where} must hold integers of {bits} bits, got larger ones", DAMAGED
                )
        scale = self._files.get(f"{where}_scale").float()
        scale = scale.reshape(-1, 1) if size is None else scale
        zeros = self._zeros().expand(outputs, -1)[first:last] if self._has_zeros else None
        return q, scale.expand(outputs, -1)[first:last], zeros

    def _zeros(self) -> Tensor:
        """int8 ``[N, G]``, or ``[1, 1]``."""
        found = self._files.get(f"{self._name}.weight_zero_point")
        if self._packed_zeros:
            unpack = unpack_words_with_gaps if self._zeros_with_gaps else unpack_words
            return unpack(found.t(), self._scheme.bits, self.shape[0]).t()
        half = 1 << (self._scheme.bits - 1)
        if found.is_floating_point() or not -half <= int(found.min()) <= int(found.max()) < half:
            raise Unreadable(
                f"{self._name}.weight_zero_point must hold integers of {self._scheme.bits} bits, "
                f"got {found.dtype} from {found.min()} to {found.max()}",
                DAMAGED,
            )
        found = found.to(torch.int8)
        return found.reshape(-1, 1) if self._scheme.group_size is None else found

    def input(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of the input, for static activations."""
        if not isinstance(self.activations, Static):
            return None
        scale = self._files.get(f"{self._name}.input_scale").float().reshape(1)
        if not bool(torch.isfinite(scale).all()) or float(scale) < 2.0**-126:
            raise Unreadable(
                f"{self._name}.input_scale must be finite and positive, got {float(scale)}", DAMAGED
            )
        key, zero = f"{self._name}.input_zero_point", torch.zeros(1, dtype=torch.int32)
        if key in self._files:
            zero = self._files.get(key).to(torch.int32).reshape(1)
        low, high = self.activations.range
        if not low <= int(zero) <= high or (self.activations.symmetric and int(zero)):
            raise Unreadable(
                f"{key} must be {'0' if self.activations.symmetric else f'from {low} to {high}'}, "
                f"got {int(zero)}",
                DAMAGED,
            )
        return scale, zero


def layers(
    files: TensorFiles,
    shapes: Shapes,
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
) -> dict[str, StoredWeight]:
    """The quantized weights of a checkpoint, by the name of the layer.

    Raises:
        Unreadable: a format is another one, or a tensor does not fit.
    """
    found = schemes(config)
    quantized: dict[str, StoredWeight] = {}
    for name in layers_with(files, "weight_scale"):
        if name not in shapes:
            raise Unreadable(
                f"{name}.weight_scale belongs to a layer that the model does not have", MISFIT
            )
        scheme = scheme_of(name, modules[name], found)
        if scheme is None:
            raise Unreadable(
                f"{name} has integers, but no scheme of config_groups is for it", DAMAGED
            )
        quantized[name] = CompressedWeight(files, name, shapes[name], scheme)
    return quantized


def tensors_of(integers: Integers, packed: bool) -> dict[str, Tensor]:
    """The tensors of one layer.

    Example:
        >>> from torchquant.configs import Weights
        >>> q = torch.zeros(16, 32, dtype=torch.int8)
        >>> found = tensors_of(Integers(q, torch.ones(16), None, Weights(bits=4)), True)
        >>> {name: [*tensor.shape] for name, tensor in found.items()}
        {'weight_packed': [16, 4], 'weight_shape': [2], 'weight_scale': [16, 1]}
    """
    outputs, bits = len(integers.qweight), integers.weights.bits
    scale = integers.scale.reshape(outputs, -1)
    if packed:
        tensors = {
            "weight_packed": pack_words(integers.qweight, bits),
            "weight_shape": torch.tensor(integers.qweight.shape),
        }
    else:
        tensors = {"weight": integers.qweight.contiguous()}
    tensors["weight_scale"] = scale.contiguous()
    if integers.zero_point is not None:
        zeros = integers.zero_point.reshape(outputs, -1)
        tensors["weight_zero_point"] = (
            pack_words(zeros.t().contiguous(), bits).t().contiguous() if packed else zeros.clone()
        )
    return tensors


__all__ = ["tensors_of"]
